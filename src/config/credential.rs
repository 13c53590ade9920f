//! Where a secret comes from: a file, or a systemd credential. Never argv, the environment or the configuration file.

use std::fmt;
use std::fs::{Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::OFlags;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

/// A PIN, or the like, of more bytes than this is a mistake, such as the path of another file.
const LONGEST_LINE: usize = 1024;
/// A file of more bytes than this holds no secret. A JWT or a private key has some thousand.
const LONGEST_FILE: u64 = 16 * 1024;

/// A file that holds one secret, which is read anew each time it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credential {
    path: PathBuf,
    /// systemd made the file: it is readable by the unit alone, whoever owns it.
    from_systemd: bool,
}

/// Why a secret could not be read. It never shows what was read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {what}", path = .path.display())]
pub struct CredentialError {
    path: PathBuf,
    what: String,
    remedy: String,
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
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if let Some(name) = text.strip_prefix("credential:") {
            if name.is_empty() || name.contains('/') {
                return Err(format!("`{name}` is not the name of a credential"));
            }
            let directory = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or(
                "`credential:` needs $CREDENTIALS_DIRECTORY, which systemd sets for a unit with LoadCredential=",
            )?;
            return Ok(Self { path: PathBuf::from(directory).join(name), from_systemd: true });
        }
        let path = PathBuf::from(text);
        if !path.is_absolute() {
            return Err(format!("`{text}` is not an absolute path"));
        }
        Ok(Self { path, from_systemd: false })
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
        let mut file = options.open(&self.path).map_err(|error| {
            let user = rustix::process::geteuid().as_raw();
            self.error(format!("cannot be read: {error}"), format!("create it, readable by uid {user} alone"))
        })?;
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
        if self.from_systemd {
            return Ok(());
        }
        if metadata.mode() & 0o077 != 0 {
            let what = format!("can be read or changed by others: its mode is {:04o}", metadata.mode() & 0o7777);
            return Err(self.error(what, format!("chmod 0600 {}", self.path.display())));
        }
        Ok(())
    }

    fn error(&self, what: impl Into<String>, remedy: impl Into<String>) -> CredentialError {
        CredentialError { path: self.path.clone(), what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}
