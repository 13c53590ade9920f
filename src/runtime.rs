//! The async runtime of the daemon, and the two threads that take turns at driving it (the Leader/Followers pattern of
//! POSA2).
//!
//! A quick token answers sooner than a thread is woken. So the thread that drives the runtime, the *leader*, makes such
//! calls itself: it steps out of the runtime, makes the call, and steps back in with the answer. A call that then takes
//! long after all holds nobody up for long: the other thread, the *follower*, sees it, and leads from there on; whoever
//! is late follows in its turn. Without a follower no call is made so.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::mem;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use crate::sync::lock;

/// A call that takes longer than one to two of these makes the follower lead.
const TICK: Duration = Duration::from_millis(5);

/// A quick blocking call that the leader may make.
pub trait Errand: Send + Sync {
    /// Makes it, outside the runtime. `None`: somebody else has.
    fn run(&self) -> Option<Box<dyn Deliver>>;

    /// It is not as quick as it was thought, or cannot be made now: somebody else must do what is left to do.
    fn pass_on(&self);
}

/// The answer to an errand.
pub trait Deliver: Send {
    /// Wakes whoever waits for it.
    fn deliver(self: Box<Self>);
}

/// Gives errands to the leader. Clones are of one runtime; the default is of none, and takes no errands.
#[derive(Clone, Default)]
pub struct Leader(Option<Arc<Shared>>);

impl Leader {
    /// Has the leader run an errand, after what it is about now. Returns whether it will, or pass it on.
    pub fn send(&self, errand: Arc<dyn Errand>) -> bool {
        let Some(shared) = &self.0 else { return false };
        let mut turns = lock(&shared.turns);
        if matches!(turns.follower, Follower::Away) || turns.ended {
            return false;
        }
        turns.errands.push_back(errand);
        drop(turns);
        shared.sent.notify_one();
        true
    }
}

struct Shared {
    turns: Mutex<Turns>,
    /// Wakes the leader, inside the runtime.
    sent: Notify,
    /// Wakes the follower, and whoever is to be it.
    changed: Condvar,
}

#[derive(Default)]
struct Turns {
    errands: VecDeque<Arc<dyn Errand>>,
    /// Of errands that were run, and to be delivered within the runtime.
    answers: Vec<Box<dyn Deliver>>,
    /// Which thread leads.
    leader: usize,
    /// How many errands were begun, and the one that the leader is about.
    begun: u64,
    running: Option<Arc<dyn Errand>>,
    follower: Follower,
    ended: bool,
}

#[derive(Default)]
enum Follower {
    /// It has not begun yet, or is held up by the call for which it was relieved.
    #[default]
    Away,
    /// Nothing has been begun for a while; the next errand wakes it.
    Asleep,
    Watching,
}

/// Runs `work`, and what it spawns, until it ends.
///
/// # Errors
/// The operating system gives no thread, or no file for epoll(7).
pub fn run<T, W>(work: impl FnOnce(Leader) -> W) -> io::Result<T>
where
    T: Send + 'static,
    W: Future<Output = T> + Send + 'static,
{
    let runtime = Arc::new(Builder::new_current_thread().enable_all().build()?);
    let shared = Arc::new(Shared { turns: Mutex::default(), sent: Notify::new(), changed: Condvar::new() });
    let (answer, answered) = mpsc::channel();
    let work = work(Leader(Some(Arc::clone(&shared))));
    let end = Arc::clone(&shared);
    runtime.spawn(async move {
        let _main_thread_waits = answer.send(work.await);
        end.end();
    });
    let (left, leader_left) = mpsc::channel();
    for me in 0..2 {
        let (runtime, shared, left) = (Arc::downgrade(&runtime), Arc::clone(&shared), left.clone());
        thread::Builder::new().name(format!("async-{me}")).spawn(move || shared.take_turns(me, &runtime, &left))?;
    }
    let answer = answered.recv().map_err(io::Error::other)?;
    // Now nobody drives the runtime. What is left of it is dropped here; a thread whose call hangs has no hold on it.
    leader_left.recv().map_err(io::Error::other)?;
    Ok(answer)
}

impl Shared {
    fn take_turns(&self, me: usize, runtime: &Weak<Runtime>, left: &Sender<()>) {
        loop {
            let ended = if lock(&self.turns).leader == me { self.lead(me, runtime, left) } else { self.follow(me) };
            if ended {
                return;
            }
        }
    }

    /// Drives the runtime and makes quick calls, until it is relieved or all ends. Returns whether all has ended.
    fn lead(&self, me: usize, runtime: &Weak<Runtime>, left: &Sender<()>) -> bool {
        loop {
            let next = runtime.upgrade().and_then(|runtime| runtime.block_on(self.next()));
            let Some(mut errand) = next else {
                let _main_thread_waits = left.send(());
                return true;
            };
            loop {
                self.begin(&errand);
                let answer = errand.run();
                match self.end_of_errand(me, answer) {
                    Turn::Goes(Some(next)) => errand = next,
                    Turn::Goes(None) => break,
                    Turn::Over => return false,
                }
            }
        }
    }

    /// Delivers the answers, which within the runtime wakes tasks without a system call, and waits for the next errand.
    /// `None` at the end.
    async fn next(&self) -> Option<Arc<dyn Errand>> {
        loop {
            let (answers, errand, ended) = {
                let mut turns = lock(&self.turns);
                (mem::take(&mut turns.answers), turns.errands.pop_front(), turns.ended)
            };
            answers.into_iter().for_each(Deliver::deliver);
            if ended || errand.is_some() {
                return errand.filter(|_| !ended);
            }
            self.sent.notified().await;
        }
    }

    fn begin(&self, errand: &Arc<dyn Errand>) {
        let mut turns = lock(&self.turns);
        turns.begun += 1;
        turns.running = Some(Arc::clone(errand));
        if matches!(turns.follower, Follower::Asleep) {
            turns.follower = Follower::Watching;
            self.changed.notify_all();
        }
    }

    fn end_of_errand(&self, me: usize, answer: Option<Box<dyn Deliver>>) -> Turn {
        let mut turns = lock(&self.turns);
        if turns.leader != me {
            drop(turns);
            answer.into_iter().for_each(Deliver::deliver);
            return Turn::Over;
        }
        turns.answers.extend(answer);
        turns.running = None;
        Turn::Goes(turns.errands.pop_front())
    }

    /// Watches the leader, until it is held up or all ends. Returns whether all has ended.
    fn follow(&self, me: usize) -> bool {
        let mut turns = lock(&self.turns);
        turns.follower = Follower::Watching;
        loop {
            if turns.ended {
                return true;
            }
            let seen = turns.begun;
            if !matches!(turns.follower, Follower::Watching) {
                turns = self.changed.wait(turns).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (guard, tick) = self.changed.wait_timeout(turns, TICK).unwrap_or_else(PoisonError::into_inner);
            turns = guard;
            if turns.begun != seen || !tick.timed_out() {
                continue;
            }
            let Some(held_up_by) = turns.running.take() else {
                turns.follower = Follower::Asleep;
                continue;
            };
            turns.leader = me;
            turns.follower = Follower::Away;
            let left: Vec<_> = turns.errands.drain(..).collect();
            drop(turns);
            held_up_by.pass_on();
            left.iter().for_each(|errand| errand.pass_on());
            return false;
        }
    }

    fn end(&self) {
        lock(&self.turns).ended = true;
        self.sent.notify_one();
        self.changed.notify_all();
    }
}

enum Turn {
    /// On, with this errand or back into the runtime.
    Goes(Option<Arc<dyn Errand>>),
    /// Another thread leads now.
    Over,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::thread::ThreadId;

    use tokio::sync::oneshot;

    use super::*;

    /// One blocking call: it says on which thread it runs, once it is let go.
    struct Call {
        go: Mutex<Receiver<()>>,
        answer: Mutex<Option<oneshot::Sender<ThreadId>>>,
        passed_on: SyncSender<()>,
    }

    struct Answer(oneshot::Sender<ThreadId>, ThreadId);

    impl Errand for Call {
        fn run(&self) -> Option<Box<dyn Deliver>> {
            lock(&self.go).recv().unwrap();
            Some(Box::new(Answer(lock(&self.answer).take()?, thread::current().id())))
        }

        fn pass_on(&self) {
            let _nobody_waits = self.passed_on.send(());
        }
    }

    impl Deliver for Answer {
        fn deliver(self: Box<Self>) {
            let _nobody_waits = self.0.send(self.1);
        }
    }

    /// A call, what lets it go, its answer, and whether it was passed on.
    fn call() -> (Arc<Call>, SyncSender<()>, oneshot::Receiver<ThreadId>, Receiver<()>) {
        let (go, gone) = sync_channel(1);
        let (answer, answered) = oneshot::channel();
        let (passed_on, was_passed_on) = sync_channel(1);
        let call = Call { go: Mutex::new(gone), answer: Mutex::new(Some(answer)), passed_on };
        (Arc::new(call), go, answered, was_passed_on)
    }

    /// Sends a call as soon as somebody follows.
    async fn send(leader: &Leader, errand: &Arc<Call>) {
        while !leader.send(Arc::clone(errand) as Arc<dyn Errand>) {
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn quick_calls_are_made_by_the_thread_that_drives() {
        let work = |leader: Leader| async move {
            for _ in 0..1_000 {
                let (errand, go, answered, _) = call();
                go.send(()).unwrap();
                send(&leader, &errand).await;
                answered.await.unwrap();
            }
        };
        run(work).unwrap();
    }

    #[test]
    fn a_call_that_hangs_holds_up_itself_alone_and_is_answered_in_the_end() {
        let work = |leader: Leader| async move {
            for _ in 0..3 {
                let (hanging, go, answered, passed_on) = call();
                send(&leader, &hanging).await;
                tokio::time::sleep(Duration::from_millis(1)).await; // only once another thread leads
                let now_leads = thread::current().id();
                assert!(passed_on.recv().is_ok(), "its token is called quick no more");
                let (refused, ..) = call();
                assert!(!leader.send(refused), "nobody follows");
                go.send(()).unwrap();
                assert_ne!(answered.await.unwrap(), now_leads);
            }
        };
        run(work).unwrap();
    }

    #[test]
    fn what_waits_behind_a_call_that_hangs_is_passed_on() {
        let work = |leader: Leader| async move {
            let (hanging, go, ..) = call();
            let (waiting, _go, _answered, passed_on) = call();
            send(&leader, &hanging).await;
            assert!(leader.send(waiting));
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert!(passed_on.recv().is_ok());
            go.send(()).unwrap();
        };
        run(work).unwrap();
    }

    #[test]
    fn what_was_answered_before_a_call_that_hangs_is_delivered() {
        let work = |leader: Leader| async move {
            let (quick, go_quick, answered, _) = call();
            let (hanging, go, ..) = call();
            go_quick.send(()).unwrap();
            send(&leader, &quick).await;
            assert!(leader.send(hanging));
            answered.await.unwrap();
            go.send(()).unwrap();
        };
        run(work).unwrap();
    }

    #[test]
    fn the_end_does_not_wait_for_a_call_that_hangs() {
        let (hanging, go, ..) = call();
        let errand = Arc::clone(&hanging);
        let work = |leader: Leader| async move {
            send(&leader, &errand).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
            7
        };
        assert_eq!(run(work).unwrap(), 7);
        go.send(()).unwrap();
    }
}
