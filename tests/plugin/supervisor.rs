//! What systemd does for the service: it holds the socket, and starts the service anew whenever that has ended.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::plugin::Host;

/// trousseau.service: RestartSec=
const PAUSE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(2);
/// No end is waited for longer.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Supervisor {
    pub socket: PathBuf,
    log: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    child: Mutex<Option<Child>>,
    ends: Mutex<Vec<End>>,
    stops: AtomicBool,
}

/// How and when the service ended.
#[derive(Clone, Copy, Debug)]
pub struct End {
    pub at: Instant,
    pub status: ExitStatus,
}

impl Supervisor {
    /// Starts a command that serves the host's socket.
    pub fn start(host: &Host, serve: &Command) -> Self {
        let socket = host.path("kms.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let log = host.path("log");
        let mut command = inheriting(serve);
        command.stdin(Stdio::from(OwnedFd::from(listener)));
        command.stderr(File::options().append(true).create(true).open(&log).unwrap());
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = Some(thread::spawn(move || theirs.keep_alive(&mut command)));
        Self { socket, log, shared, thread }
    }

    /// The end of the service that comes after the first `count`.
    pub fn end_after(&self, count: usize) -> End {
        let began = Instant::now();
        loop {
            if let Some(end) = self.ends().get(count) {
                return *end;
            }
            assert!(began.elapsed() < PATIENCE, "waited in vain for its end");
            thread::sleep(POLL);
        }
    }

    pub fn ends(&self) -> Vec<End> {
        self.shared.ends.lock().unwrap().clone()
    }

    /// `None` between an end and the next start.
    pub fn pid(&self) -> Option<u32> {
        self.shared.child.lock().unwrap().as_ref().map(Child::id)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.shared.stops.store(true, Ordering::Relaxed);
        if let Some(child) = &*self.shared.child.lock().unwrap() {
            let _ended = kill_process(Pid::from_child(child), Signal::TERM);
        }
        let ended = self.thread.take().map(JoinHandle::join);
        if thread::panicking() {
            eprintln!("the plugin's log:\n{}", self.log());
        } else {
            ended.unwrap().unwrap();
        }
    }
}

impl Shared {
    fn keep_alive(&self, command: &mut Command) {
        loop {
            {
                let mut child = self.child.lock().unwrap();
                if self.stops.load(Ordering::Relaxed) {
                    return;
                }
                *child = Some(command.spawn().unwrap());
            }
            let status = loop {
                let mut child = self.child.lock().unwrap();
                if let Some(status) = child.as_mut().unwrap().try_wait().unwrap() {
                    *child = None;
                    break status;
                }
                drop(child);
                thread::sleep(POLL);
            };
            self.ends.lock().unwrap().push(End { at: Instant::now(), status });
            thread::sleep(PAUSE);
        }
    }
}

/// Has the socket that is its standard input served by a command, as systemd hands it over: as descriptor 3, with the
/// number of the process that it is meant for.
pub fn inheriting(serve: &Command) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", r#"export LISTEN_FDS=1 LISTEN_PID=$$; exec 3<&0 0</dev/null; exec "$@""#, "sh"]);
    command.arg(serve.get_program()).args(serve.get_args());
    for (name, value) in serve.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}
