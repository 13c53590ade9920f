//! The command line: a file for each verb.

mod assemble;
mod attest;
mod audit;
mod bench;
mod check;
mod dev;
mod doctor;
mod encryption_config;
mod key;
mod migrate;
mod output;
mod pin;
mod probe;
mod serve;
mod status;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use jiff::SignedDuration;

use self::output::{Failure, Format};
use crate::config::{Config, DEFAULT_PATH, DEFAULT_SOCKET, period};

/// The number, and from what this binary was built.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("TROUSSEAU_BUILD"), ")");

/// A Kubernetes KMS plugin whose key-encryption key never leaves its HSM.
#[derive(Parser)]
#[command(version = VERSION, after_help = EXIT_CODES, max_term_width = 100, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_CODES: &str = "Exit codes:
  0   done
  1   a finding, or a failure
  2   wrong usage
  69  the plugin, or its token, is out of reach
  77  not permitted
  78  the configuration cannot be used

Logs go to standard error; TROUSSEAU_LOG=debug shows more.";

#[derive(Subcommand)]
enum Verb {
    /// Serve KMS on the socket until SIGTERM.
    #[command(after_help = serve::EXAMPLES)]
    Serve(ConfigArgs),
    /// Check a configuration as `serve` would read it, touching no token.
    #[command(after_help = check::EXAMPLES)]
    Check(check::CheckArgs),
    /// Try everything that a working plugin needs, and say what to do about what is wrong.
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::DoctorArgs),
    /// Make and list key-encryption keys.
    #[command(subcommand)]
    Key(key::KeyVerb),
    /// Have a PIN tried again that a token has refused.
    #[command(subcommand)]
    Pin(pin::PinVerb),
    /// Check the audit log.
    #[command(subcommand)]
    Audit(audit::AuditVerb),
    /// Show what a serving plugin says of itself.
    #[command(after_help = status::EXAMPLES)]
    Status(status::StatusArgs),
    /// Send a value through a serving plugin and back, as the API server would.
    #[command(after_help = probe::EXAMPLES)]
    Probe(probe::ProbeArgs),
    /// Measure a serving plugin, or a token alone, and say what the limit is.
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::BenchArgs),
    /// Print the EncryptionConfiguration, flags and mounts that an API server needs.
    #[command(after_help = encryption_config::EXAMPLES)]
    EncryptionConfig(encryption_config::EncryptionConfigArgs),
    /// Make another plugin's configuration into one of this.
    #[command(subcommand)]
    Migrate(migrate::MigrateVerb),
    /// Make a SoftHSM token, a KEK and a configuration, and serve. For development.
    #[command(after_help = dev::EXAMPLES)]
    Dev(dev::DevArgs),
    /// Print a completion script for a shell.
    #[command(after_help = "Example:\n  trousseau completions bash > /etc/bash_completion.d/trousseau")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Args)]
struct ConfigArgs {
    /// The configuration file.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

#[derive(Args)]
struct SocketArgs {
    /// The socket of the serving plugin [default: that of --config, else /run/trousseau/kms.sock].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl SocketArgs {
    /// The one that is named, else the configuration's, where one is.
    fn of<'a>(&'a self, config: Option<&'a Config>) -> &'a Path {
        let named = self.socket.as_deref().or(config.map(|config| config.listen.socket.as_path()));
        named.unwrap_or(Path::new(DEFAULT_SOCKET))
    }
}

#[derive(Args)]
struct OutputArgs {
    /// How to print.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: Format,
}

/// Reads a duration such as `10m`, `1h30m`, `2d` or `0s`.
fn duration(text: &str) -> Result<SignedDuration, String> {
    period(text).ok_or_else(|| "a duration is written as 90s, 10m, 1h30m, 2d, 1w or 0s".to_owned())
}

/// The same for one in which something is to be done.
fn some_duration(text: &str) -> Result<SignedDuration, String> {
    let some = duration(text)?;
    if some.is_zero() { Err("nothing can be done in no time: 3s, for example".to_owned()) } else { Ok(some) }
}

/// The command line as data, for its man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(verb: Verb) -> Result<(), Failure> {
    protect_process()?;
    match verb {
        Verb::Serve(args) => {
            crate::telemetry::init("info");
            serve::run(&args.config)
        }
        Verb::Check(args) => check::run(&args),
        Verb::Doctor(args) => {
            crate::telemetry::init("off");
            doctor::run(&args)
        }
        Verb::Key(verb) => {
            crate::telemetry::init("off"); // what goes wrong is told at the end
            key::run(verb)
        }
        Verb::Pin(verb) => pin::run(&verb),
        Verb::Audit(verb) => audit::run(verb),
        Verb::Status(args) => status::run(&args),
        Verb::Probe(args) => probe::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::EncryptionConfig(args) => encryption_config::run(&args),
        Verb::Migrate(verb) => migrate::run(&verb),
        Verb::Dev(args) => {
            crate::telemetry::init("warn");
            dev::run(&args)
        }
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command(), "trousseau", &mut script);
            output::print(&String::from_utf8_lossy(&script))
        }
    }
}

/// Nobody else reads what this process makes, nor its memory: files and sockets are made for the owner alone, no core
/// is dumped, and no process of the same user attaches.
fn protect_process() -> Result<(), Failure> {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit, umask};
    umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .and_then(|()| setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }))
        .map_err(|error| Failure::failed(format!("core dumps cannot be switched off: {error}"), "run it on Linux"))
}

/// The runtime of every verb but `serve`: one thread, since the tokens' sessions have threads of their own.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(no_runtime)
}

fn no_runtime(error: std::io::Error) -> Failure {
    Failure::failed(format!("no runtime: {error}"), "raise the limits on open files and threads")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }
}
