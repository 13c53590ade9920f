//! What file systems are asked: what to do where one takes nothing, and which file this is.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

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

/// SHA-256 of a file, in hex.
pub(crate) fn sha256(path: &Path) -> io::Result<String> {
    let (mut file, mut hash, mut part) = (File::open(path)?, Sha256::new(), vec![0; 1 << 16]);
    loop {
        let count = file.read(&mut part)?;
        match part.get(..count) {
            Some([]) | None => return Ok(base16ct::lower::encode_string(&hash.finalize())),
            Some(read) => hash.update(read),
        }
    }
}
