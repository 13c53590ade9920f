//! What the benches share: a throw-away SoftHSM token with a KEK in gcm mode, and the plugin over it.
#![allow(missing_docs, unreachable_pub, dead_code)] // each of them uses a part

use std::error::Error;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A loop without it would take one of the plugin's cores.
const GLANCE: Duration = Duration::from_micros(100);
/// No wait for the plugin lasts longer.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A token and a configuration for it.
pub struct Host {
    pub binary: PathBuf,
    directory: TempDir,
}

/// A process of ours. It is asked to end, and waited for, when this is dropped.
pub struct Process(pub Child);

impl Host {
    /// `trousseau dev` makes the token; a keyring of another name has the one KEK in gcm mode. `TROUSSEAU_BIN` names the
    /// binary, else it is this one.
    pub fn new(binary: impl FnOnce() -> Result<PathBuf>) -> Result<Self> {
        let binary = env::var_os("TROUSSEAU_BIN").map_or_else(binary, |binary| Ok(binary.into()))?;
        let host = Self { binary, directory: TempDir::new()? };
        let developed = host.start(host.command(&["dev", "--dir"]).arg(host.directory.path()))?;
        host.connect()?;
        drop(developed);
        host.change(r#"cluster = "dev""#, r#"cluster = "bench""#)?;
        let generate = ["key", "generate", "--mode", "gcm", "--activate-in", "0s", "--unsynchronized-clock-ok"];
        let made = host.configured(&generate).stdout(Stdio::null()).status()?;
        if made.success() { Ok(host) } else { Err(format!("no KEK was made: {made}").into()) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Changes the configuration.
    pub fn change(&self, from: &str, to: &str) -> Result<()> {
        let file = self.path("trousseau.toml");
        let changed = fs::read_to_string(&file)?.replace(from, to);
        Ok(fs::write(file, changed)?)
    }

    /// A verb in the token's environment.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env_remove("STATE_DIRECTORY").env("SOFTHSM2_CONF", self.path("softhsm2.conf"));
        command.env("TROUSSEAU_FAULT_RULES", self.path("rules")); // for the module that makes faults
        command
    }

    pub fn configured(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(arguments);
        command.arg("--config").arg(self.path("trousseau.toml"));
        command
    }

    pub fn start(&self, command: &mut Command) -> Result<Process> {
        let log = fs::File::create(self.path("log"))?;
        Ok(Process(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?))
    }

    pub fn serve(&self) -> Result<Process> {
        self.start(&mut self.configured(&["serve"]))
    }

    /// Waits until the socket takes connections.
    pub fn connect(&self) -> Result<PathBuf> {
        let (socket, began) = (self.path("kms.sock"), Instant::now());
        while UnixStream::connect(&socket).is_err() {
            if began.elapsed() > PATIENCE {
                return Err(self.nobody_serves());
            }
            thread::sleep(GLANCE);
        }
        Ok(socket)
    }

    /// With what the plugin has said.
    pub fn nobody_serves(&self) -> Box<dyn Error> {
        format!("nobody serves:\n{}", fs::read_to_string(self.path("log")).unwrap_or_default()).into()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _status = self.0.wait();
    }
}
