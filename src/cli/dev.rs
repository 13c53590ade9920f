//! `trousseau dev`: a SoftHSM token, a KEK, a configuration and a serving plugin, in one command.
//!
//! SoftHSM learns where its tokens are from its environment. So this process replaces itself once, with that
//! environment set; the PIN is made here and goes into a file, never onto a command line.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use secrecy::SecretString;
use zeroize::Zeroizing;

use super::output::Failure;
use super::{key, serve};
use crate::config::Config;
use crate::provider::pkcs11::setup;

pub(super) const EXAMPLES: &str = "All files lie in one directory; run it again and it goes on with what is there, your \
changes to the configuration among it. It leaves a directory alone that has a configuration of another's. SoftHSM keeps \
its keys in files: this is for development, not for secrets that matter.

Examples:
  trousseau dev
  trousseau dev --dir /tmp/trousseau-dev
  trousseau probe --socket /tmp/trousseau-dev/kms.sock";

#[derive(Args)]
pub(super) struct DevArgs {
    /// Where everything goes.
    #[arg(long, value_name = "DIR", default_value = "./trousseau-dev")]
    dir: PathBuf,
}

const SOFTHSM_VARIABLE: &str = "SOFTHSM2_CONF";
const TOKEN: &str = "trousseau-dev";
/// How a configuration begins that may be gone on with.
const MARK: &str = "# Made by `trousseau dev`";
const CONFIGURATION: &str = "trousseau.toml";
const PIN: &str = "pin";
const PROFILE: &str = "softhsm";

pub(super) fn run(args: &DevArgs) -> Result<(), Failure> {
    let is_made = is_made(&args.dir)?;
    make_directory(&args.dir)?;
    let dir = args.dir.canonicalize().map_err(|error| failed(&args.dir, &error))?;
    let (config, softhsm) = (dir.join(CONFIGURATION), dir.join("softhsm2.conf"));
    // The first file: from then on the directory is known as ours.
    if !is_made {
        write(&config, &configuration(&dir))?;
    }
    make_directory(&dir.join("tokens"))?;
    write(&softhsm, &format!("directories.tokendir = {}\nobjectstore.backend = file\n", dir.join("tokens").display()))?;
    if std::env::var_os(SOFTHSM_VARIABLE).is_none_or(|set| Path::new(&set) != softhsm) {
        return Err(start_over(&dir, &softhsm));
    }
    let pin = secret_file(&dir.join(PIN))?;
    let so_pin = secret_file(&dir.join("so-pin"))?;
    let loaded = Config::load(&config)?;
    // Another token that somebody has written into it is not ours to initialize.
    if let Some(provider) = loaded.pkcs11().find(|provider| provider.profile.name == PROFILE) {
        setup::initialize_token(&provider.module, TOKEN, &so_pin, &pin)
            .map_err(|what| Failure::failed(what, format!("remove {} and try again", dir.display())))?;
        key::ensure_first(&loaded, provider)?;
    }
    let welcome = welcome(&dir, &loaded);
    serve::serve(&config, loaded, move || super::output::print(&welcome))
}

/// Whether this verb has been in the directory.
///
/// # Errors
/// What is there was made by somebody else, and stays as it is.
fn is_made(dir: &Path) -> Result<bool, Failure> {
    let config = dir.join(CONFIGURATION);
    let of_others = |file: &Path| {
        let what = format!("{} was not made by `trousseau dev`", file.display());
        Err(Failure::configuration(what, "name a directory of its own with --dir"))
    };
    match fs::read_to_string(&config) {
        Ok(text) if text.starts_with(MARK) => Ok(true),
        Ok(_) => of_others(&config),
        Err(error) if error.kind() == ErrorKind::NotFound => match dir.join(PIN) {
            pin if pin.exists() => of_others(&pin),
            _ => Ok(false),
        },
        Err(error) => Err(failed(&config, &error)),
    }
}

fn welcome(dir: &Path, config: &Config) -> String {
    let (dir, socket) = (dir.display(), config.listen.socket.display());
    format!(
        "token, KEK and configuration are in {dir}\nserving on {socket}\n\n  trousseau probe --socket {socket}\n  \
         {SOFTHSM_VARIABLE}={dir}/softhsm2.conf trousseau key list --config {dir}/{CONFIGURATION}\n\nend it with Ctrl-C"
    )
}

fn configuration(dir: &Path) -> String {
    format!(
        r#"{MARK}.
version = "v1"

[listen]
socket = "{dir}/kms.sock"
v1beta1 = true

[keyring]
cluster = "dev"
state = "{dir}/state"

[[provider]]
name = "softhsm"
type = "pkcs11"
profile = "{PROFILE}"
tokens = ["pkcs11:token={TOKEN}"]
pin-file = "{dir}/{PIN}"
"#,
        dir = dir.display()
    )
}

/// Replaces this process by one that has SoftHSM's variable set; returns only if that fails.
fn start_over(dir: &Path, softhsm: &Path) -> Failure {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return Failure::failed(format!("this program cannot be found: {error}"), ""),
    };
    let error = Command::new(&program).args(["dev", "--dir"]).arg(dir).env(SOFTHSM_VARIABLE, softhsm).exec();
    failed(&program, &error)
}

/// A random PIN of 16 letters, made once.
fn secret_file(path: &Path) -> Result<SecretString, Failure> {
    if !path.exists() {
        let mut bytes = Zeroizing::new([0; 16]);
        getrandom::fill(bytes.as_mut()).map_err(|error| Failure::failed(format!("getrandom(2): {error}"), ""))?;
        let letters: String = bytes.iter().map(|byte| char::from(b'a' + (byte & 15))).collect();
        let letters = Zeroizing::new(letters);
        write(path, &letters)?;
    }
    let text = Zeroizing::new(fs::read_to_string(path).map_err(|error| failed(path, &error))?);
    Ok(SecretString::from(text.trim_end()))
}

fn make_directory(path: &Path) -> Result<(), Failure> {
    fs::create_dir_all(path).map_err(|error| failed(path, &error))
}

/// Writes a file for the owner alone.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o600)))
        .map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("{}: {error}", path.display()), "name a directory of your own with --dir")
}
