//! What to do where a file system takes nothing.

use std::io::{self, ErrorKind};

/// The remedy, if that is the cause.
pub(crate) fn remedy(cause: &io::Error) -> Option<&'static str> {
    match cause.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(
            "make room on its file system: df shows its free space, df -i its free inodes, quota what is left of them",
        ),
        ErrorKind::ReadOnlyFilesystem => {
            Some("have its file system mounted for writing, or name a place on another one")
        }
        _ => None,
    }
}
