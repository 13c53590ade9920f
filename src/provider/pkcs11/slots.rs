//! What the tokens in a module's slots say of themselves, although one of them may not answer.
//!
//! Behind some modules each slot is a device of its own, and C_GetTokenInfo goes to it: one that hangs must not keep the
//! others' tokens away. So each slot is asked by a thread of its own, one after another, and one that takes too long is
//! gone without, until its answer comes after all.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use cryptoki::slot::{Slot, TokenInfo};

use super::error::CallError;
use super::module::InUse;
use crate::sync::lock;

/// How long a slot may take to answer. The others' tokens wait as long for it, once.
const PATIENCE: Duration = Duration::from_secs(1);

type Answer = Result<TokenInfo, CallError>;

/// The slots that have not answered, by number, and where their answers will come: one thread waits in each.
#[derive(Default)]
pub(super) struct Slots(Mutex<BTreeMap<u64, Receiver<(Instant, Answer)>>>);

impl Slots {
    /// Asks every slot with a token. `None`: it does not answer.
    ///
    /// # Errors
    /// The module does not say which slots there are, or the operating system gives no thread.
    pub(super) fn ask(&self, in_use: &InUse) -> Result<Vec<(Slot, Option<Answer>)>, String> {
        let slots = in_use.library().get_slots_with_token().map_err(|error| CallError::from(error).to_string())?;
        // Held all the time: a slot that another one of us is asking is not one that does not answer.
        let mut silent = lock(&self.0);
        let mut said = Vec::with_capacity(slots.len());
        for slot in slots {
            let late = silent.remove(&slot.id()).map(|asked| (asked.recv_timeout(Duration::ZERO), asked));
            let (answer, asked) = match late {
                // An answer that nobody came for may be of a token that is in the slot no more.
                Some((answer, asked)) if answer.as_ref().map_or(true, |(at, _)| at.elapsed() < PATIENCE) => {
                    (answer, asked)
                }
                _ => {
                    let asked = start(in_use.clone(), slot).map_err(|error| format!("no thread: {error}"))?;
                    (asked.recv_timeout(PATIENCE), asked)
                }
            };
            if answer.is_err() {
                silent.insert(slot.id(), asked);
            }
            said.push((slot, answer.ok().map(|(_, said)| said)));
        }
        Ok(said)
    }
}

/// A thread that asks the slot. When its answer is there, with its instant, it has let the library go.
fn start(in_use: InUse, slot: Slot) -> io::Result<Receiver<(Instant, Answer)>> {
    let (answer, answers) = mpsc::channel();
    let ask = move || {
        let said = in_use.token_info(slot);
        drop(in_use);
        let _the_end = answer.send((Instant::now(), said));
    };
    thread::Builder::new().name("slot".into()).spawn(ask)?;
    Ok(answers)
}
