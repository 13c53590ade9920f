//! Where KEKs are. A provider finds its KEKs; each [`Kek`] wraps and unwraps DEKs. The rooms below know one kind of
//! service each; the rooms above know only what is said here.

pub mod pkcs11;
pub mod transit;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::envelope::WrapAlgorithm;
use crate::histogram::Histogram;
use crate::identity::Identity;
use crate::legacy::Ciphertext;
use crate::secret::{Dek, Plaintext};
use crate::sync::lock;

/// A boxed future, as the traits here need.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, KekError>> + Send + 'a>>;

/// Where a KEK stands among those of its provider: by activation instant, then by id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// When it may start to wrap.
    pub not_before: Timestamp,
    /// What its provider calls it: CKA_ID under PKCS#11.
    pub id: Vec<u8>,
}

/// One key-encryption key that this process can use.
pub trait Kek: Send + Sync {
    /// Its identity.
    fn identity(&self) -> Identity;

    /// Where it stands among its provider's KEKs.
    fn rank(&self) -> &Rank;

    /// The one algorithm that is pinned to it.
    fn algorithm(&self) -> WrapAlgorithm;

    /// How it wraps, in a word.
    fn mode(&self) -> &'static str;

    /// The tokens that hold it, or whatever else its provider consists of.
    fn held_by(&self) -> Vec<Holder>;

    /// Those within reach that do not, although they should.
    fn lacked_by(&self) -> Vec<String>;

    /// Whether it can be used, as far as is known without asking its provider.
    ///
    /// # Errors
    /// Why not.
    fn check(&self) -> Result<(), KekError>;

    /// Wraps a DEK. The answer has [`WrapAlgorithm::wrapped_len`] bytes.
    fn wrap_dek(&self, dek: Arc<Dek>, deadline: Instant) -> Answer<'_, Vec<u8>>;

    /// Unwraps what [`Kek::wrap_dek`] made.
    fn unwrap_dek(&self, wrapped: &[u8], deadline: Instant) -> Answer<'_, Dek>;
}

/// A token that holds a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// What the configuration calls it.
    pub name: String,
    /// What it says of the KEK.
    pub attributes: Attributes,
}

/// What is said of a key, in order: the name of each property, and its value. What a token does not say is not there.
pub type Attributes = Vec<(&'static str, Value)>;

/// The value of a key's property.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum Value {
    /// Whether it has the property.
    Flag(bool),
    /// Of several names, or none.
    Names(Vec<String>),
    /// Of another kind.
    Text(String),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Names(names) if names.is_empty() => f.write_str("none"),
            Self::Names(names) => f.write_str(&names.join(",")),
            Self::Text(text) => f.write_str(text),
        }
    }
}

/// One entry of the configuration: a service that holds KEKs.
pub trait Provider: Send + Sync {
    /// Its name, for people.
    fn name(&self) -> &str;

    /// The algorithm of its KEKs, whichever it has or may get, that makes the longest recipient.
    fn longest_algorithm(&self) -> WrapAlgorithm;

    /// The command that makes its next KEK, for people.
    fn how_to_rotate(&self) -> String;

    /// The one that makes a KEK where none can be used. `None`: it would not help, and why the others are refused says
    /// what does.
    fn how_to_begin(&self) -> Option<String> {
        Some(self.how_to_rotate())
    }

    /// How often it is asked when nobody else asks.
    fn pace(&self) -> Pace {
        Pace::default()
    }

    /// Returns when the provider can be reached, or it is known that it cannot.
    fn settled(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;

    /// Looks for KEKs. Each one found has proved that it wraps, or unwraps what it once wrapped.
    fn look(&self, deadline: Instant) -> Answer<'_, Sighting>;

    /// How its parts fare, asking none of them.
    fn vitals(&self) -> Vec<Vitals>;

    /// Decrypts what an older plugin had this provider's key encrypt.
    fn decrypt_old(&self, _old: Ciphertext, _deadline: Instant) -> Answer<'_, Plaintext> {
        Box::pin(async { Err(KekError::Refused(format!("provider {} has no Transit key", self.name()))) })
    }

    /// Why only a new process could reach the provider again, if that is so.
    fn hopeless(&self) -> Option<String>;

    /// Returns when the provider has come back, or changed so much, that a [`Provider::look`] is due at once.
    fn changed(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// How a part of a provider fares: a token, or a server.
#[derive(Clone, Debug)]
pub struct Vitals {
    /// What the configuration calls it.
    pub name: String,
    /// Whether it can be used, as far as is known.
    pub is_up: bool,
    /// Whether no login is tried any more until somebody has put something right.
    pub is_latched: bool,
    /// How often it was connected to: once, and once more for each time that it healed.
    pub connections: u64,
    /// How often it was lost, by the class of what was wrong.
    pub losses: Vec<(&'static str, u64)>,
    /// Its sessions, or calls under way, by state.
    pub sessions: Vec<(&'static str, usize)>,
    /// Requests that wait for one.
    pub waiting: usize,
    /// How long requests waited, and how long calls took.
    pub times: Arc<Times>,
}

/// How often something was lost, by the class of what was wrong. Shared by reference between threads.
#[derive(Debug, Default)]
pub(crate) struct Losses(Mutex<BTreeMap<&'static str, u64>>);

impl Losses {
    /// One more.
    pub(crate) fn count(&self, class: &'static str) {
        *lock(&self.0).entry(class).or_default() += 1;
    }

    /// Of each class that there was, how many.
    pub(crate) fn counted(&self) -> Vec<(&'static str, u64)> {
        lock(&self.0).iter().map(|(class, count)| (*class, *count)).collect()
    }
}

/// How long requests waited for a session, and how long their calls took.
#[derive(Debug, Default)]
pub struct Times {
    /// In the queue.
    pub queue: Histogram,
    /// Within the token.
    pub call: Histogram,
}

/// How often a provider is asked when nobody else asks.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Which KEKs it has.
    pub look: Duration,
    /// The same, while nothing can be encrypted.
    pub unwell: Duration,
    /// To wrap and unwrap a value with the active KEK.
    pub probe: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let look = Duration::from_secs(30);
        Self { look, unwell: Duration::from_millis(500), probe: look }
    }
}

/// What a look found.
#[derive(Default)]
pub struct Sighting {
    /// The KEKs that can be used.
    pub keks: Vec<Arc<dyn Kek>>,
    /// Keys under the KEKs' label that are not used, each with its name and the reason.
    pub refused: Vec<Refused>,
    /// Why tokens could not be looked at, while others could.
    pub out_of_reach: Vec<String>,
    /// KEKs for whose history a token does not vouch, each with what excuses that.
    pub exceptions: Vec<String>,
}

/// A key that looks like a KEK and is not one.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Refused {
    /// What the key is called, and where.
    pub key: String,
    /// The identity that it would have, if that can be told.
    pub identity: Option<Identity>,
    /// Why it is not used, and what to do.
    pub reason: String,
    /// Whether another key there has the same name, so that nobody can tell which one is meant.
    pub is_ambiguous: bool,
}

/// Why a KEK, or its provider, did not do what was asked. The texts are for people, and hold nothing secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KekError {
    /// The wrapped DEK is not one that this KEK made. The provider is well.
    #[error("the wrapped data key is damaged")]
    BadInput,
    /// More requests wait than the provider has room for.
    #[error("too many requests wait for {0}")]
    Busy(String),
    /// No answer in time.
    #[error("{0} did not answer in time")]
    Deadline(String),
    /// The provider cannot be reached.
    #[error("{0}")]
    Unavailable(String),
    /// The provider is there, and will not do this however often it is asked.
    #[error("{0}")]
    Refused(String),
    /// The provider says of this one value that it cannot, while it can with others: that tells nothing of the KEK.
    #[error("{0}")]
    OfOneValue(String),
    /// The provider is there, and does not take our word for who we are.
    #[error("{0}")]
    Unauthenticated(String),
    /// The provider is there, knows who we are, and does not let us.
    #[error("{0}")]
    Denied(String),
}

impl KekError {
    /// Whether a replica may do what this one did not.
    fn may_be_its_tokens_alone(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Refused(_) | Self::OfOneValue(_) | Self::Busy(_))
    }
}
