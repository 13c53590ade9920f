//! The file of an audit log: how lines are added to it while other processes add theirs, and how it is put aside when it
//! is large.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use super::chain::{Event, Head, REWRITTEN};
use super::parts::{aside, first_line, head_of, head_of_part_before, is_at, is_put_aside, last_line, of, open_plain};
use crate::config::AuditConfig;
use crate::disk;

/// A file that could not be put aside is tried, and told of, again after so long.
const PUT_ASIDE_AGAIN: Duration = Duration::from_secs(60);

pub(super) struct LogFile {
    path: PathBuf,
    rotate_at: u64,
    file: File,
    head: Head,
    /// Where the chain ends that `head` is of.
    length: u64,
    /// A head that is no longer in the file, and of which no line tells yet.
    gone: Option<Head>,
    /// Since when it cannot be put aside, and how often that was tried.
    stuck: Option<(Instant, u64)>,
}

impl LogFile {
    /// Its errors name the file.
    pub(super) fn open(config: &AuditConfig) -> io::Result<Self> {
        let path = config.file.clone();
        let opened = open(&path).and_then(|file| {
            let (rotate_at, head) = (config.rotate_at, Head::default());
            let mut log = Self { path: path.clone(), rotate_at, file, head, length: 0, gone: None, stuck: None };
            log.locked(Self::catch_up)?;
            Ok(log)
        });
        opened.map_err(|error| of(&path, &error))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn head(&self) -> &Head {
        &self.head
    }

    /// Adds events, after one that says how many were lost before them, if any were. Its errors name the file. `true`: it
    /// had to say first that the log's head was gone.
    pub(super) fn append(&mut self, lost: u64, events: &[Event]) -> io::Result<bool> {
        let appended = self.locked(|log| {
            log.catch_up()?;
            if log.length >= log.rotate_at && log.is_free_to_go() {
                log.begin_another()?;
            }
            let (mut head, mut lines) = (log.head.clone(), Vec::new());
            if let Some(Head { seq, hash }) = &log.gone {
                let detail = format!("the line {seq} with the hash {hash} was its last one, and is gone");
                head.append(&Event { detail, ..Event::now(REWRITTEN) }, &mut lines);
            }
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
            Ok(log.gone.take().is_some())
        });
        appended.map_err(|error| of(&self.path, &error))
    }

    /// Its errors name the file.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data().map_err(|error| of(&self.path, &error))
    }

    fn locked<T>(&mut self, work: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        self.lock()?;
        let done = work(self);
        flock(&self.file, FlockOperation::Unlock)?;
        done
    }

    /// Whoever rotates logs may have moved ours, also while we waited for the lock: the chain goes on in a new file,
    /// from what others added before it was moved.
    fn lock(&mut self) -> io::Result<()> {
        let take = |file: &File| disk::lock(file, FlockOperation::NonBlockingLockExclusive, disk::PATIENCE);
        take(&self.file)?;
        while !is_at(&self.file, &self.path)? {
            let caught_up = self.catch_up();
            flock(&self.file, FlockOperation::Unlock)?;
            caught_up?;
            let next = open(&self.path)?;
            if disk::identity(&next.metadata()?) != disk::identity(&self.file.metadata()?) {
                (self.file, self.length) = (next, 0);
            }
            take(&self.file)?;
        }
        Ok(())
    }

    /// Another process may have added lines, or ended in the middle of one. A file that does not hold what we know of
    /// it is not believed: the chain goes on from our own head, and says so.
    fn catch_up(&mut self) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length == 0 && self.head == Head::default() {
            // A new file after one that was put aside: the chain is older than this process.
            self.head = head_of_part_before(&self.path)?.unwrap_or_default();
        } else if length == 0 && self.length == 0 && is_put_aside(&self.path, &self.head) {
            // Others may have put more aside after it.
            if let Some(newest) = head_of_part_before(&self.path)?.filter(|newest| newest.seq > self.head.seq) {
                self.head = newest;
            }
        }
        if length == self.length {
            return Ok(());
        }
        let (whole, last) = last_line(&self.file, length)?;
        if whole < length {
            tracing::warn!(file = %self.path.display(), "the audit log ended within a line, which is removed");
            self.file.set_len(whole)?;
        }
        match last {
            _ if !self.goes_on(whole)? => self.lose_head(),
            Some(last) => self.head = head_of(&last)?,
            None => (),
        }
        self.length = whole;
        Ok(())
    }

    /// Whether so much of the file is what we know of it, and what may follow that.
    fn goes_on(&self, whole: u64) -> io::Result<bool> {
        match self.length {
            _ if self.head == Head::default() => Ok(true),
            // Another file, which may be without lines as yet, or the second one after ours.
            0 if whole == 0 => Ok(true),
            0 => {
                let first = first_line(&self.file)?;
                let is_later = Head::at(&first).is_ok_and(|first| first.seq > self.head.seq);
                Ok(self.head.precedes(&first) || is_later && is_put_aside(&self.path, &self.head))
            }
            length if whole < length => Ok(false),
            length => {
                let (end, last) = last_line(&self.file, length)?;
                let is_head = |last: Vec<u8>| Head::at(&last).is_ok_and(|head| head == self.head);
                Ok(end == length && last.is_some_and(is_head))
            }
        }
    }

    fn lose_head(&mut self) {
        let (Head { seq, hash }, file) = (&self.head, self.path.display());
        let what = "the head of the audit log is no longer in it: it was cut off or written anew; the chain goes on \
                    from that head";
        tracing::error!(seq, hash, %file, "{what}");
        self.gone.get_or_insert_with(|| self.head.clone());
    }

    /// Puts the file aside. One that cannot be, in a directory that is read-only say, takes lines as before: a log that
    /// is too large is better than none.
    fn is_free_to_go(&mut self) -> bool {
        if self.stuck.is_some_and(|(since, _)| since.elapsed() < PUT_ASIDE_AGAIN) {
            return false;
        }
        let Err(error) = self.put_aside() else {
            self.stuck = None;
            return true;
        };
        let tries = self.stuck.map_or(1, |(_, tries)| tries + 1);
        self.stuck = Some((Instant::now(), tries));
        let file = self.path.display();
        tracing::error!(%file, %error, tries, bytes = self.length, "the audit log cannot be put aside, and grows");
        false
    }

    /// Under the name of the log and the number of its last line.
    fn put_aside(&self) -> io::Result<()> {
        self.file.sync_data()?;
        // Nothing is ever overwritten.
        Ok(renameat_with(CWD, &self.path, CWD, aside(&self.path, &self.head), RenameFlags::NOREPLACE)?)
    }

    /// The old file's lock goes with it: others may be in the new one first, and put it aside as well.
    fn begin_another(&mut self) -> io::Result<()> {
        (self.file, self.length) = (open(&self.path)?, 0);
        self.lock()?;
        self.catch_up()
    }
}

/// A plain file of the directory's owner, which the command line of root shares with the daemon.
fn open(path: &Path) -> io::Result<File> {
    let file = open_plain(path, OpenOptions::new().read(true).append(true).create(true).mode(0o600))?;
    let metadata = file.metadata()?;
    if let Some(directory) = path.parent().map(fs::metadata).transpose()?
        && rustix::process::geteuid().is_root()
        && metadata.uid() != directory.uid()
    {
        std::os::unix::fs::fchown(&file, Some(directory.uid()), Some(directory.gid()))?;
    }
    Ok(file)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {

    use super::super::chain::Verifier;
    use super::super::parts::parts;
    use super::*;

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
        let config = AuditConfig::of_test(directory.path(), 1 << 20);
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
    fn a_file_in_the_place_of_the_log_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let config = AuditConfig::of_test(directory.path(), 1 << 20);
        let mut log = LogFile::open(&config).unwrap();
        log.append(0, &[Event::now("encrypt"), Event::now("decrypt")]).unwrap();
        let head = log.head().clone();
        let first = fs::read_to_string(&config.file).unwrap().lines().next().unwrap().to_owned() + "\n";
        fs::remove_file(&config.file).unwrap();
        fs::write(&config.file, &first).unwrap();
        assert!(log.append(0, &[Event::now("encrypt")]).unwrap());
        let text = fs::read_to_string(&config.file).unwrap();
        let told = text.lines().nth(1).unwrap();
        assert!(told.contains("\"rewritten\"") && told.contains(&format!("\"prev\":\"{}\"", head.hash)), "{text}");
        assert!(!log.append(0, &[Event::now("encrypt")]).unwrap());
        let events = fs::read_to_string(&config.file).unwrap().matches("rewritten").count();
        assert_eq!((events, log.head().seq), (1, head.seq + 3), "it is told once");
    }

    #[test]
    fn a_file_that_is_large_is_put_aside_and_nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let config = AuditConfig::of_test(directory.path(), 1);
        for _ in 0..3 {
            let mut log = LogFile::open(&config).unwrap();
            log.append(0, &[Event::now("encrypt"), Event::now("decrypt")]).unwrap();
        }
        assert_eq!((parts(&config.file).unwrap().len(), whole(&config)), (3, 6));
    }

    #[test]
    fn a_file_that_cannot_be_put_aside_takes_lines_until_it_can() {
        let directory = tempfile::tempdir().unwrap();
        let config = AuditConfig::of_test(directory.path(), 1);
        let mut log = LogFile::open(&config).unwrap();
        log.append(0, &[Event::now("encrypt")]).unwrap();
        let in_the_way = directory.path().join("audit.log.000000000001");
        fs::write(&in_the_way, "somebody's").unwrap();
        log.append(0, &[Event::now("encrypt")]).unwrap();
        log.append(0, &[Event::now("encrypt")]).unwrap();
        assert_eq!(fs::read(&in_the_way).unwrap(), b"somebody's");
        fs::remove_file(&in_the_way).unwrap();
        assert_eq!((parts(&config.file).unwrap().len(), whole(&config)), (1, 3));
        log.stuck = None; // a minute later
        log.append(0, &[Event::now("encrypt")]).unwrap();
        assert_eq!((parts(&config.file).unwrap().len(), whole(&config)), (2, 4));
    }

    #[test]
    fn what_a_crash_left_of_a_line_is_removed() {
        for torn in ["{\"seq\":3", &"\0".repeat(100_000)] {
            let directory = tempfile::tempdir().unwrap();
            let config = AuditConfig::of_test(directory.path(), 1 << 20);
            LogFile::open(&config).unwrap().append(0, &[Event::now("encrypt"), Event::now("decrypt")]).unwrap();
            OpenOptions::new().append(true).open(&config.file).unwrap().write_all(torn.as_bytes()).unwrap();
            LogFile::open(&config).unwrap().append(7, &[Event::now("encrypt")]).unwrap();
            assert_eq!(whole(&config), 4, "and a line for the gap");
        }
    }
}
