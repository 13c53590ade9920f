//! A peer that keeps its connection, as the API server does, and load by many of them.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use trousseau::service::client::{Client, ClientError, PluginStatus};

use crate::secrets;

/// The service answers after three seconds, the deadline that it gives a request; who waits longer sees that it did not.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Caller {
    runtime: Runtime,
    socket: PathBuf,
    client: Option<Client>,
    /// Requests that were made again, since the connection had been closed.
    pub again: usize,
}

impl Caller {
    pub fn new(socket: &Path) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, socket: socket.to_owned(), client: None, again: 0 }
    }

    pub fn status(&mut self) -> Result<PluginStatus, ClientError> {
        self.call(async |client| client.status().await)
    }

    pub fn encrypt(&mut self, plaintext: &[u8]) -> Result<(Vec<u8>, String), ClientError> {
        self.call(async |client| client.encrypt(plaintext.to_vec()).await)
    }

    pub fn decrypt(&mut self, ciphertext: &[u8], key_id: &str) -> Result<Vec<u8>, ClientError> {
        self.call(async |client| client.decrypt(ciphertext.to_vec(), key_id.to_owned()).await)
    }

    /// Once more, on a new connection, if the service has closed the one that there was.
    fn call<T>(&mut self, call: impl AsyncFn(&mut Client) -> Result<T, ClientError>) -> Result<T, ClientError> {
        let answer = self.call_once(&call);
        if !matches!(answer, Err(ClientError::Closed(_) | ClientError::Unreachable(..))) {
            return answer;
        }
        self.client = None;
        self.again += 1;
        self.call_once(&call)
    }

    fn call_once<T>(&mut self, call: impl AsyncFn(&mut Client) -> Result<T, ClientError>) -> Result<T, ClientError> {
        let Self { runtime, socket, client, .. } = self;
        runtime.block_on(async {
            let mut connected = match client.take() {
                Some(client) => client,
                None => Client::connect(socket, PATIENCE).await?,
            };
            let answer = call(&mut connected).await;
            if let Err(error) = &answer {
                secrets::assert_shows_none(&error.to_string());
            }
            *client = Some(connected);
            answer
        })
    }
}

/// Ends what goes on until this is true. A test that fails drops it too, and its scope need not wait for ever.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A round trip, an Encrypt and a Decrypt, of a [`Load`].
#[derive(Debug)]
pub struct Request {
    pub at: Instant,
    pub took: Duration,
    pub outcome: Result<(), ClientError>,
}

/// Round trips, until it is ended.
pub struct Load<'scope> {
    threads: Vec<ScopedJoinHandle<'scope, ()>>,
    done: &'scope Mutex<Vec<Request>>,
    ends: Ends<'scope>,
}

impl<'scope> Load<'scope> {
    /// Begins with so many callers. `done` and `ends` are as new.
    pub fn begin(
        scope: &'scope Scope<'scope, '_>,
        (done, ends): &'scope (Mutex<Vec<Request>>, AtomicBool),
        socket: &'scope Path,
        callers: usize,
    ) -> Self {
        secrets::used(SEED);
        let work = move || {
            let mut caller = Caller::new(socket);
            while !ends.load(Ordering::Relaxed) {
                let at = Instant::now();
                let outcome = round_trip(&mut caller);
                done.lock().unwrap().push(Request { at, took: at.elapsed(), outcome });
            }
            assert_eq!(caller.again, 0, "the service closed a connection");
        };
        Self { threads: (0..callers).map(|_| scope.spawn(work)).collect(), done, ends: Ends(ends) }
    }

    /// Waits until so many more are done.
    pub fn goes_on(&self, count: usize) {
        self.reaches(self.count() + count);
    }

    /// Waits until so many are done.
    pub fn reaches(&self, goal: usize) {
        let (mut done, mut last) = (self.count(), Instant::now());
        while done < goal {
            assert!(last.elapsed() < PATIENCE, "no more answers come");
            thread::sleep(Duration::from_millis(5));
            let now = self.count();
            if now > done {
                (done, last) = (now, Instant::now());
            }
        }
    }

    pub fn last_succeeded(&self) -> bool {
        self.done.lock().unwrap().last().is_some_and(|request| request.outcome.is_ok())
    }

    fn count(&self) -> usize {
        self.done.lock().unwrap().len()
    }

    /// Waits for the last answers.
    pub fn end(self) -> Vec<Request> {
        drop(self.ends);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        std::mem::take(&mut self.done.lock().unwrap())
    }
}

/// What a [`Load`] has encrypted.
const SEED: &[u8] = b"thirty-two bytes of a fresh seed";

fn round_trip(caller: &mut Caller) -> Result<(), ClientError> {
    let (ciphertext, key_id) = caller.encrypt(SEED)?;
    assert_eq!(caller.decrypt(&ciphertext, &key_id)?, SEED);
    Ok(())
}
