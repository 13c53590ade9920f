//! The keyring as people see it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::{Keyring, Member};
use crate::identity::Identity;
use crate::provider::{Kek, Refused, Value, Vitals};

/// A KEK as people see it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct KekDescription {
    /// The provider that has it.
    pub provider: String,
    /// Its identity.
    pub identity: Identity,
    /// What its provider calls it (CKA_ID), in hex.
    pub id: String,
    /// When it may begin to wrap.
    pub not_before: Timestamp,
    /// What it does now.
    pub state: KekState,
    /// How it wraps.
    pub mode: String,
    /// When its period is over, if it is active and has one.
    pub period_ends: Option<Timestamp>,
    /// The tokens that hold it.
    pub held_by: Vec<String>,
    /// Those within reach that do not, although they should.
    pub lacked_by: Vec<String>,
    /// What each token that holds it says of it.
    pub attributes: BTreeMap<String, BTreeMap<&'static str, Value>>,
}

/// What a KEK does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KekState {
    /// It wraps and unwraps.
    Active,
    /// It unwraps, and will become active.
    Waiting,
    /// It unwraps what was wrapped under it.
    UnwrapOnly,
}

impl KekState {
    /// In a word or two.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Waiting => "waiting",
            Self::UnwrapOnly => "unwrap-only",
        }
    }
}

impl Keyring {
    /// Why only a new process could reach a provider again, if that is so.
    #[must_use]
    pub fn hopeless(&self) -> Option<String> {
        self.members.iter().find_map(|member| member.provider.hopeless())
    }

    /// How the parts of each provider fare, by its name.
    #[must_use]
    pub fn vitals(&self) -> Vec<(&str, Vitals)> {
        let of = |member: &Member| member.provider.vitals();
        self.members
            .iter()
            .flat_map(|member| of(member).into_iter().map(|part| (member.provider.name(), part)))
            .collect()
    }

    /// When each KEK that is active has last wrapped and unwrapped a value of this keyring's own. Another one is asked
    /// for none any more.
    #[must_use]
    pub fn proofs(&self) -> BTreeMap<Identity, Timestamp> {
        let (active, mut proofs) = (self.active_keks(), self.health.proofs());
        proofs.retain(|kek, _| active.contains(kek));
        proofs
    }

    /// The KEKs that are active now; no mark is moved.
    #[must_use]
    pub fn active_keks(&self) -> Vec<Identity> {
        let active = |member| self.active_of(member, Timestamp::now()).ok().map(|(active, _)| active.identity);
        self.members.iter().filter(|member| member.seals).filter_map(active).collect()
    }

    /// Tokens that are out of reach, or lack a KEK, as of the last look; others may serve meanwhile.
    #[must_use]
    pub fn gaps(&self) -> Vec<String> {
        let incomplete = self.members.iter().flat_map(|member| member.seen().incomplete.clone());
        self.outages().into_iter().chain(incomplete).collect()
    }

    /// KEKs for whose history a token does not vouch, each with what excuses that, as of the last look.
    #[must_use]
    pub fn exceptions(&self) -> Vec<String> {
        self.members.iter().flat_map(|member| member.seen().exceptions.clone()).collect()
    }

    /// Every KEK as of the last look, and every key that is not used; no mark is moved.
    #[must_use]
    pub fn describe(&self, now: Timestamp) -> (Vec<KekDescription>, Vec<Refused>) {
        let (mut keks, mut refused) = (Vec::new(), Vec::new());
        for member in &self.members {
            let active = self.active_of(member, now).ok().map(|(active, _)| active.identity);
            let seen = member.seen();
            refused.extend(seen.refused.iter().cloned());
            keks.extend(seen.keks.iter().map(|kek| {
                let state = match active {
                    Some(active) if member.seals && active == kek.identity() => KekState::Active,
                    _ if member.seals && kek.rank().not_before > now => KekState::Waiting,
                    _ => KekState::UnwrapOnly,
                };
                self.describe_kek(member.provider.name(), kek.as_ref(), state)
            }));
        }
        keks.sort_by(|one, other| {
            (&one.provider, one.not_before, &one.id).cmp(&(&other.provider, other.not_before, &other.id))
        });
        (keks, refused)
    }

    fn describe_kek(&self, provider: &str, kek: &dyn Kek, state: KekState) -> KekDescription {
        let holders = kek.held_by();
        KekDescription {
            provider: provider.to_owned(),
            identity: kek.identity(),
            id: base16ct::lower::encode_string(&kek.rank().id),
            not_before: kek.rank().not_before,
            state,
            mode: kek.mode().to_owned(),
            period_ends: (state == KekState::Active).then(|| self.end_of_period(kek.rank().not_before)).flatten(),
            held_by: holders.iter().map(|holder| holder.name.clone()).collect(),
            lacked_by: kek.lacked_by(),
            attributes: holders
                .into_iter()
                .map(|holder| (holder.name, holder.attributes.into_iter().collect()))
                .collect(),
        }
    }
}
