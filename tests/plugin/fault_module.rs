//! The module that makes faults (`tests/tokens/fault`, named by `TROUSSEAU_FAULT_LIB`), between the plugin and a host's
//! token.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs, thread};

use crate::plugin::{Host, Plugin};

/// Two looks of the plugin's at its start follow each other sooner.
const QUIET: Duration = Duration::from_millis(400);

/// The module, and its rules.
pub struct Faults<'a> {
    pub host: &'a Host,
    pub library: &'a Path,
}

/// The module that makes faults. `None`: it is not named; this says so.
pub fn library() -> Option<PathBuf> {
    const LACKS: &str = "TROUSSEAU_FAULT_LIB: what tests/tokens/build.sh fault prints";
    let named = env::var_os("TROUSSEAU_FAULT_LIB").map(PathBuf::from);
    if named.is_none() {
        assert!(env::var_os("TROUSSEAU_TEST_REQUIRE").is_none(), "{LACKS}");
        eprintln!("skipped: it lacks {LACKS}");
    }
    named
}

impl Faults<'_> {
    /// From now on these are the rules. A token that encrypts nothing signs when a DEK is wrapped.
    pub fn set(&self, rules: &str) {
        let signs = self.host.token.family.modes() == ["oaep"];
        let rules = if signs { rules.replace("C_Encrypt", "C_Sign") } else { rules.to_owned() };
        fs::write(self.host.path("rules.new"), rules).unwrap();
        fs::rename(self.host.path("rules.new"), self.host.path("rules")).unwrap();
    }

    /// The host's, with the module in the place of its token's.
    pub fn configuration(&self) -> String {
        let module = |module: &Path| format!("module = \"{}\"", module.display());
        self.host.configuration().replace(&module(&self.host.token.family.module()), &module(self.library))
    }

    /// `serve` over the module.
    pub fn command(&self) -> Command {
        self.verb(&["serve"])
    }

    /// A verb over the module.
    pub fn verb(&self, verb: &[&str]) -> Command {
        self.host.write_secret("trousseau.toml", &self.configuration());
        let mut command = self.host.command(verb);
        command.arg("--config").arg(self.host.path("trousseau.toml")).stdin(Stdio::null());
        command
            .env("TROUSSEAU_FAULT_MODULE", self.host.token.family.own_module())
            .env("TROUSSEAU_FAULT_RULES", self.host.path("rules"));
        command
    }

    /// The same, and the module writes down each call in this file of the host's.
    pub fn command_with_log(&self, name: &str) -> Command {
        let mut command = self.command();
        command.env("TROUSSEAU_FAULT_LOG", self.host.path(name));
        command
    }

    /// Starts a command that serves, and waits until it is healthy.
    pub fn start_healthy(&self, command: Command) -> Plugin {
        let mut plugin = self.host.start(command);
        plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
        plugin
    }

    /// The same, and waits until it asks the token nothing of its own for a moment: rules that count calls are about the
    /// test's then.
    pub fn serve_quiet(&self) -> Plugin {
        let plugin = self.start_healthy(self.command_with_log("calls"));
        self.wait_until_quiet();
        plugin
    }

    /// Of a plugin that was started with [`Self::serve_quiet`].
    pub fn wait_until_quiet(&self) {
        let calls = || fs::metadata(self.host.path("calls")).unwrap().len();
        // Twice: one that gets no processor for a moment is quiet too.
        let (mut seen, mut quiet) = (0, 0);
        while quiet < 2 {
            thread::sleep(QUIET);
            quiet = if seen == calls() { quiet + 1 } else { 0 };
            seen = calls();
        }
    }

    /// Starts `serve` over the module and waits until it is healthy.
    pub fn serve_healthy(&self) -> Plugin {
        self.start_healthy(self.command())
    }
}
