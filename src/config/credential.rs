//! Where a secret comes from: a file, or a systemd credential. Never argv, the environment or the configuration file.

use std::fmt;
use std::fs::{Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::OFlags;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

/// A PIN, or the like, of more bytes than this is a mistake, such as the path of another file.
const LONGEST_LINE: usize = 1024;
/// A file of more bytes than this holds no secret. A JWT or a private key has some thousand.
const LONGEST_FILE: u64 = 16 * 1024;

/// How a plain command gets what the unit gets. A key that root makes in a token of files, the service could not read.
const AS_THE_UNIT: &str = "run it with each LoadCredential= of the unit, for a PIN: `systemd-run --pipe --wait \
    -p LoadCredential=pin:/etc/trousseau/pin trousseau …`; for `key generate` add `-p User=trousseau \
    -p StateDirectory=trousseau`, and what the token's drop-in says of groups and environment";

/// A file that holds one secret, which is read anew each time it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credential(Place);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// An absolute path.
    File(PathBuf),
    /// The name of a file that systemd makes, readable by the unit alone, whoever owns it (systemd.exec(5)).
    Systemd(String),
}

/// Why a secret could not be read. It never shows what was read.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {what}")]
pub struct CredentialError {
    place: String,
    what: String,
    remedy: String,
    /// It may not be read by this user.
    pub(crate) is_forbidden: bool,
}

impl CredentialError {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &str {
        &self.remedy
    }
}

impl Credential {
    /// `credential:NAME` is a file in `$CREDENTIALS_DIRECTORY` (systemd.exec(5)); all else is an absolute path.
    ///
    /// # Errors
    /// It is neither; with what to do.
    pub(super) fn parse(text: &str) -> Result<Self, (String, &'static str)> {
        const NAME_THE_FILE: &str = "name the file that holds the secret, or `credential:NAME`";
        if let Some(name) = text.strip_prefix("credential:") {
            if name.is_empty() || name.contains('/') {
                return Err((format!("`{name}` is not the name of a credential"), NAME_THE_FILE));
            }
            return Ok(Self(Place::Systemd(name.to_owned())));
        }
        let path = PathBuf::from(text);
        if !path.is_absolute() {
            return Err((format!("`{text}` is not an absolute path"), NAME_THE_FILE));
        }
        Ok(Self(Place::File(path)))
    }

    /// Where it is here. A credential of systemd's is nowhere but in its unit.
    ///
    /// # Errors
    /// This process is not of the unit.
    pub(super) fn path(&self) -> Result<PathBuf, CredentialError> {
        match &self.0 {
            Place::File(path) => Ok(path.clone()),
            Place::Systemd(name) => match std::env::var_os("CREDENTIALS_DIRECTORY") {
                Some(directory) => Ok(PathBuf::from(directory).join(name)),
                None => {
                    Err(self.error("systemd hands it to the unit alone: no $CREDENTIALS_DIRECTORY here", AS_THE_UNIT))
                }
            },
        }
    }

    /// Reads the secret, without the line end that editors leave behind.
    ///
    /// # Errors
    /// The file cannot be read, can be read by others, or holds nothing, or more than a line.
    pub fn read(&self) -> Result<SecretString, CredentialError> {
        let text = self.read_file()?;
        let secret = text.expose_secret();
        let secret = secret.strip_suffix('\n').unwrap_or(secret);
        let secret = secret.strip_suffix('\r').unwrap_or(secret);
        if secret.is_empty() {
            return Err(self.error("holds no secret: it is empty", "write the secret into it"));
        }
        if secret.contains('\n') || secret.len() > LONGEST_LINE {
            return Err(self.error("holds more than one line", "leave only the secret in it"));
        }
        Ok(SecretString::from(secret))
    }

    /// Reads the whole file, of any number of lines.
    ///
    /// # Errors
    /// The file cannot be read, can be read by others, or is too long for a secret.
    pub fn read_file(&self) -> Result<SecretString, CredentialError> {
        // O_NONBLOCK: a FIFO in the file's place must not hold us up.
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(OFlags::NONBLOCK.bits() as i32);
        let mut file = options.open(self.path()?).map_err(|error| self.unopened(&error))?;
        let metadata = file.metadata().map_err(|error| self.error(error.to_string(), "check the file system"))?;
        self.check_access(&metadata)?;
        let mut text = Zeroizing::new(String::with_capacity(metadata.len().min(LONGEST_FILE) as usize + 1));
        file.by_ref()
            .take(LONGEST_FILE)
            .read_to_string(&mut text)
            .map_err(|error| self.error(format!("cannot be read: {error}"), "write the secret in UTF-8"))?;
        if metadata.len() > LONGEST_FILE {
            return Err(self.error(format!("has more than {LONGEST_FILE} bytes"), "leave only the secret in it"));
        }
        Ok(SecretString::from(text.as_str()))
    }

    fn check_access(&self, metadata: &Metadata) -> Result<(), CredentialError> {
        if !metadata.is_file() {
            return Err(self.error("is not a file", "name a file that holds the secret"));
        }
        match &self.0 {
            Place::File(path) if metadata.mode() & 0o077 != 0 => {
                let what = format!("can be read or changed by others: its mode is {:04o}", metadata.mode() & 0o7777);
                Err(self.error(what, format!("chmod 0600 {}", path.display())))
            }
            _ => Ok(()),
        }
    }

    fn unopened(&self, error: &io::Error) -> CredentialError {
        let user = rustix::process::geteuid().as_raw();
        let remedy = match (&self.0, error.kind()) {
            (_, ErrorKind::PermissionDenied) => {
                format!("run it as root, or as the user that it belongs to, or give it to uid {user}")
            }
            (Place::Systemd(name), ErrorKind::NotFound) => {
                format!("add LoadCredential={name}:FILE to the unit, or -p LoadCredential={name}:FILE to systemd-run")
            }
            (Place::File(_), ErrorKind::NotFound) => format!("create it, readable by uid {user} alone"),
            _ => "check its path and its file system".to_owned(),
        };
        let is_forbidden = error.kind() == ErrorKind::PermissionDenied;
        CredentialError { is_forbidden, ..self.error(format!("cannot be read: {error}"), remedy) }
    }

    fn error(&self, what: impl Into<String>, remedy: impl Into<String>) -> CredentialError {
        CredentialError { place: self.to_string(), what: what.into(), remedy: remedy.into(), is_forbidden: false }
    }
}

impl fmt::Display for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::File(path) => path.display().fmt(f),
            Place::Systemd(name) => write!(f, "credential:{name}"),
        }
    }
}
