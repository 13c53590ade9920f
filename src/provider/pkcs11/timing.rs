//! How long a token takes, without pool, queue and service: what these are measured against.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::Pkcs11;
use super::error::CallError;
use super::kek::counted_wrap;
use super::lane::Lane;
use crate::provider::KekError;
use crate::secret::Dek;

/// How long a token is waited for that is being connected to anew, because its module leaks or it was lost.
const RETURN: Duration = Duration::from_secs(5);

/// What a token does for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Wrapping a DEK and unwrapping it again, for Encrypt.
    Wrap,
    /// Unwrapping it, for Decrypt.
    Unwrap,
}

impl Pkcs11 {
    /// Has so many sessions of the first token work at a time, one operation after the other with the highest KEK that
    /// was seen. Returns what each operation took, and blocks for so long. The sessions are its own: the pool is idle.
    ///
    /// # Errors
    /// The token is out of reach, has no KEK, or does not give so many sessions.
    pub fn time(&self, operation: Operation, sessions: usize, time: Duration) -> Result<Vec<Vec<Duration>>, KekError> {
        let refused = |what: &str| KekError::Refused(format!("provider {}: {what}", self.name));
        let highest = self.keks().values().max_by_key(|kek| kek.rank.clone()).cloned();
        let kek = highest.ok_or_else(|| refused("it has no KEK"))?;
        let holders = kek.holders();
        let token = holders.first().ok_or_else(|| refused("no token holds its KEK"))?;
        token.link.wait_until_up(RETURN)?;
        let connected = token.link.connected().ok_or_else(|| refused("its token was lost"))?;
        let failed = |error: CallError| error.to_kek_error(error.class(&connected.profile.errors), &token.link.name);
        let dek = Dek::generate().map_err(|error| failed(error.into()))?;
        // Each session finds the KEK now, not in the time that is measured.
        let ready = (0..sessions).map(|_| {
            let mut lane = Lane::open(Arc::clone(&connected), Arc::clone(&self.state))?;
            let wrapped = counted_wrap(&mut lane, &kek.spec, &kek.wraps, &dek)?;
            Ok((lane, wrapped))
        });
        let ready: Vec<(Lane, Vec<u8>)> = ready.collect::<Result<_, _>>().map_err(failed)?;
        let end = Instant::now() + time;
        let timed: Result<_, CallError> = thread::scope(|scope| {
            let spawn = |(mut lane, wrapped): (Lane, Vec<u8>)| {
                let (kek, dek) = (&kek, &dek);
                scope.spawn(move || {
                    repeat(end, || match operation {
                        Operation::Wrap => counted_wrap(&mut lane, &kek.spec, &kek.wraps, dek).map(drop),
                        Operation::Unwrap => lane.unwrap(&kek.spec, &wrapped).map(drop),
                    })
                })
            };
            let threads: Vec<_> = ready.into_iter().map(spawn).collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        timed.map_err(failed)
    }
}

fn repeat(end: Instant, mut call: impl FnMut() -> Result<(), CallError>) -> Result<Vec<Duration>, CallError> {
    let mut took = Vec::new();
    let mut began = Instant::now();
    while began < end {
        call()?;
        let now = Instant::now();
        took.push(now - began);
        began = now;
    }
    Ok(took)
}
