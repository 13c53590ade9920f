//! How a keyring learns of KEKs: it looks at its providers again and again, and has each active KEK wrap and unwrap a
//! value while it is at it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{join_all, select_all};
use jiff::Timestamp;

use super::Keyring;
use super::member::Member;
use crate::provider::{Kek, KekError};
use crate::secret::Dek;

/// How often the providers are asked for new KEKs.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// The least time between two looks, whatever happens.
const BREATH: Duration = Duration::from_millis(100);
/// How often while nothing can be encrypted.
const UNWELL: Duration = Duration::from_millis(500);
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
}

impl Keyring {
    /// Looks at all providers again and again, at once when one of them has changed. Never returns.
    pub async fn keep_looking(&self) {
        let _settled_or_late = tokio::time::timeout(FIRST_CONNECTION, self.settled()).await;
        loop {
            self.look().await;
            self.has_looked.send_replace(true);
            let well = self.active(Timestamp::now()).is_ok_and(|set| self.health(&set).is_ok());
            let changed = select_all(self.members.iter().map(|member| member.provider.changed()));
            tokio::time::sleep(BREATH).await;
            tokio::select! {
                _ = changed => (),
                () = self.health.worsens() => (),
                () = tokio::time::sleep(if well { LOOK_EVERY } else { UNWELL }) => (),
            }
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
        self.look_alone(&mut *self.looks.lock().await).await;
    }

    /// Looks now, unless that was done a moment ago: whoever sends unknown identities must not keep the tokens busy.
    pub(super) async fn look_at_once(&self) {
        let asked = Instant::now();
        let mut looks = self.looks.lock().await;
        let somebody_just_did = looks.began.is_some_and(|began| began >= asked);
        if !somebody_just_did && looks.asked_for_ended.is_none_or(|ended| ended.elapsed() >= LOOK_SOON) {
            self.look_alone(&mut looks).await;
            looks.asked_for_ended = Some(Instant::now());
        }
    }

    async fn look_alone(&self, looks: &mut Looks) {
        let began = Instant::now();
        let deadline = began + LOOK_TIMEOUT;
        self.find_keks_by(deadline).await;
        if let Ok(set) = self.active(Timestamp::now()) {
            let deadline = Instant::now() + LOOK_TIMEOUT;
            let keks = set.keks.iter().filter_map(|active| active.kek.as_ref().ok());
            join_all(keks.map(|kek| self.round_trip(kek, deadline))).await;
        }
        looks.began = Some(began);
    }

    /// Returns when it is known of every provider whether it can be reached.
    pub async fn settled(&self) {
        join_all(self.members.iter().map(|member| member.provider.settled())).await;
    }

    /// Looks for KEKs, and no more: no KEK becomes active by it.
    pub async fn find_keks(&self) {
        self.find_keks_by(Instant::now() + LOOK_TIMEOUT).await;
    }

    async fn find_keks_by(&self, deadline: Instant) {
        join_all(self.members.iter().map(|member| self.look_at(member, deadline))).await;
    }

    async fn look_at(&self, member: &Member, deadline: Instant) {
        match member.provider.look(deadline).await {
            Ok(sighting) => member.shows(sighting),
            Err(KekError::Busy(_)) => (), // it proves nothing, and the next look is near
            Err(error) => {
                member.is_out_of_reach(&error);
                member.seen().keks.iter().for_each(|kek| self.health.fault(kek.identity(), &error));
            }
        }
    }

    async fn round_trip(&self, kek: &Arc<dyn Kek>, deadline: Instant) {
        let Ok(dek) = Dek::generate() else { return };
        let both = async {
            let wrapped = kek.wrap_dek(Arc::new(dek), deadline).await?;
            kek.unwrap_dek(&wrapped, deadline).await
        };
        match both.await {
            Err(error @ KekError::Deadline(_)) => self.health.fault(kek.identity(), &error), // the deadline was ours
            outcome => self.health.note(kek.identity(), &outcome),
        }
    }
}
