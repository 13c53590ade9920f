//! What file systems are asked: what to do where one takes nothing, which file this is, who could change it, and for a
//! lock.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

/// How long a lock is waited for that is never held for more than moments.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is tried.
const TRY_AGAIN: Duration = Duration::from_millis(10);

/// The remedy, if that is the cause.
pub(crate) fn remedy(cause: &io::Error) -> Option<&'static str> {
    match cause.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(
            "make room on its file system: df shows its free space, df -i its free inodes, quota what is left of them",
        ),
        ErrorKind::ReadOnlyFilesystem => {
            Some("have its file system mounted for writing, or name a place on another one")
        }
        ErrorKind::ResourceBusy => Some("end the process that holds it: `lslocks` names it"),
        _ => None,
    }
}

/// Whoever can change a file that we go by decides what we load and whom we trust: root and we alone may. Else what is
/// wrong with it, and what to do.
pub(crate) fn refuse_if_changeable_by_others(path: &Path, metadata: &Metadata) -> Result<(), (String, String)> {
    let (owner, mode, path) = (metadata.uid(), metadata.mode(), path.display());
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err((format!("belongs to uid {owner}, who could change it"), format!("chown root {path}")));
    }
    if mode & 0o022 != 0 {
        let what = format!("can be changed by others: its mode is {:04o}", mode & 0o7777);
        return Err((what, format!("chmod go-w {path}")));
    }
    Ok(())
}

/// Which file it is, under whatever name: device and inode.
pub(crate) fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
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

/// Takes a lock by an operation that does not wait. flock(2) has no timeout, and whoever may open the file could hold
/// us up for ever.
///
/// # Errors
/// [`ErrorKind::ResourceBusy`]: another process has held it for so long. All else: the file system takes no lock.
pub(crate) fn lock(file: &File, how: FlockOperation, patience: Duration) -> io::Result<()> {
    let end = Instant::now() + patience;
    loop {
        match flock(file, how) {
            Err(Errno::WOULDBLOCK) if Instant::now() < end => thread::sleep(TRY_AGAIN),
            Err(Errno::WOULDBLOCK) => {
                let what = format!("another process has held its lock for {} s", patience.as_secs());
                return Err(io::Error::new(ErrorKind::ResourceBusy, what));
            }
            answer => return Ok(answer?),
        }
    }
}
