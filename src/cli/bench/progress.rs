//! A line on a terminal that says how far a measurement is.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const REDRAW: Duration = Duration::from_millis(250);
const BAR: u128 = 24;

/// Draws it until this is dropped. Where standard error is no terminal, it draws nothing.
pub(super) struct Progress(Option<(Sender<String>, JoinHandle<()>)>);

impl Progress {
    /// Of something that takes so long at most.
    pub(super) fn start(total: Duration) -> Self {
        if !io::stderr().is_terminal() {
            return Self(None);
        }
        let (sender, said) = mpsc::channel::<String>();
        let began = Instant::now();
        let draw = move || {
            let mut what = String::new();
            loop {
                match said.recv_timeout(REDRAW) {
                    Ok(next) => what = next,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                let _nobody_looks = write!(io::stderr(), "\r\x1b[2K{}", line(began.elapsed(), total, &what));
            }
            let _nobody_looks = write!(io::stderr(), "\r\x1b[2K");
        };
        // Without a thread there is no progress to be seen, and the measurement goes on.
        Self(thread::Builder::new().name("progress".into()).spawn(draw).ok().map(|thread| (sender, thread)))
    }

    /// What is being measured from now on.
    pub(super) fn says(&self, what: impl Into<String>) {
        if let Some((sender, _)) = &self.0 {
            let _thread_gone = sender.send(what.into());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.0.take() {
            drop(sender);
            let _line_cleared = thread.join();
        }
    }
}

fn line(elapsed: Duration, total: Duration, what: &str) -> String {
    let of = |whole: u128| (elapsed.as_millis() * whole / total.as_millis().max(1)).min(whole);
    let bar: String = (0..BAR).map(|place| if place < of(BAR) { '█' } else { '░' }).collect();
    format!("{bar} {:>3} %, {} s left: {what}", of(100), total.saturating_sub(elapsed).as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_stays_within_its_bounds() {
        let second = Duration::from_secs(1);
        for (elapsed, total, expected) in [
            (0, 8, "░░░░░░░░░░░░░░░░░░░░░░░░   0 %, 8 s left: x"),
            (2, 8, "██████░░░░░░░░░░░░░░░░░░  25 %, 6 s left: x"),
            (9, 8, "████████████████████████ 100 %, 0 s left: x"),
        ] {
            assert_eq!(line(second * elapsed, second * total, "x"), expected);
        }
    }
}
