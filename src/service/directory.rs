//! The socket's place in the file system: whoever can exchange the socket is handed seeds.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::listener::BindError;

/// So many links one after the other are followed, as the kernel does (path_resolution(7)).
const LINKS: u8 = 40;
/// In a directory that has it everybody renames and removes what is their own, and nothing else (S_ISVTX, inode(7)).
const STICKY: u32 = 0o1000;

/// Nobody but root and those that are `trusted` may exchange what is in the socket's directory.
///
/// # Errors
/// Somebody else may, or the directory is not there.
pub(super) fn check_directory(socket: &Path, trusted: impl Fn(u32) -> bool) -> Result<(), BindError> {
    let directory = directory(socket);
    let name = directory.display();
    let metadata = fs::metadata(directory)
        .map_err(|cause| BindError::io(socket, &format!("its directory {name}"), &cause, "make the directory"))?;
    check_owner(socket, directory, &metadata, &trusted)?;
    if metadata.mode() & 0o022 != 0 {
        return Err(exchangeable(socket, directory, &metadata));
    }
    Ok(())
}

/// The same, and nobody else may exchange the directory itself: by its name in one above it, or by a link on the way.
///
/// # Errors
/// Somebody else may, or the directory is not there.
pub fn check_way(socket: &Path, trusted: impl Fn(u32) -> bool) -> Result<(), BindError> {
    check_directory(socket, &trusted)?;
    follow(socket, directory(socket), &trusted, LINKS)
}

/// Looks at every directory and link of `way`, and where the links lead.
fn follow(socket: &Path, way: &Path, trusted: &impl Fn(u32) -> bool, links: u8) -> Result<(), BindError> {
    for step in way.ancestors() {
        let unseen = |cause| BindError::io(socket, &step.display().to_string(), &cause, "see where it leads");
        let metadata = fs::symlink_metadata(step).map_err(unseen)?;
        check_owner(socket, step, &metadata, trusted)?;
        if metadata.is_symlink() {
            let target = fs::read_link(step).map_err(unseen)?;
            if let Some(links) = links.checked_sub(1) {
                follow(socket, &directory(step).join(target), trusted, links)?;
            }
        } else if is_open(&metadata) {
            return Err(exchangeable(socket, step, &metadata));
        }
    }
    Ok(())
}

/// Whether others may rename what is in this directory and not theirs. Root's group is trusted as root is.
fn is_open(metadata: &Metadata) -> bool {
    let others = if metadata.gid() == 0 { 0o002 } else { 0o022 };
    metadata.mode() & others != 0 && metadata.mode() & STICKY == 0
}

fn directory(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

fn check_owner(
    socket: &Path,
    step: &Path,
    metadata: &Metadata,
    trusted: &impl Fn(u32) -> bool,
) -> Result<(), BindError> {
    let (owner, name) = (metadata.uid(), step.display());
    if owner != 0 && !trusted(owner) {
        let what = format!("{name} belongs to uid {owner}, who could exchange the socket");
        return Err(BindError::new(socket, what, format!("give {name} to root, or to the user of the plugin")));
    }
    Ok(())
}

fn exchangeable(socket: &Path, step: &Path, metadata: &Metadata) -> BindError {
    let name = step.display();
    let what = format!("others could exchange it: the mode of {name} is {:04o}", metadata.mode() & 0o7777);
    BindError::new(socket, what, format!("chmod go-w {name}, or name a directory of its own"))
}
