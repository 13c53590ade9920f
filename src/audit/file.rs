//! The file of an audit log: how lines are added to it while other processes add theirs, and how it is put aside when it
//! is large.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, renameat_with};

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

    /// Whoever rotates logs may have moved ours, also while we waited for the lock: the chain goes on in a new file, from
    /// what others added before it was moved.
    fn locked<T>(&mut self, work: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        flock(&self.file, FlockOperation::LockExclusive)?;
        while !self.is_in_place()? {
            let caught_up = self.catch_up();
            flock(&self.file, FlockOperation::Unlock)?;
            caught_up?;
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
        if length == 0 && self.head == Head::default() {
            // A new file after one that was put aside: the chain is older than this process.
            self.head = head_of_part_before(&self.path)?.unwrap_or_default();
        }
        if length == self.length {
            return Ok(());
        }
        let (whole, last) = last_line(&mut self.file, length)?;
        if whole < length {
            tracing::warn!(file = %self.path.display(), "the audit log ended within a line, which is removed");
            self.file.set_len(whole)?;
        }
        if let Some(last) = last {
            self.head = head_of(&last)?;
        }
        self.length = whole;
        Ok(())
    }

    /// Under the name of the log and the number of its last line.
    fn put_aside(&mut self) -> io::Result<()> {
        let mut aside = self.path.clone().into_os_string();
        aside.push(format!(".{:012}", self.head.seq));
        self.file.sync_data()?;
        // Nothing is ever overwritten.
        renameat_with(CWD, &self.path, CWD, PathBuf::from(aside), RenameFlags::NOREPLACE)?;
        let next = open(&self.path)?;
        flock(&next, FlockOperation::LockExclusive)?;
        self.file = next; // the old lock goes with the old file
        self.length = self.file.metadata()?.len();
        Ok(())
    }
}

/// Where the last whole line of a file ends, and that line without its end.
fn last_line(file: &mut File, length: u64) -> io::Result<(u64, Option<Vec<u8>>)> {
    let mut end = length;
    while end > 0 {
        let from = end.saturating_sub(2 * LONGEST_LINE);
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(from))?;
        Read::by_ref(file).take(end - from).read_to_end(&mut bytes)?;
        if let Some(at) = bytes.iter().rposition(|byte| *byte == b'\n') {
            let lines = bytes.get(..at).unwrap_or_default();
            let last = lines.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
            return Ok((from + at as u64 + 1, Some(last.to_vec())));
        }
        end = from;
    }
    Ok((0, None))
}

fn head_of(last: &[u8]) -> io::Result<Head> {
    Head::at(last).map_err(|flaw| io::Error::other(format!("its last line: {flaw}: move the file away, and keep it")))
}

/// The head of the newest file that was put aside.
fn head_of_part_before(path: &Path) -> io::Result<Option<Head>> {
    let parts = parts(path)?;
    let Some(before) = parts.iter().rev().nth(1) else { return Ok(None) };
    let mut file = File::open(before)?;
    let length = file.metadata()?.len();
    last_line(&mut file, length)?.1.map(|last| head_of(&last)).transpose()
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::super::chain::Verifier;
    use super::*;
    use crate::config::{OnFailure, Sync};

    fn config(directory: &Path, rotate_at: u64) -> AuditConfig {
        let (file, sync, on_failure) = (directory.join("audit.log"), Sync::Never, OnFailure::Count);
        AuditConfig { file, sync, on_failure, rotate_at, head_every: Duration::ZERO }
    }

    /// The lines of all parts, if the chain through them is whole.
    fn whole(config: &AuditConfig) -> usize {
        let mut verifier = Verifier::default();
        let text: String = parts(&config.file).unwrap().iter().map(|part| fs::read_to_string(part).unwrap()).collect();
        text.lines().for_each(|line| verifier.next(line.as_bytes()).unwrap());
        text.lines().count()
    }

    #[test]
    fn the_chain_goes_on_however_files_and_writers_change() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path(), 1 << 20);
        let aside = |number: u64| directory.path().join(format!("audit.log.{number:012}"));
        let one = |log: &mut LogFile| log.append(0, &[Event::now("encrypt")]).unwrap();
        let mut daemon = LogFile::open(&config).unwrap();
        let mut command = LogFile::open(&config).unwrap();
        one(&mut daemon);
        one(&mut command);
        fs::rename(&config.file, aside(2)).unwrap();
        one(&mut daemon); // which has not seen the command's line
        fs::rename(&config.file, aside(3)).unwrap();
        one(&mut LogFile::open(&config).unwrap()); // a new process, after a file that is gone
        one(&mut daemon);
        one(&mut command);
        assert_eq!(whole(&config), 6);
    }

    #[test]
    fn a_file_that_is_large_is_put_aside_and_nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path(), 1);
        for _ in 0..3 {
            let mut log = LogFile::open(&config).unwrap();
            log.append(0, &[Event::now("encrypt"), Event::now("decrypt")]).unwrap();
        }
        assert_eq!((parts(&config.file).unwrap().len(), whole(&config)), (3, 6));
        fs::write(directory.path().join("audit.log.000000000006"), "somebody's").unwrap();
        let error = LogFile::open(&config).unwrap().append(0, &[Event::now("encrypt")]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn what_a_crash_left_of_a_line_is_removed() {
        for torn in ["{\"seq\":3", &"\0".repeat(100_000)] {
            let directory = tempfile::tempdir().unwrap();
            let config = config(directory.path(), 1 << 20);
            LogFile::open(&config).unwrap().append(0, &[Event::now("encrypt"), Event::now("decrypt")]).unwrap();
            OpenOptions::new().append(true).open(&config.file).unwrap().write_all(torn.as_bytes()).unwrap();
            LogFile::open(&config).unwrap().append(7, &[Event::now("encrypt")]).unwrap();
            assert_eq!(whole(&config), 4, "and a line for the gap");
        }
    }
}
