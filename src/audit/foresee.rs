//! What can be seen beforehand of why an audit log could not be opened. Nothing is made: a log of another user's would
//! be one more reason.

use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::parts::{not_plain, of};
use crate::config::AuditConfig;

/// The unit has systemd make it when it starts (LogsDirectory=).
const MADE_BY_SYSTEMD: &str = "/var/log/trousseau";

/// Looks for a reason, for this user, else for the directory's owner. What may not be looked at is no reason: whoever
/// serves may be another user than this one.
///
/// # Errors
/// There is one.
pub fn foresee(config: &AuditConfig, user: Option<u32>) -> io::Result<()> {
    let file = config.file.as_path();
    let directory = file.parent().unwrap_or(Path::new("/"));
    let wrong = |error: &io::Error| of(file, &io::Error::new(error.kind(), format!("its directory: {error}")));
    let user = match fs::metadata(directory) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound && directory == Path::new(MADE_BY_SYSTEMD) => return Ok(()),
        Err(error) => return Err(wrong(&error)),
        Ok(metadata) if !metadata.is_dir() => return Err(wrong(&ErrorKind::NotADirectory.into())),
        Ok(metadata) => {
            let user = user.unwrap_or(metadata.uid());
            may(user, &metadata, 0o3).map_err(|error| wrong(&error))?;
            user
        }
    };
    let Ok(metadata) = fs::symlink_metadata(file) else { return Ok(()) }; // it will be made
    if !metadata.is_file() || metadata.nlink() > 1 {
        return Err(of(file, &not_plain()));
    }
    may(user, &metadata, 0o6).map_err(|error| of(file, &error))
}

/// Unless the mode says for certain that this user may not do that: of the groups nothing is known.
fn may(user: u32, metadata: &Metadata, bits: u32) -> io::Result<()> {
    let (mode, owner) = (metadata.mode(), metadata.uid());
    let classes = if user == owner { &[6][..] } else { &[3, 0] };
    if user == 0 || classes.iter().any(|shift| mode >> shift & bits == bits) {
        return Ok(());
    }
    let what =
        format!("uid {user} may not write there: it belongs to uid {owner}, and its mode is {:04o}", mode & 0o7777);
    Err(io::Error::new(ErrorKind::PermissionDenied, what))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_the_mode_forbids_is_foreseen_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let config = AuditConfig::of_test(directory.path(), 1);
        let file = config.file.clone();
        let owner = fs::metadata(directory.path()).unwrap().uid();
        for (of_directory, of_file, user, is_good) in [
            (0o700, None, None, true),
            (0o700, None, Some(owner), true),
            (0o700, None, Some(owner + 1), false),
            (0o770, None, Some(owner + 1), true), // it may be in the group
            (0o700, Some(0o600), None, true),
            (0o707, Some(0o600), Some(owner + 1), false),
        ] {
            if let Some(mode) = of_file {
                fs::write(&file, "").unwrap();
                fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            }
            fs::set_permissions(directory.path(), fs::Permissions::from_mode(of_directory)).unwrap();
            let foreseen = foresee(&config, user);
            assert_eq!(foreseen.is_ok(), is_good, "{of_directory:o} {of_file:?} {user:?}: {foreseen:?}");
        }
        assert!(foresee(&AuditConfig { file: directory.path().join("no/log"), ..config }, None).is_err());
    }
}
