//! How a keyring learns of KEKs: it looks at its providers again and again, and has each active KEK wrap and unwrap a
//! value while it is at it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{join_all, select_all};
use jiff::Timestamp;

use super::Keyring;
use super::member::Member;
use crate::health::Work;
use crate::identity::Identity;
#[cfg(doc)]
use crate::provider::Pace;
use crate::provider::{Kek, KekError};
use crate::secret::Dek;

/// The least time between two looks, whatever happens.
const BREATH: Duration = Duration::from_millis(100);
/// How often at most an unknown identity makes the keyring look at once.
pub const LOOK_SOON: Duration = Duration::from_secs(5);
/// How long the first look waits for providers that are still being connected to.
const FIRST_CONNECTION: Duration = Duration::from_secs(5);
/// How long a look, and the round trip after it, may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Looks {
    /// When the last one began that has ended.
    began: Option<Instant>,
    /// When the last one ended that an unknown identity had asked for.
    asked_for_ended: Option<Instant>,
    /// When each provider was asked last.
    turns: Vec<Turn>,
}

#[derive(Default)]
struct Turn {
    looked: Option<Instant>,
    /// The active KEK that has proved itself, and when.
    probed: Option<(Identity, Instant)>,
}

impl Keyring {
    /// Looks at each provider again and again, as often as its [`Pace`] says, and at all of them at once when one has
    /// changed. Never returns.
    pub async fn keep_looking(&self) {
        let _settled_or_late = tokio::time::timeout(FIRST_CONNECTION, self.settled()).await;
        let mut at_all = true;
        loop {
            let next = self.look_alone(&mut *self.looks.lock().await, at_all).await;
            self.has_looked.send_replace(true);
            let changed = select_all(self.members.iter().map(|member| member.provider.changed()));
            tokio::time::sleep(BREATH).await;
            at_all = tokio::select! {
                _ = changed => true,
                () = self.health.worsens() => true,
                () = tokio::time::sleep(next) => false,
            };
        }
    }

    /// Returns once the first look has ended: a request that comes while the tokens are being connected to, as after a
    /// restart, waits for that and is not refused.
    pub async fn has_looked(&self) {
        if *self.has_looked.borrow() {
            return;
        }
        drop(self.has_looked.subscribe().wait_for(|has_looked| *has_looked).await);
    }

    /// Looks for KEKs, and has each active one wrap and unwrap a value.
    pub async fn look(&self) {
        self.look_alone(&mut *self.looks.lock().await, true).await;
    }

    /// Looks now, unless that was done a moment ago: whoever sends unknown identities must not keep the tokens busy.
    pub(super) async fn look_at_once(&self) {
        let asked = Instant::now();
        let mut looks = self.looks.lock().await;
        let somebody_just_did = looks.began.is_some_and(|began| began >= asked);
        if !somebody_just_did && looks.asked_for_ended.is_none_or(|ended| ended.elapsed() >= LOOK_SOON) {
            self.look_alone(&mut looks, true).await;
            looks.asked_for_ended = Some(Instant::now());
        }
    }

    /// Looks at all providers, or at those whose time has come, and returns when the next one's will have.
    async fn look_alone(&self, looks: &mut Looks, at_all: bool) -> Duration {
        let began = Instant::now();
        looks.turns.resize_with(self.members.len(), Turn::default);
        let interval = self.interval();
        let is_due = |(member, turn): &(&Member, &mut Turn)| at_all || turn.is_due(interval(member), began);
        let mut due: Vec<(&Member, &mut Turn)> = self.members.iter().zip(&mut looks.turns).filter(is_due).collect();
        join_all(due.iter().map(|(member, _)| self.look_at(member, began + LOOK_TIMEOUT))).await;
        due.iter_mut().for_each(|(_, turn)| turn.looked = Some(began));
        if let Ok(set) = self.active(Timestamp::now()) {
            let deadline = Instant::now() + LOOK_TIMEOUT;
            let mut keks: Vec<&Arc<dyn Kek>> = set.keks.iter().filter_map(|active| active.kek.as_ref().ok()).collect();
            keks.retain(|kek| due.iter_mut().any(|(member, turn)| self.is_to_prove_itself(kek, member, turn)));
            join_all(keks.into_iter().map(|kek| self.round_trip(kek, deadline))).await;
        }
        looks.began = Some(began);
        let interval = self.interval();
        let next = |(member, turn): (&Member, &Turn)| {
            turn.looked.map_or(interval(member), |at| interval(member).saturating_sub(at.elapsed()))
        };
        self.members.iter().zip(&looks.turns).map(next).min().unwrap_or_default()
    }

    /// How often a provider is asked, as things are.
    fn interval(&self) -> impl Fn(&Member) -> Duration {
        let is_well = self.well(Timestamp::now()).is_ok();
        move |member| {
            let pace = member.provider.pace();
            if is_well { pace.look } else { pace.unwell }
        }
    }

    /// Whether a KEK is this provider's, and has not proved itself for a while, or since it failed.
    fn is_to_prove_itself(&self, kek: &Arc<dyn Kek>, member: &Member, turn: &mut Turn) -> bool {
        let identity = kek.identity();
        let lately = |(proved, at): (Identity, Instant)| {
            proved == identity && at.elapsed() + BREATH < member.provider.pace().probe
        };
        let is_to = member.seen().keks.iter().any(|seen| seen.identity() == identity)
            && (self.health.fault_of(identity).is_some() || !turn.probed.is_some_and(lately));
        if is_to {
            turn.probed = Some((identity, Instant::now()));
        }
        is_to
    }

    /// Returns when it is known of every provider whether it can be reached.
    pub async fn settled(&self) {
        join_all(self.members.iter().map(|member| member.provider.settled())).await;
    }

    /// Looks for KEKs, and no more: no KEK becomes active by it.
    pub async fn find_keks(&self) {
        let deadline = Instant::now() + LOOK_TIMEOUT;
        join_all(self.members.iter().map(|member| self.look_at(member, deadline))).await;
    }

    async fn look_at(&self, member: &Member, deadline: Instant) {
        match member.provider.look(deadline).await {
            Ok(sighting) => member.shows(sighting),
            Err(KekError::Busy(_)) => (), // it proves nothing, and the next look is near
            Err(error) => {
                member.is_out_of_reach(&error);
                // Of the active one alone: what is said against another is never taken back.
                if let Ok((active, _)) = self.active_of(member, Timestamp::now()) {
                    self.health.fault(active.identity, &error);
                }
            }
        }
    }

    async fn round_trip(&self, kek: &Arc<dyn Kek>, deadline: Instant) {
        let Ok(dek) = Dek::generate() else { return };
        let wrapped = kek.wrap_dek(Arc::new(dek), deadline).await;
        self.note(kek, Work::Wrap, &wrapped);
        let Ok(wrapped) = wrapped else { return };
        let unwrapped = kek.unwrap_dek(&wrapped, deadline).await;
        self.note(kek, Work::Unwrap, &unwrapped);
        if unwrapped.is_ok() {
            self.health.proves(kek.identity());
        }
    }

    fn note<T>(&self, kek: &Arc<dyn Kek>, work: Work, outcome: &Result<T, KekError>) {
        match outcome {
            Err(error @ KekError::Deadline(_)) => self.health.fault(kek.identity(), error), // the deadline was ours
            outcome => self.health.note(kek.identity(), work, outcome),
        }
    }
}

impl Turn {
    fn is_due(&self, interval: Duration, now: Instant) -> bool {
        self.looked.is_none_or(|looked| now.duration_since(looked) + BREATH >= interval)
    }
}
