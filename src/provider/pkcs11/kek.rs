//! A KEK in tokens that are replicas of each other: which of them is asked, and when another one is asked as well.

use std::future::Future;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::select_all;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

use super::admission::KekSpec;
use super::error::CallError;
use super::lane::Lane;
use super::token::Token;
use super::wraps::WrapCounter;
use crate::envelope::WrapAlgorithm;
use crate::identity::Identity;
use crate::provider::{Answer, Attributes, Holder, Kek, KekError, Rank};
use crate::secret::Dek;
use crate::sync::read;

/// How long a request waits for a token that was lost only now: less than the API server's own patience.
const COMING_BACK: Duration = Duration::from_millis(2000);

/// A KEK and the tokens that hold it.
pub(super) struct Pkcs11Kek {
    pub(super) spec: Arc<KekSpec>,
    pub(super) rank: Rank,
    pub(super) wraps: Arc<WrapCounter>,
    pub(super) places: RwLock<Places>,
}

/// Where a KEK is, as of the last look.
#[derive(Default)]
pub(super) struct Places {
    /// The tokens that hold it, each with what it says of it.
    pub(super) holders: Vec<(Arc<Token>, Attributes)>,
    /// Those within reach that do not.
    pub(super) lacking: Vec<Arc<Token>>,
}

impl Pkcs11Kek {
    pub(super) fn holders(&self) -> Vec<Arc<Token>> {
        read(&self.places).holders.iter().map(|(token, _)| Arc::clone(token)).collect()
    }

    /// Has a token do `work`. When all are out of reach, but one was lost only now and is being connected to again, it
    /// is waited for, and all are asked once more.
    async fn first_of<T, W>(&self, deadline: Instant, work: W) -> Result<T, KekError>
    where
        T: Send + 'static,
        W: Fn(&mut Lane, &KekSpec) -> Result<T, CallError> + Clone + Send + 'static,
    {
        let answer = self.ask(deadline, work.clone()).await;
        if !matches!(answer, Err(KekError::Unavailable(_))) {
            return answer;
        }
        let holders = self.holders();
        let first_attempts: Vec<_> = holders
            .iter()
            .filter(|token| token.link.is_connecting())
            .map(|token| Box::pin(token.link.first_attempt()))
            .collect();
        let patience = COMING_BACK.min(deadline.saturating_duration_since(Instant::now()));
        if !first_attempts.is_empty() && timeout(patience, select_all(first_attempts)).await.is_err() {
            return answer;
        }
        // It may have come back already.
        if holders.iter().all(|token| token.link.check().is_err()) { answer } else { self.ask(deadline, work).await }
    }

    /// Asks the first token that is well and does not lag. When that does not answer in the time that it should, or
    /// cannot, the next one is asked as well, and whichever answers first has answered.
    async fn ask<T, W>(&self, deadline: Instant, work: W) -> Result<T, KekError>
    where
        T: Send + 'static,
        W: Fn(&mut Lane, &KekSpec) -> Result<T, CallError> + Clone + Send + 'static,
    {
        let holders = in_order(self.holders());
        let mut last = None;
        let mut asked = FuturesUnordered::new();
        let mut holders = holders.iter().peekable();
        while let Some(token) = holders.next() {
            let (work, spec) = (work.clone(), Arc::clone(&self.spec));
            asked.push(token.call(deadline, move |lane| work(lane, &spec)));
            let patience = holders.peek().map(|_| token.patience());
            while let Some(answer) = in_time(patience, asked.next()).await {
                match answer {
                    Err(error) if error.may_be_its_tokens_alone() => {
                        // A token where the KEK has just proved itself is the better witness.
                        last = last.filter(|last| matches!(last, KekError::OfOneValue(_))).or(Some(error));
                    }
                    answer => return answer,
                }
                if patience.is_some() {
                    break; // the next one, at once
                }
            }
        }
        Err(last.unwrap_or_else(|| KekError::Unavailable(format!("no token holds KEK {}", self.spec.identity))))
    }
}

/// The tokens in the order in which they are asked: as they are configured, but that one that is sick comes last, and
/// one that lags comes after those that do not.
fn in_order(mut holders: Vec<Arc<Token>>) -> Vec<Arc<Token>> {
    if holders.len() > 1 {
        let well = holders.iter().filter(|token| !token.is_sick());
        let quickest = well.map(|token| token.average()).min().unwrap_or_default();
        holders.sort_by_cached_key(|token| (token.is_sick(), token.lags(quickest)));
    }
    holders
}

/// A wrap that has proved to open again. It is counted on the thread that has the session, since that may write to the disk.
pub(super) fn counted_wrap(
    lane: &mut Lane,
    spec: &KekSpec,
    wraps: &Arc<WrapCounter>,
    dek: &Dek,
) -> Result<Vec<u8>, CallError> {
    wraps.count()?;
    lane.wrap(spec, dek)
}

/// What comes within this time, if there is a limit.
async fn in_time<T>(limit: Option<Duration>, answer: impl Future<Output = Option<T>>) -> Option<T> {
    match limit {
        Some(limit) => timeout(limit, answer).await.ok().flatten(),
        None => answer.await,
    }
}

impl Kek for Pkcs11Kek {
    fn identity(&self) -> Identity {
        self.spec.identity
    }

    fn rank(&self) -> &Rank {
        &self.rank
    }

    fn algorithm(&self) -> WrapAlgorithm {
        self.spec.algorithm()
    }

    fn mode(&self) -> &'static str {
        self.spec.mode.as_str()
    }

    fn held_by(&self) -> Vec<Holder> {
        let of = |(token, attributes): &(Arc<Token>, Attributes)| Holder {
            name: token.uri().to_string(),
            attributes: attributes.clone(),
        };
        read(&self.places).holders.iter().map(of).collect()
    }

    fn lacked_by(&self) -> Vec<String> {
        read(&self.places).lacking.iter().map(|token| token.uri().to_string()).collect()
    }

    fn check(&self) -> Result<(), KekError> {
        let mut last = Ok(());
        for token in self.holders() {
            last = token.check();
            if last.is_ok() {
                break;
            }
        }
        last
    }

    fn wrap_dek(&self, dek: Arc<Dek>, deadline: Instant) -> Answer<'_, Vec<u8>> {
        let wraps = Arc::clone(&self.wraps);
        Box::pin(self.first_of(deadline, move |lane, spec| counted_wrap(lane, spec, &wraps, &dek)))
    }

    fn unwrap_dek(&self, wrapped: &[u8], deadline: Instant) -> Answer<'_, Dek> {
        let wrapped = wrapped.to_vec();
        Box::pin(self.first_of(deadline, move |lane, spec| lane.unwrap(spec, &wrapped)))
    }
}
