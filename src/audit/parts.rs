//! The files of an audit log, as they are read. They lie in a directory of the plugin's user, and root reads them too:
//! no link is followed, no FIFO waited for, and no line read without an end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::chain::Head;
use crate::disk;

/// No line is longer.
pub const LONGEST_LINE: u64 = 16 * 1024;
/// A crash leaves no more of a line, or of many that were written at once.
const LONGEST_TAIL: u64 = 64 * 1024 * 1024;
/// How often a file that is put aside at this moment is looked for again, and after how long.
const LOOKS: usize = 100;
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The same error, with the file that it is of.
pub(super) fn of(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

pub(super) fn not_plain() -> io::Error {
    io::Error::other("it is not a plain file of its own: find out who put it there, and move it away")
}

/// Opens a plain file that has no other name.
pub(super) fn open_plain(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let opened = options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32).open(path);
    let is_link = |error: &io::Error| Errno::from_io_error(error) == Some(Errno::LOOP);
    let file = opened.map_err(|error| if is_link(&error) { not_plain() } else { error })?;
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.nlink() <= 1 { Ok(file) } else { Err(not_plain()) }
}

/// Opens a file of a log for reading.
///
/// # Errors
/// It cannot be read, or is not a plain file of its own.
pub fn open_part(path: &Path) -> io::Result<File> {
    open_plain(path, OpenOptions::new().read(true))
}

/// Whether the path still is this file's.
pub(super) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = disk::identity(&file.metadata()?);
    Ok(fs::symlink_metadata(path).is_ok_and(|now| disk::identity(&now) == ours))
}

/// The files of a log, the oldest first: those that were put aside, and the one that is written.
///
/// # Errors
/// The directory cannot be read.
pub(super) fn parts(path: &Path) -> io::Result<Vec<PathBuf>> {
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned() + ".";
    let mut aside: Vec<PathBuf> = fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    aside.retain(|file| {
        let file = file.file_name().unwrap_or_default().to_string_lossy();
        file.strip_prefix(&name)
            .is_some_and(|rest| rest.len() == 12 && rest.bytes().all(|digit| digit.is_ascii_digit()))
    });
    aside.sort();
    aside.push(path.to_owned());
    Ok(aside)
}

/// A log at one moment, in which nobody was in the middle of a line, or of putting a file aside.
#[derive(Debug)]
pub struct Snapshot {
    /// As [`parts`] has them.
    pub parts: Vec<PathBuf>,
    /// The newest of them: its name may be another file's by now.
    pub newest: File,
    /// How much of that was written.
    pub written: u64,
}

impl Snapshot {
    /// # Errors
    /// The newest file cannot be opened, or its lock or name not be had; the directory cannot be read.
    pub fn take(path: &Path) -> io::Result<Self> {
        for _ in 0..LOOKS {
            match Self::look(path) {
                Ok(Some(snapshot)) => return Ok(snapshot),
                // Between a file that was put aside and the next one, the name is nobody's.
                Err(error) if error.kind() != io::ErrorKind::NotFound || parts(path)?.len() == 1 => return Err(error),
                _ => std::thread::sleep(LOOK_AGAIN),
            }
        }
        fs::symlink_metadata(path)?; // or it is not there at all
        Err(io::Error::other("it is put aside again and again: end what does that"))
    }

    /// `None`: the file was put aside before its lock was ours.
    fn look(path: &Path) -> io::Result<Option<Self>> {
        let newest = open_part(path)?;
        disk::lock(&newest, FlockOperation::NonBlockingLockShared, disk::PATIENCE)?;
        if !is_at(&newest, path)? {
            return Ok(None);
        }
        let (parts, written) = (parts(path)?, newest.metadata()?.len());
        rustix::fs::flock(&newest, FlockOperation::Unlock)?;
        Ok(Some(Self { parts, newest, written }))
    }
}

/// Where the last whole line of a file ends, and that line without its end.
pub(super) fn last_line(mut file: &File, length: u64) -> io::Result<(u64, Option<Vec<u8>>)> {
    let mut end = length;
    while end > 0 {
        if length - end > LONGEST_TAIL {
            return Err(io::Error::other("it does not end with a line: move the file away, and keep it"));
        }
        let from = end.saturating_sub(2 * LONGEST_LINE);
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(from))?;
        Read::by_ref(&mut file).take(end - from).read_to_end(&mut bytes)?;
        if let Some(at) = bytes.iter().rposition(|byte| *byte == b'\n') {
            let lines = bytes.get(..at).unwrap_or_default();
            let last = lines.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
            return Ok((from + at as u64 + 1, Some(last.to_vec())));
        }
        end = from;
    }
    Ok((0, None))
}

/// The first line of a file, without its end.
pub(super) fn first_line(mut file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(LONGEST_LINE).read_to_end(&mut bytes)?;
    Ok(bytes.split(|byte| *byte == b'\n').next().unwrap_or_default().to_vec())
}

pub(super) fn head_of(last: &[u8]) -> io::Result<Head> {
    Head::at(last).map_err(|flaw| io::Error::other(format!("its last line: {flaw}: move the file away, and keep it")))
}

/// The name of a file that is put aside: the log's, and the number of its last line.
pub(super) fn aside(path: &Path, head: &Head) -> PathBuf {
    let mut aside = path.to_owned().into_os_string();
    aside.push(format!(".{:012}", head.seq));
    aside.into()
}

/// Whether one of the files that were put aside ends with this head.
pub(super) fn is_put_aside(path: &Path, head: &Head) -> bool {
    head_of_part(&aside(path, head)).is_ok_and(|found| found.as_ref() == Some(head))
}

/// The head of the newest file that was put aside.
pub(super) fn head_of_part_before(path: &Path) -> io::Result<Option<Head>> {
    let parts = parts(path)?;
    let Some(before) = parts.iter().rev().nth(1) else { return Ok(None) };
    head_of_part(before).map_err(|error| of(before, &error))
}

fn head_of_part(part: &Path) -> io::Result<Option<Head>> {
    let file = open_part(part)?;
    last_line(&file, file.metadata()?.len())?.1.map(|last| head_of(&last)).transpose()
}
