//! What a token says of itself, of its module and of its keys, for whoever examines it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use cryptoki::context::Info;
use cryptoki::object::AttributeType;
use cryptoki::slot::{Limit, TokenInfo};
use futures_util::future::join_all;
use jiff::Timestamp;
use serde::Serialize;

use super::Pkcs11;
use super::admission::{KekSpec, Rules};
use super::attributes::{self, EXAMINED};
use super::error::CallError;
use super::exportability::{self, Kind, Trials, Tried, TriedOn};
use super::lane::Lane;
use super::token::Token;
use crate::config::Mode;
use crate::identity::Identity;
use crate::provider::{KekError, Value};

/// What a key is pinned to; it is asked for together with what decides about the key.
const PINNED: AttributeType = AttributeType::AllowedMechanisms;

/// A token as it describes itself (CK_TOKEN_INFO and CK_INFO, PKCS#11 v3.1 sections 3.1 and 3.2).
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TokenFacts {
    /// Its label.
    pub label: String,
    /// Who made it.
    pub manufacturer: String,
    /// Its model.
    pub model: String,
    /// Its serial number.
    pub serial: String,
    /// The hardware's version.
    pub hardware: String,
    /// The firmware's version.
    pub firmware: String,
    /// The flags that are set.
    pub flags: Vec<&'static str>,
    /// How many sessions it allows to an application, if it says so.
    pub max_sessions: Option<u64>,
    /// The library through which it is reached.
    pub module: ModuleFacts,
}

/// A module as it describes itself.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ModuleFacts {
    /// Its file, with no link in the path.
    pub path: PathBuf,
    /// SHA-256 of the file, as it now is on the disk.
    pub sha256: String,
    /// What it calls itself.
    pub description: String,
    /// Who made it.
    pub manufacturer: String,
    /// Its version.
    pub version: String,
    /// The version of PKCS#11 that it speaks.
    pub pkcs11: String,
}

/// A key under the KEKs' label.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct KeyFacts {
    /// The identity that it has as a KEK.
    pub identity: Option<Identity>,
    /// CKA_ID, in hex.
    pub id: Option<String>,
    /// Why it is not used.
    pub refused: Option<String>,
    /// Why it is used although the token does not vouch for its history.
    pub exception: Option<String>,
    /// What the token says of it: `null` where it does not say.
    pub attributes: BTreeMap<&'static str, Option<Value>>,
}

/// A mode, tried by use.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ModeFacts {
    /// The mode.
    pub mode: &'static str,
    /// On what; `null`: there was nothing.
    pub tried_on: Option<TriedOn>,
    /// Why it does not work, or could not be tried.
    pub failure: Option<String>,
}

/// All that can be learned of one token.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Survey {
    /// The token, as people know it.
    pub name: String,
    /// What it says of itself.
    pub token: TokenFacts,
    /// What it says of itself that it should not, each with what to do.
    #[serde(skip)]
    pub complaints: Vec<(&'static str, &'static str)>,
    /// What became of each mode of the profile when it was used.
    pub modes: Vec<ModeFacts>,
    /// The keys under the KEKs' label.
    pub keys: Vec<KeyFacts>,
    /// Whether a key can be made to leave it.
    pub exportability: Trials,
}

impl Pkcs11 {
    /// All that can be learned of each token, or why it is out of reach. Keys are made and destroyed in it for that, and
    /// unless `may_write` only such as live in a session.
    pub async fn survey(&self, may_write: bool, deadline: Instant) -> Vec<Result<Survey, KekError>> {
        self.every_first_attempt().await;
        join_all(self.tokens.iter().map(|token| {
            let of = Arc::clone(token);
            token.run(deadline, move |lane| lane.survey(&of, may_write))
        }))
        .await
    }

    /// Which of the tokens that answer are one and the same under two URIs, for people: they only look like replicas.
    pub async fn named_twice(&self, deadline: Instant) -> Vec<String> {
        let names = join_all(self.tokens.iter().map(|token| {
            token.run(deadline, |lane| {
                let info = lane.connected.token_info()?;
                Ok([info.manufacturer_id(), info.model(), info.serial_number(), info.label()].map(text))
            })
        }));
        let mut first: BTreeMap<[String; 4], &str> = BTreeMap::new();
        let mut twice = Vec::new();
        for (token, name) in self.tokens.iter().zip(names.await) {
            let Ok(name) = name else { continue };
            match first.get(&name) {
                Some(other) => twice.push(format!("{} is {other} once more, and no replica of it", token.link.name)),
                None => drop(first.insert(name, &token.link.name)),
            }
        }
        twice
    }
}

impl Lane {
    fn survey(&mut self, of: &Token, may_write: bool) -> Result<Survey, CallError> {
        let keys = self.key_facts(&of.rules, Timestamp::now())?;
        // As the KEKs are that are there; as the next one would be, if there is none.
        let mut like: Vec<Kind> = Vec::new();
        for (key, kek) in &keys {
            let is_set = |name| key.attributes.get(name) == Some(&Some(Value::Flag(true)));
            let (modifiable, copyable) = (is_set("MODIFIABLE"), is_set("COPYABLE"));
            let kind = kek.as_ref().map(|kek| Kind { mode: kek.mode, modifiable, copyable });
            like.extend(kind.filter(|kind| !like.contains(kind)));
        }
        if like.is_empty() {
            like.extend(of.rules.profile.modes.first().map(|mode| Kind::made_by_us(*mode)));
        }
        let (keys, keks): (Vec<_>, Vec<_>) = keys.into_iter().unzip();
        let keks: Vec<KekSpec> = keks.into_iter().flatten().collect();
        let modes = of.rules.profile.modes.iter();
        Ok(Survey {
            name: of.link.name.clone(),
            token: self.token_facts()?,
            complaints: self.connected.complaints()?,
            modes: modes.map(|mode| self.mode_facts(*mode, &keks, may_write)).collect::<Result<_, _>>()?,
            exportability: exportability::try_every_way(self, &like, may_write)?,
            keys,
        })
    }

    fn mode_facts(&mut self, mode: Mode, keks: &[KekSpec], may_write: bool) -> Result<ModeFacts, CallError> {
        let Tried { on, failure } = exportability::try_mode(self, mode, keks, may_write)?;
        Ok(ModeFacts { mode: mode.as_str(), tried_on: on, failure })
    }

    /// What the token and its module say of themselves.
    fn token_facts(&self) -> Result<TokenFacts, CallError> {
        let info = self.connected.token_info()?;
        let max_sessions = match info.max_session_count() {
            Limit::Max(count) => Some(count),
            Limit::Unavailable | Limit::Infinite => None,
        };
        Ok(TokenFacts {
            label: text(info.label()),
            manufacturer: text(info.manufacturer_id()),
            model: text(info.model()),
            serial: text(info.serial_number()),
            hardware: info.hardware_version().to_string(),
            firmware: info.firmware_version().to_string(),
            flags: flags(&info),
            max_sessions,
            module: module_facts(self.connected.module_path(), &self.connected.library_info()?),
        })
    }

    /// What the token says of every key with the KEKs' label, and those that are KEKs.
    fn key_facts(&self, rules: &Rules, now: Timestamp) -> Result<Vec<(KeyFacts, Option<KekSpec>)>, CallError> {
        let objects = self.find_labelled(rules)?;
        let said: Vec<_> = objects.iter().map(|object| self.ask(*object)).collect::<Result<_, _>>()?;
        let decisions = rules.decide(&said, now);
        let mut keys = Vec::new();
        for ((handle, said), decision) in objects.into_iter().zip(said).zip(decisions) {
            let mut answered = self.session.get_attributes(handle, &EXAMINED)?;
            answered.extend(said.0.iter().filter(|said| said.attribute_type() == PINNED).cloned());
            let named = EXAMINED.iter().copied().chain([PINNED]).filter_map(attributes::name);
            let mut attributes: BTreeMap<_, _> = named.map(|name| (name, None)).collect();
            attributes.extend(attributes::readable(&answered).into_iter().map(|(name, value)| (name, Some(value))));
            let identity = decision.as_ref().and_then(|decision| decision.identity);
            let (kek, refused) = match decision.map(|decision| decision.verdict) {
                Some(Ok(kek)) => (Some(kek), None),
                Some(Err(reason)) => (None, Some(reason)),
                None => (None, None), // a part of a pair
            };
            let spec = kek.as_ref().map(|kek| rules.spec_of(kek));
            let facts = KeyFacts {
                identity,
                id: said.id().map(base16ct::lower::encode_string),
                exception: kek.and_then(|kek| kek.exception),
                refused,
                attributes,
            };
            keys.push((facts, spec));
        }
        Ok(keys)
    }
}

/// Some fill their texts up with zeros, and not with spaces.
fn text(text: &str) -> String {
    text.trim_end_matches(['\0', ' ']).into()
}

fn flags(info: &TokenInfo) -> Vec<&'static str> {
    let all = [
        (info.rng(), "RNG"),
        (info.write_protected(), "WRITE_PROTECTED"),
        (info.login_required(), "LOGIN_REQUIRED"),
        (info.user_pin_initialized(), "USER_PIN_INITIALIZED"),
        (info.clock_on_token(), "CLOCK_ON_TOKEN"),
        (info.protected_authentication_path(), "PROTECTED_AUTHENTICATION_PATH"),
        (info.token_initialized(), "TOKEN_INITIALIZED"),
        (info.user_pin_count_low(), "USER_PIN_COUNT_LOW"),
        (info.user_pin_final_try(), "USER_PIN_FINAL_TRY"),
        (info.user_pin_locked(), "USER_PIN_LOCKED"),
        (info.user_pin_to_be_changed(), "USER_PIN_TO_BE_CHANGED"),
        (info.so_pin_count_low(), "SO_PIN_COUNT_LOW"),
        (info.so_pin_final_try(), "SO_PIN_FINAL_TRY"),
        (info.so_pin_locked(), "SO_PIN_LOCKED"),
        (info.so_pin_to_be_changed(), "SO_PIN_TO_BE_CHANGED"),
        (info.error_state(), "ERROR_STATE"),
    ];
    all.into_iter().filter(|(is_set, _)| *is_set).map(|(_, name)| name).collect()
}

fn module_facts(path: &Path, info: &Info) -> ModuleFacts {
    ModuleFacts {
        sha256: crate::disk::sha256(path).unwrap_or_else(|error| format!("cannot be read: {error}")),
        path: path.to_owned(),
        description: info.library_description().into(),
        manufacturer: info.manufacturer_id().into(),
        version: info.library_version().to_string(),
        pkcs11: info.cryptoki_version().to_string(),
    }
}
