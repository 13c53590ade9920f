//! How a keyring learns of KEKs: it looks at its providers again and again, and has each active KEK wrap and unwrap a
//! value while it is at it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{join_all, select_all};
use jiff::Timestamp;

use super::Keyring;
use super::member::Member;
use super::opening::share;
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
/// How long the first look waits for a provider that is still being connected to.
const FIRST_CONNECTION: Duration = Duration::from_secs(5);
/// How long a look may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long each call of the round trip after it may take: as long as a request's, by the API server's own deadline.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Default)]
pub(super) struct Looks {
    /// When the last one began that has ended.
    began: Option<Instant>,
    /// When the last one that an unknown identity had asked for ended or, if its request was given up before, began.
    asked_for: Option<Instant>,
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

    /// Returns once the first look has ended.
    pub async fn has_looked(&self) {
        self.has_looked_unless(|| false).await;
    }

    /// Returns once the first look has ended, or what it has shown so far is enough: a request that comes while providers
    /// are being connected to, as after a restart, waits for that and is not refused; nor does it wait for one that hangs
    /// when another will do.
    pub(super) async fn has_looked_unless(&self, is_enough: impl Fn() -> bool) {
        if *self.has_looked.borrow() {
            return;
        }
        drop(self.has_looked.subscribe().wait_for(|has_looked| *has_looked || is_enough()).await);
    }

    /// Returns once it is known whether Encrypt would work until `deadline`.
    ///
    /// It waits for every provider, if only for half of its time when others are well. At once would be too soon: with each
    /// restart, what is written before the slowest is connected to would lack a recipient until a rotation; and a provider
    /// whose key was rotated meanwhile would show under its old `key_id` first, which is what this host remembers of it.
    pub async fn can_tell(&self, deadline: Instant) {
        if *self.has_looked.borrow() {
            return;
        }
        let _all_or_late = tokio::time::timeout_at(share(deadline, 2).into(), self.has_looked()).await;
        self.has_looked_unless(|| self.well(Timestamp::now()).is_ok()).await;
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
        if !somebody_just_did && looks.asked_for.is_none_or(|at| at.elapsed() >= LOOK_SOON) {
            looks.asked_for = Some(asked); // should the request be given up meanwhile
            self.look_alone(&mut looks, true).await;
            looks.asked_for = Some(Instant::now());
        }
    }

    /// Looks at all providers, or at those whose time has come, and returns when the next one's will have.
    async fn look_alone(&self, looks: &mut Looks, at_all: bool) -> Duration {
        let began = Instant::now();
        looks.turns.resize_with(self.members.len(), Turn::default);
        let interval = self.interval();
        let is_due = |(member, turn): &(&Member, &mut Turn)| at_all || turn.is_due(interval(member), began);
        let mut due: Vec<(&Member, &mut Turn)> = self.members.iter().zip(&mut looks.turns).filter(is_due).collect();
        join_all(due.iter().map(|(member, turn)| self.take(turn, member))).await;
        due.iter_mut().for_each(|(_, turn)| turn.looked = Some(began));
        if let Ok(set) = self.active(Timestamp::now()) {
            let mut keks: Vec<&Arc<dyn Kek>> = set.keks.iter().filter_map(|active| active.kek.as_ref().ok()).collect();
            keks.retain(|kek| due.iter().any(|(member, turn)| self.is_to_prove_itself(kek, member, turn)));
            let began = Instant::now();
            join_all(keks.iter().map(|kek| self.round_trip(kek))).await;
            // Only now: a look may be given up in between.
            for (member, turn) in &mut due {
                let its_own = keks.iter().find(|kek| member.shows_kek(kek.identity()));
                turn.probed = its_own.map(|kek| (kek.identity(), began)).or(turn.probed);
            }
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
    fn is_to_prove_itself(&self, kek: &Arc<dyn Kek>, member: &Member, turn: &Turn) -> bool {
        let identity = kek.identity();
        let lately = |(proved, at): (Identity, Instant)| {
            proved == identity && at.elapsed() + BREATH < member.provider.pace().probe
        };
        member.shows_kek(identity) && (self.health.fault_of(identity).is_some() || !turn.probed.is_some_and(lately))
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

    /// Looks at a provider, the first time not before it is connected to, and tells whoever waits for that.
    async fn take(&self, turn: &Turn, member: &Member) {
        if turn.looked.is_none() {
            let _settled_or_late = tokio::time::timeout(FIRST_CONNECTION, member.provider.settled()).await;
        }
        self.look_at(member, Instant::now() + LOOK_TIMEOUT).await;
        if turn.looked.is_none() {
            self.has_looked.send_modify(|_| ());
        }
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

    async fn round_trip(&self, kek: &Arc<dyn Kek>) {
        let Ok(dek) = Dek::generate() else { return };
        let wrapped = kek.wrap_dek(Arc::new(dek), Instant::now() + CALL_TIMEOUT).await;
        self.note(kek, Work::Wrap, &wrapped);
        let Ok(wrapped) = wrapped else { return };
        let unwrapped = kek.unwrap_dek(&wrapped, Instant::now() + CALL_TIMEOUT).await;
        self.note(kek, Work::Unwrap, &unwrapped);
        if unwrapped.is_ok() {
            self.health.proves(kek.identity());
        }
    }

    fn note<T>(&self, kek: &Arc<dyn Kek>, work: Work, outcome: &Result<T, KekError>) {
        match outcome {
            Err(error @ KekError::Deadline(_)) => self.health.fails_at(kek.identity(), work, error), // the deadline was ours
            outcome => self.health.note(kek.identity(), work, outcome),
        }
    }
}

impl Turn {
    fn is_due(&self, interval: Duration, now: Instant) -> bool {
        self.looked.is_none_or(|looked| now.duration_since(looked) + BREATH >= interval)
    }
}
