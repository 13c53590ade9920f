//! The configuration file as it is written: every key, its type and its default. [`super`] makes it into what cannot
//! be invalid.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Deserialize;

use crate::legacy::Format;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct File {
    #[serde(rename = "version")]
    _version: Version,
    #[serde(default)]
    pub(super) listen: Listen,
    pub(super) keyring: Keyring,
    #[serde(default)]
    pub(super) policy: Policy,
    #[serde(default)]
    pub(super) observe: Observe,
    pub(super) audit: Option<Audit>,
    #[serde(default)]
    pub(super) provider: Vec<Provider>,
    pub(super) legacy: Option<Legacy>,
}

/// The only version of this file so far.
#[derive(Deserialize)]
enum Version {
    #[serde(rename = "v1")]
    V1,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct Listen {
    pub(super) socket: PathBuf,
    pub(super) mode: Option<String>,
    pub(super) group: Option<String>,
    pub(super) allow_uids: BTreeSet<u32>,
    pub(super) v1beta1: bool,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            socket: super::DEFAULT_SOCKET.into(),
            mode: None,
            group: None,
            allow_uids: BTreeSet::from([0]),
            v1beta1: false,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Keyring {
    pub(super) cluster: String,
    #[serde(default)]
    pub(super) seal_under: super::SealUnder,
    #[serde(default = "ninety_days")]
    pub(super) max_age: String,
    pub(super) state: Option<PathBuf>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct Observe {
    pub(super) http: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Audit {
    #[serde(default = "audit_log")]
    pub(super) file: PathBuf,
    #[serde(default = "a_second")]
    pub(super) sync: String,
    #[serde(default)]
    pub(super) on_failure: super::OnFailure,
    #[serde(default = "a_quarter_of_a_gib")]
    pub(super) rotate_at_mib: u64,
    #[serde(default = "five_minutes")]
    pub(super) head_every: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct Policy {
    pub(super) exportable: super::Exportable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ProviderType {
    Pkcs11,
    Transit,
}

/// The keys of every type; which type has which is checked by [`super::provider`]. (A tagged enum would lose the line
/// of an error.)
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Provider {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) of_type: ProviderType,
    #[serde(default = "yes")]
    pub(super) seal: bool,
    // pkcs11
    pub(super) profile: Option<String>,
    pub(super) module: Option<PathBuf>,
    pub(super) tokens: Option<Vec<String>>,
    pub(super) label: Option<String>,
    pub(super) pin_file: Option<String>,
    pub(super) sessions: Option<usize>,
    #[serde(default)]
    pub(super) kek: Vec<AdmittedKek>,
    // transit
    pub(super) address: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) mount: Option<String>,
    pub(super) key: Option<String>,
    pub(super) activation_delay: Option<String>,
    pub(super) ca_file: Option<PathBuf>,
    pub(super) auth: Option<Auth>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AuthMethod {
    Token,
    AppRole,
    Cert,
    Jwt,
    Kubernetes,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Auth {
    pub(super) method: AuthMethod,
    pub(super) mount: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) token_file: Option<String>,
    pub(super) role_id_file: Option<String>,
    pub(super) secret_id_file: Option<String>,
    pub(super) wrapped: Option<bool>,
    pub(super) cert_file: Option<PathBuf>,
    pub(super) key_file: Option<String>,
    pub(super) role: Option<String>,
    pub(super) jwt_file: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct AdmittedKek {
    pub(super) id: String,
    pub(super) not_before: toml::value::Datetime,
    pub(super) exception: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Legacy {
    pub(super) formats: BTreeSet<Format>,
    pub(super) provider: String,
}

fn yes() -> bool {
    true
}

/// A habit that people keep: four times a year.
fn ninety_days() -> String {
    "90d".to_owned()
}

fn audit_log() -> PathBuf {
    "/var/log/trousseau/audit.log".into()
}

fn a_second() -> String {
    "1s".to_owned()
}

/// Some two thirds of a million lines.
fn a_quarter_of_a_gib() -> u64 {
    256
}

fn five_minutes() -> String {
    "5m".to_owned()
}
