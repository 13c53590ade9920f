//! The file of an audit log: how lines are added to it while other processes add theirs, and how it is put aside when it
//! is large.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};

use super::chain::{Event, Head};
use crate::config::AuditConfig;

/// No line is longer.
const LONGEST_LINE: u64 = 16 * 1024;

pub(super) struct LogFile {
    path: PathBuf,
    rotate_at: u64,
    file: File,
    head: Head,
    /// Where the chain ends that `head` is of.
    length: u64,
}

impl LogFile {
    pub(super) fn open(config: &AuditConfig) -> Result<Self, String> {
        let path = config.file.clone();
        let wrong = |error: io::Error| format!("{}: {error}", path.display());
        let file = open(&path).map_err(wrong)?;
        let mut log = Self { path: path.clone(), rotate_at: config.rotate_at, file, head: Head::default(), length: 0 };
        log.locked(|log| log.catch_up()).map_err(wrong)?;
        Ok(log)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn head(&self) -> &Head {
        &self.head
    }

    /// Adds events, after one that says how many were lost before them, if any were.
    pub(super) fn append(&mut self, lost: u64, events: &[Event]) -> io::Result<()> {
        self.locked(|log| {
            log.catch_up()?;
            if log.length >= log.rotate_at {
                log.put_aside()?;
            }
            let (mut head, mut lines) = (log.head.clone(), Vec::new());
            if lost > 0 {
                let detail = format!("{lost} events could not be written");
                head.append(&Event { detail, ..Event::now("gap") }, &mut lines);
            }
            events.iter().for_each(|event| head.append(event, &mut lines));
            if let Err(error) = log.file.write_all(&lines) {
                log.file.set_len(log.length)?; // no half line
                return Err(error);
            }
            (log.head, log.length) = (head, log.length + lines.len() as u64);
            Ok(())
        })
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Whoever rotates logs may have moved ours, also while we waited for the lock: the chain goes on in a new file.
    fn locked<T>(&mut self, work: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        flock(&self.file, FlockOperation::LockExclusive)?;
        while !self.is_in_place()? {
            self.file = open(&self.path)?;
            self.length = 0;
            flock(&self.file, FlockOperation::LockExclusive)?;
        }
        let done = work(self);
        flock(&self.file, FlockOperation::Unlock)?;
        done
    }

    fn is_in_place(&self) -> io::Result<bool> {
        let ours = self.file.metadata()?;
        Ok(fs::metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == (ours.dev(), ours.ino())))
    }

    /// Another process may have added lines, or ended in the middle of one.
    fn catch_up(&mut self) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length == self.length {
            return Ok(());
        }
        let from = length.saturating_sub(2 * LONGEST_LINE);
        let mut end = Vec::new();
        self.file.seek(SeekFrom::Start(from))?;
        Read::by_ref(&mut self.file).take(2 * LONGEST_LINE).read_to_end(&mut end)?;
        let whole = end.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if whole < end.len() {
            tracing::warn!(file = %self.path.display(), "the audit log ended within a line, which is removed");
            self.file.set_len(from + whole as u64)?;
        }
        let lines = end.get(..whole).unwrap_or_default();
        if let Some(last) = lines.split(|byte| *byte == b'\n').rev().nth(1) {
            let not_ours = |flaw| io::Error::other(format!("its last line: {flaw}: move the file away, and keep it"));
            self.head = Head::at(last).map_err(not_ours)?;
        }
        self.length = from + whole as u64;
        Ok(())
    }

    /// Under the name of the log and the number of its last line.
    fn put_aside(&mut self) -> io::Result<()> {
        let mut aside = self.path.clone().into_os_string();
        aside.push(format!(".{:012}", self.head.seq));
        self.file.sync_data()?;
        fs::rename(&self.path, aside)?;
        let next = open(&self.path)?;
        flock(&next, FlockOperation::LockExclusive)?;
        self.file = next; // the old lock goes with the old file
        self.length = self.file.metadata()?.len();
        Ok(())
    }
}

/// A plain file of the directory's owner, which the command line of root shares with the daemon.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600);
    let file = options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.nlink() > 1 {
        return Err(io::Error::other("it is not a plain file of its own"));
    }
    if let Some(directory) = path.parent().map(fs::metadata).transpose()?
        && rustix::process::geteuid().is_root()
        && metadata.uid() != directory.uid()
    {
        std::os::unix::fs::fchown(&file, Some(directory.uid()), Some(directory.gid()))?;
    }
    Ok(file)
}

/// The files of a log, the oldest first: those that were put aside, and the one that is written.
///
/// # Errors
/// The directory cannot be read.
pub fn parts(path: &Path) -> io::Result<Vec<PathBuf>> {
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
