//! `trousseau key list --expect ID`: whether a serving plugin is ready for a KEK before its instant.
//!
//! The plugin answers Status, Encrypt and Decrypt, and nothing else. So it is given an envelope that holds a random
//! value and could have come from another host that made this KEK active a little earlier: it opens it only if it sees
//! the KEK and unwraps with it, and looks for it at once if it does not know it yet. Then its key_id shows whether it
//! has the cluster and the KEKs that this configuration has; if so, it will have the same key_id as all others after
//! the instant.

use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;
use tonic::Code;
use zeroize::Zeroizing;

use super::super::output::{Failure, Format, print, print_json};
use super::clock_is_synchronized;
use crate::identity::Identity;
use crate::keyring::{KekDescription, KekState, Keyring, KeyringError, LOOK_SOON};
use crate::service::client::{Client, ClientError};

/// How long a call may take: the plugin may look at its tokens first.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Fewer digits are too easily those of two KEKs.
const SHORTEST_BEGINNING: usize = 8;

/// The API server takes a ciphertext of at most so many bytes.
const CIPHERTEXT_LIMIT: usize = 1024;

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Ready {
    identity: Identity,
    id: String,
    state: KekState,
    not_before: Timestamp,
    /// From the KEK's instant on, unless another provider's KEK changes as well; now, if it only unwraps.
    key_id: String,
    /// `None`: nobody here can tell.
    clock_synchronized: Option<bool>,
    /// This host's tokens that could not take over.
    lacked_by: Vec<String>,
}

pub(super) async fn run(keyring: &Keyring, wanted: &str, socket: &Path, format: Format) -> Result<(), Failure> {
    let kek = find(keyring, wanted)?;
    let mut client = Client::connect(socket, TIMEOUT).await?;
    let key_id = prove(keyring, &kek, &mut client).await?;
    compare_key_ids(keyring, &mut client).await?;
    let clock_synchronized = clock_is_synchronized();
    let KekDescription { identity, id, state, not_before, lacked_by, .. } = kek;
    let ready = Ready { identity, id, state, not_before, key_id, clock_synchronized, lacked_by };
    match format {
        Format::Json => print_json(&ready),
        Format::Text => print(&text(&ready)),
    }
}

/// Has the plugin open what this process sealed under the KEK alone, and returns the key_id from the KEK's instant on.
async fn prove(keyring: &Keyring, kek: &KekDescription, client: &mut Client) -> Result<String, Failure> {
    let becomes_active = (kek.state != KekState::UnwrapOnly).then_some(kek.identity);
    let key_set = keyring.foresee(kek.not_before.max(Timestamp::now()), becomes_active).map_err(token_fails)?;
    let set = keyring.alone(key_set, kek.identity).ok_or_else(|| unseen(&kek.id))?;
    let mut value = Zeroizing::new(vec![0; 32]);
    getrandom::fill(&mut value).map_err(|error| Failure::failed(format!("getrandom(2): {error}"), ""))?;
    let deadline = Instant::now() + TIMEOUT;
    let sealed = keyring.encrypt(&set, &value, CIPHERTEXT_LIMIT, deadline).await.map_err(token_fails)?;
    let key_id = key_set.to_string();
    let mut answer = client.decrypt(sealed.clone(), key_id.clone()).await;
    if answer.as_ref().is_err_and(|error| error.code() == Some(Code::FailedPrecondition)) {
        tokio::time::sleep(LOOK_SOON).await; // somebody may have made it look a moment ago
        answer = client.decrypt(sealed, key_id.clone()).await;
    }
    let opened = Zeroizing::new(answer.map_err(|error| not_ready(kek, error))?);
    match opened == value {
        true => Ok(key_id),
        false => Err(Failure::failed("Decrypt gave back another value than was encrypted", "stop using this plugin")),
    }
}

fn text(ready: &Ready) -> String {
    let Ready { identity, not_before, key_id, .. } = ready;
    let then = match ready.state {
        KekState::Waiting => format!("; active from {not_before}, and the key_id is then {key_id}"),
        KekState::Active => format!("; active now, and the key_id is {key_id}"),
        KekState::UnwrapOnly => "; it only unwraps".to_owned(),
    };
    let clock = match ready.clock_synchronized {
        Some(true) => "",
        None => "; whether this host's clock is synchronized cannot be seen here: see `timedatectl` on the host",
        Some(false) => {
            "; but this host's clock is not synchronized, and it may switch at another moment than the others"
        }
    };
    let lacking: String = ready.lacked_by.iter().map(|token| format!("; but token {token} lacks it")).collect();
    format!("ready: the plugin unwraps with KEK {identity}{then}{clock}{lacking}")
}

/// Reads `--expect`: an identity or an id, or how one of them begins.
pub(super) fn name(text: &str) -> Result<String, String> {
    match !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        true => Ok(text.to_ascii_lowercase()),
        false => Err("an identity or an id is hex digits, as `trousseau key list` shows them".to_owned()),
    }
}

/// The KEK whose identity or id is so or begins so, as this process sees it.
fn find(keyring: &Keyring, wanted: &str) -> Result<KekDescription, Failure> {
    let (keks, refused) = keyring.describe(Timestamp::now());
    let is_it = |kek: &KekDescription| kek.identity.to_string() == wanted || kek.id == wanted;
    let begins = |name: &str| wanted.len() >= SHORTEST_BEGINNING && name.starts_with(wanted);
    let begins_so = |kek: &KekDescription| begins(&kek.identity.to_string()) || begins(&kek.id);
    let (exact, others): (Vec<_>, Vec<_>) = keks.into_iter().partition(is_it);
    let others: Vec<_> = others.into_iter().filter(begins_so).collect();
    let mut found = if exact.is_empty() { others } else { exact };
    if found.len() > 1 {
        let what = format!("{} KEKs begin with {wanted}", found.len());
        return Err(Failure::usage(what, "give more of its digits, as `trousseau key list` shows them"));
    }
    if let Some(kek) = found.pop() {
        return Ok(kek);
    }
    let is_named = |identity: Identity| {
        let id = base16ct::lower::decode_vec(wanted).unwrap_or_default();
        begins(&identity.to_string()) || identity.to_string() == wanted || identity == Identity::of_pkcs11(&id)
    };
    match refused.iter().find(|refused| refused.identity.is_some_and(is_named)) {
        Some(refused) => Err(Failure::failed(format!("{} is not used: {}", refused.key, refused.reason), "")),
        None => match keyring.outages().into_iter().next() {
            Some(outage) => Err(Failure::unavailable(outage, "")),
            None if wanted.len() < SHORTEST_BEGINNING => {
                let what = format!("{wanted} is no KEK's id, and too short to be the beginning of one");
                let remedy =
                    format!("give {SHORTEST_BEGINNING} of its digits or more, as `trousseau key list` shows them");
                Err(Failure::usage(what, remedy))
            }
            None => Err(unseen(wanted)),
        },
    }
}

fn unseen(wanted: &str) -> Failure {
    let remedy = "`trousseau key list` shows the KEKs that it sees; clone the KEK to this host's token";
    Failure::failed(format!("this host's token has no KEK {wanted}"), remedy)
}

/// The plugin has the key_id that this configuration makes now, or made a moment ago.
async fn compare_key_ids(keyring: &Keyring, client: &mut Client) -> Result<(), Failure> {
    let expected = || keyring.foresee(Timestamp::now(), None).map(|set| set.to_string()).map_err(token_fails);
    let before = expected()?;
    let status = client.status().await?;
    if status.key_id == before || status.key_id == expected()? {
        return Ok(());
    }
    let what = format!("the plugin has key_id {}, and this configuration makes {before}", status.key_id);
    let remedy = "it serves another configuration or other tokens: compare keyring.cluster and [[provider]], and \
                  reload it";
    Err(Failure::failed(what, remedy))
}

fn token_fails(error: KeyringError) -> Failure {
    Failure::unavailable(error.to_string(), "")
}

/// What the plugin's error says about the KEK.
fn not_ready(kek: &KekDescription, error: ClientError) -> Failure {
    let KekDescription { identity, id, .. } = kek;
    match error.code() {
        Some(Code::FailedPrecondition) => {
            let what = format!("the plugin does not see KEK {identity} (id {id}), which this process sees");
            let remedy = "it looks every 30 seconds, and did so now: does it use this configuration, and does its \
                          module show new keys only to a new process?";
            Failure::failed(what, remedy)
        }
        Some(Code::InvalidArgument) => {
            let what = format!("the plugin does not unwrap with KEK {identity} (id {id}) what this process wrapped");
            Failure::failed(what, "its token holds another key, or one of another mode, under this id")
        }
        _ => error.into(),
    }
}
