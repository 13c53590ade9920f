//! The files of a conversion: all of them are new, or none is written.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::Failure;

/// Everything that is to be written under one directory.
pub(super) struct Files {
    directory: PathBuf,
    credentials: PathBuf,
    configuration: String,
    secrets: Vec<(&'static str, Zeroizing<String>)>,
    secret_files: Vec<(&'static str, String)>,
}

impl Files {
    /// Makes the directories, and sees that nothing is there.
    pub(super) fn new(
        directory: &Path,
        configuration: String,
        secrets: Vec<(&'static str, Zeroizing<String>)>,
        secret_files: Vec<(&'static str, String)>,
    ) -> Result<Self, Failure> {
        make_directory(directory, 0o755)?;
        // systemd wants whole paths.
        let directory = fs::canonicalize(directory).map_err(|error| failed(directory, &error))?;
        let credentials = directory.join("credentials");
        if !secrets.is_empty() {
            make_directory(&credentials, 0o700)?;
        }
        let files = Self { directory, credentials, configuration, secrets, secret_files };
        match files.all().iter().find(|(path, ..)| path.symlink_metadata().is_ok()) {
            Some((path, ..)) => Err(failed(path, &ErrorKind::AlreadyExists.into())),
            None => Ok(files),
        }
    }

    /// What the unit must be told, for the secrets to reach the plugin.
    pub(super) fn load_credential(&self) -> Vec<String> {
        let of = |name: &str, file: &Path| format!("LoadCredential={name}:{}", file.display());
        let ours = self.secrets.iter().map(|(name, _)| of(name, &self.credentials.join(name)));
        ours.chain(self.secret_files.iter().map(|(name, file)| of(name, Path::new(file)))).collect()
    }

    /// Writes them, and returns their paths.
    pub(super) fn write(&self) -> Result<Vec<PathBuf>, Failure> {
        let all = self.all();
        for (path, mode, text) in &all {
            write(path, *mode, text).map_err(|error| failed(path, &error))?;
        }
        Ok(all.into_iter().map(|(path, ..)| path).collect())
    }

    /// Each file with its mode and text. The secrets come first: a configuration never names what is not there.
    fn all(&self) -> Vec<(PathBuf, u32, Zeroizing<String>)> {
        let secret = |(name, text): &(&str, Zeroizing<String>)| (self.credentials.join(name), 0o600, text.clone());
        let mut all: Vec<_> = self.secrets.iter().map(secret).collect();
        all.push((self.directory.join("credentials.conf"), 0o644, Zeroizing::new(self.drop_in())));
        all.push((self.directory.join("trousseau.toml"), 0o644, Zeroizing::new(self.configuration.clone())));
        all
    }

    fn drop_in(&self) -> String {
        format!(
            "# Into /etc/systemd/system/trousseau.service.d, beside drop-ins/transit.conf.\n\n[Service]\n\
             # Without an HSM there is no PIN: this takes the unit's own line back.\nLoadCredential=\n{}\n",
            self.load_credential().join("\n")
        )
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<(), Failure> {
    match DirBuilder::new().recursive(false).mode(mode).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        // What the umask took away.
        made => made.and_then(|()| fs::set_permissions(path, PermissionsExt::from_mode(mode))),
    }
    .map_err(|error| failed(path, &error))
}

fn write(path: &Path, mode: u32, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.set_permissions(PermissionsExt::from_mode(mode))?;
    file.sync_all()
}

fn failed(path: &Path, error: &io::Error) -> Failure {
    let remedy = match error.kind() {
        ErrorKind::AlreadyExists => "nothing is overwritten: name another directory with --out, or move it away",
        ErrorKind::PermissionDenied => "run it as root, or name a directory of your own with --out",
        _ => crate::disk::remedy(error).unwrap_or("name another directory with --out"),
    };
    Failure::failed(format!("{}: {error}", path.display()), remedy)
}
