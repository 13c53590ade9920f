//! How soon the plugin answers, how much memory it takes, and how large it is: `cargo bench --bench start`.
//!
//! It makes a throw-away SoftHSM token with a KEK in gcm mode. `TROUSSEAU_BIN` names another binary than the release's.
//! Goals are printed, not enforced: a shared machine changes its speed.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::env;
use std::error::Error;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use trousseau::service::client::{Client, ClientError};

const STARTS: usize = 20;
const REQUESTS: usize = 50_000;
const IN_FLIGHT: usize = 16;
const PATIENCE: Duration = Duration::from_secs(30);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A token and a configuration for it.
struct Bench {
    binary: PathBuf,
    directory: TempDir,
}

/// A process of ours. It is asked to end, and waited for, when this is dropped.
struct Process(Child);

impl Bench {
    /// `trousseau dev` makes the token; a keyring of another name has the one KEK in gcm mode.
    fn new() -> Result<Self> {
        let binary = env::var_os("TROUSSEAU_BIN").map_or_else(release, |binary| Ok(binary.into()))?;
        let bench = Self { binary, directory: TempDir::new()? };
        let developed = bench.start(bench.command(&["dev", "--dir"]).arg(bench.directory.path()))?;
        bench.connect()?;
        drop(developed);
        let configuration = fs::read_to_string(bench.path("trousseau.toml"))?;
        fs::write(bench.path("trousseau.toml"), configuration.replace(r#"cluster = "dev""#, r#"cluster = "bench""#))?;
        let generate = ["key", "generate", "--mode", "gcm", "--activate-in", "0s", "--unsynchronized-clock-ok"];
        let made = bench.configured(&generate).stdout(Stdio::null()).status()?;
        if made.success() { Ok(bench) } else { Err(format!("no KEK was made: {made}").into()) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env_remove("STATE_DIRECTORY");
        command
    }

    fn configured(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(arguments);
        command.arg("--config").arg(self.path("trousseau.toml")).env("SOFTHSM2_CONF", self.path("softhsm2.conf"));
        command
    }

    fn start(&self, command: &mut Command) -> Result<Process> {
        let log = fs::File::create(self.path("log"))?;
        Ok(Process(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?))
    }

    fn serve(&self) -> Result<Process> {
        self.start(&mut self.configured(&["serve"]))
    }

    /// Waits until the socket takes connections, without a pause: that would be measured.
    fn connect(&self) -> Result<PathBuf> {
        let (socket, began) = (self.path("kms.sock"), Instant::now());
        while UnixStream::connect(&socket).is_err() {
            if began.elapsed() > PATIENCE {
                return Err(format!("nobody listens:\n{}", fs::read_to_string(self.path("log"))?).into());
            }
            thread::yield_now();
        }
        Ok(socket)
    }

    /// From exec to the answer to the first Status, in milliseconds.
    fn first_status(&self, runtime: &Runtime) -> Result<f64> {
        let began = Instant::now();
        let _serving = self.serve()?;
        let socket = self.connect()?;
        runtime.block_on(async { Client::connect(&socket, PATIENCE).await?.status().await })?;
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }

    /// Resident memory after many requests, and its peak, in MiB.
    fn memory(&self, runtime: &Runtime) -> Result<(f64, f64)> {
        let serving = self.serve()?;
        runtime.block_on(load(&self.connect()?))?;
        let status = fs::read_to_string(format!("/proc/{}/status", serving.0.id()))?;
        let mib = |name: &str| -> Option<f64> {
            let kib: f64 =
                status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok())?;
            Some(kib / 1024.0)
        };
        mib("VmRSS:").zip(mib("VmHWM:")).ok_or_else(|| "proc_pid_status(5) has no VmRSS".into())
    }
}

/// Builds what is packaged. What `cargo bench` has put at the same place unwinds where that aborts, and is larger.
fn release() -> Result<PathBuf> {
    let built = Command::new(env!("CARGO")).args(["build", "--release", "--locked"]).status()?;
    if built.success() { Ok(env!("CARGO_BIN_EXE_trousseau").into()) } else { Err(format!("cargo: {built}").into()) }
}

impl Drop for Process {
    fn drop(&mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        self.0.wait().unwrap();
    }
}

/// So many Encrypts and so many Decrypts over one connection, a fixed number of them under way at a time.
async fn load(socket: &Path) -> std::result::Result<(), ClientError> {
    let client = Client::connect(socket, PATIENCE).await?;
    let lanes = (0..IN_FLIGHT).map(|_| {
        let mut client = client.clone();
        async move {
            for _ in 0..REQUESTS / IN_FLIGHT {
                let (ciphertext, key_id) = client.encrypt(vec![7; 32]).await?;
                client.decrypt(ciphertext, key_id).await?;
            }
            Ok(())
        }
    });
    try_join_all(lanes).await.map(drop)
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let bench = Bench::new()?;
    let mut starts: Vec<f64> = (0..STARTS).map(|_| bench.first_status(&runtime)).collect::<Result<_>>()?;
    starts.sort_by(f64::total_cmp);
    let at = |index: usize| starts.get(index).copied().unwrap_or_default();
    let (least, median, most) = (at(0), at(STARTS / 2), at(STARTS - 1));
    let (resident, peak) = bench.memory(&runtime)?;
    let size = fs::metadata(&bench.binary)?.len() as f64 / 1e6;
    println!("{}", bench.binary.display());
    for (what, figure, goal) in [
        ("first Status after exec", format!("{least:.1} / {median:.1} / {most:.1} ms"), "10 ms"),
        ("memory after the load", format!("{resident:.1} MiB, at most {peak:.1} MiB"), "15 MiB"),
        ("size of the binary", format!("{size:.1} MB"), "10 MB"),
    ] {
        println!("{what:<24} {figure:<32} goal {goal}");
    }
    println!(
        "first Status: least / median / most of {STARTS} starts. The load: {REQUESTS} Encrypts and as many Decrypts,"
    );
    println!("{IN_FLIGHT} under way at a time.");
    Ok(())
}
