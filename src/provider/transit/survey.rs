//! What a server says of itself, and what it lets us do: for `doctor`, which asks before anybody needs it.

use std::collections::BTreeMap;
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::link::{Ask, Link};
use crate::provider::KekError;

/// What was found.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The server's version.
    pub version: String,
    /// How far its clock is ahead of ours.
    pub clock_ahead: SignedDuration,
    /// What the policy of our token does not allow: a capability, and the path that it is missing on.
    pub denied: Vec<(&'static str, String)>,
}

#[derive(Deserialize)]
struct Health {
    #[serde(default)]
    version: String,
    #[serde(default)]
    server_time_utc: i64,
}

#[derive(Deserialize)]
struct Capabilities {
    data: BTreeMap<String, serde_json::Value>,
}

pub(super) async fn survey(link: &Link, deadline: Instant) -> Result<Survey, KekError> {
    let answer = link.ask(Ask::Health, Zeroizing::default(), deadline).await?;
    let Health { version, server_time_utc } = answer.read().map_err(|_| link.strange())?;
    let clock = Timestamp::from_second(server_time_utc).unwrap_or_default();
    let clock_ahead = clock.duration_since(Timestamp::now());
    let denied = denied(link, deadline).await?;
    Ok(Survey { version, clock_ahead, denied })
}

/// Nothing, where the policy `default` was taken from the token: then it cannot ask.
async fn denied(link: &Link, deadline: Instant) -> Result<Vec<(&'static str, String)>, KekError> {
    let wanted = [Ask::Read, Ask::Encrypt, Ask::Decrypt].map(|ask| (ask.capability(), link.path(ask)));
    let paths: Vec<String> = wanted.iter().map(|(_, path)| format!("\"{path}\"")).collect();
    let body = format!("{{\"paths\":[{}]}}", paths.join(","));
    let answer = match link.ask(Ask::Capabilities, Zeroizing::new(body.into_bytes()), deadline).await {
        Err(KekError::Denied(_)) => return Ok(Vec::new()),
        answer => answer?,
    };
    let Capabilities { data } = answer.read().map_err(|_| link.strange())?;
    let allows = |(capability, path): &(&'static str, String)| {
        let said = data.get(path).and_then(serde_json::Value::as_array);
        said.is_some_and(|said| said.iter().any(|word| word == capability || word == "root"))
    };
    Ok(wanted.into_iter().filter(|wanted| !allows(wanted)).collect())
}
