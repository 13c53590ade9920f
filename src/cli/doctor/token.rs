//! The tokens: their PINs, what they say of themselves, whether they keep a key, and the KEKs in them.

use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;

use super::{Findings, Severity, TIMEOUT};
use crate::config::{Config, Pkcs11Config};
use crate::keyring::Keyring;
use crate::provider::Value;
use crate::provider::pkcs11::{Outcome, Pkcs11, Survey, TriedOn, pin_states};
use crate::state::State;

const TOKEN: &str = "token";
const KEK: &str = "KEK";

/// What is known of each PIN without a login.
pub(super) fn examine_pins(config: &Config, state: &Arc<State>, findings: &mut Findings) {
    for (token, pin) in config.pkcs11().flat_map(|provider| pin_states(provider, state)) {
        match pin {
            Ok(complaints) if complaints.is_empty() => {
                findings.good("PIN", format!("{token}: no wrong PIN is counted"))
            }
            Ok(complaints) => {
                for (what, remedy) in complaints {
                    findings.warning("PIN", format!("{token} {what}"), remedy);
                }
            }
            Err(_) => (), // why is told when it is connected to
        }
    }
}

/// The module, the slot, the login, and what the token does: what was found, of each token within reach.
pub(super) async fn examine(pkcs11: &Pkcs11, provider: &Pkcs11Config, findings: &mut Findings) -> Vec<Survey> {
    let deadline = Instant::now() + TIMEOUT;
    let surveys = tokio::time::timeout(TIMEOUT, pkcs11.survey(false, deadline));
    let Ok(surveys) = surveys.await else {
        let remedy = "see what the vendor's tools say of it";
        findings.failure(TOKEN, format!("provider {}: its tokens did not answer in time", provider.name), remedy);
        return Vec::new();
    };
    let mut found = Vec::new();
    for survey in surveys {
        match survey {
            Ok(survey) => {
                report(&survey, provider, findings);
                found.push(survey);
            }
            // These texts end with what to do.
            Err(reason) => findings.failure(TOKEN, reason.to_string(), ""),
        }
    }
    for twice in pkcs11.named_twice(deadline).await {
        findings.failure(TOKEN, twice, "name each token once in `tokens`");
    }
    found
}

fn report(survey: &Survey, provider: &Pkcs11Config, findings: &mut Findings) {
    let (name, module) = (&survey.name, &survey.token.module);
    let what =
        format!("{name} is logged in to, by {} ({} {})", module.path.display(), module.description, module.version);
    findings.good(TOKEN, what);
    for (what, remedy) in &survey.complaints {
        findings.warning(TOKEN, format!("{name} {what}"), *remedy);
    }
    report_sessions(survey, provider, findings);
    for mode in &survey.modes {
        let on = mode.tried_on.unwrap_or(TriedOn::ThrowAwayKey).as_str();
        match &mode.failure {
            None => findings.good(TOKEN, format!("{name}: {on} of mode {} wraps and unwraps", mode.mode)),
            Some(failure) => findings.warning(
                TOKEN,
                format!("{name}: mode {} does not work with {on}: {failure}", mode.mode),
                match mode.tried_on {
                    Some(_) => "KEKs of other modes are not touched by this; or take the mode out of the profile",
                    None => "`trousseau key attest` tries it with a key in the token as well",
                },
            ),
        }
    }
    // What came of several ways alike is told once.
    let notable: Vec<_> =
        survey.exportability.trials.iter().filter(|trial| trial.outcome != Outcome::Refused).collect();
    for trials in notable.chunk_by(|one, other| (one.like, &one.what) == (other.like, &other.what)) {
        let Some(trial) = trials.first() else { continue };
        let ways: Vec<&str> = trials.iter().map(|trial| trial.way).collect();
        let what = format!("{name}: {} ({}): {}", ways.join("; "), trial.like, trial.what);
        let (severity, remedy) = match trial.outcome {
            Outcome::CameOut => (Severity::Failure, "use another token: this one does not keep a KEK in"),
            Outcome::Warning => (Severity::Warning, "ask the vendor why the token allows it"),
            _ => (Severity::Warning, "`trousseau key attest` tries it on a key in the token as well"),
        };
        findings.add(TOKEN, severity, what, remedy);
    }
    if survey.exportability.verdict() == Outcome::Refused {
        findings.good(TOKEN, format!("{name}: no way that was tried got a throw-away key out"));
    }
    for key in survey.keys.iter().filter(|key| key.refused.is_none()) {
        let loose = ["MODIFIABLE", "COPYABLE"];
        let is_set = |name: &&&str| key.attributes.get(**name) == Some(&Some(Value::Flag(true)));
        let loose: Vec<&str> = loose.iter().filter(is_set).copied().collect();
        if let (Some(identity), false) = (key.identity, loose.is_empty()) {
            let what =
                format!("{identity} on {name} is {}: a token may let its protection be changed", loose.join(" and "));
            findings.warning(KEK, what, "`trousseau key generate` makes KEKs that are not; rotate to one");
        }
    }
}

/// A pool takes two sessions beside its workers', and may replace every worker whose call does not return.
fn report_sessions(survey: &Survey, provider: &Pkcs11Config, findings: &mut Findings) {
    let known = provider.profile.max_sessions.map(|most| most as u64);
    if let Some(most) = survey.token.max_sessions.or(known).filter(|most| *most > 0) {
        judge_sessions(&survey.name, most, provider.sessions as u64, findings);
    }
}

fn judge_sessions(name: &str, most: u64, sessions: u64, findings: &mut Findings) {
    let (needed, at_worst) = (sessions + 2, 2 * sessions + 2);
    let what =
        format!("{name} allows {most} sessions; `sessions = {sessions}` needs {needed}, and {at_worst} at worst");
    if most < needed {
        findings.failure(TOKEN, what, "lower `sessions`, or raise the token's limit");
    } else if most < at_worst {
        findings.warning(
            TOKEN,
            what,
            "lower `sessions`, or raise the token's limit, so that calls that hang can be replaced",
        );
    } else {
        findings.good(TOKEN, what);
    }
}

pub(super) async fn examine_keks(keyring: &Keyring, findings: &mut Findings) {
    let looked = async {
        keyring.settled().await;
        keyring.find_keks().await;
    };
    if tokio::time::timeout(TIMEOUT, looked).await.is_err() {
        return findings.failure(KEK, "the tokens do not answer", "see what their vendor's tools say");
    }
    let (keks, refused) = keyring.describe(Timestamp::now());
    for kek in &keks {
        let (state, tokens) = (kek.state.as_str(), kek.held_by.join(" and "));
        let what = format!("{} is {state}, in mode {}, and held by {tokens}", kek.identity, kek.mode);
        findings.good(KEK, what);
    }
    for refused in refused {
        findings.warning(KEK, format!("{} is not used: {}", refused.key, refused.reason), "");
    }
    for concern in keyring.concerns(Timestamp::now()) {
        findings.warning(KEK, concern, "");
    }
    for exception in keyring.exceptions() {
        findings.warning(
            KEK,
            exception,
            "when you can, rotate to a KEK that its token vouches for, if it vouches for any",
        );
    }
    let outages = keyring.outages();
    for gap in keyring.gaps().into_iter().filter(|gap| !outages.contains(gap)) {
        findings.failure("replicas", gap, "");
    }
    // What Status would say after a start. It ends with what to do.
    if let Some(why) = keyring.nothing_active(Timestamp::now()) {
        findings.failure(KEK, why, "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_with_too_few_sessions_is_a_failure_and_with_too_few_at_worst_a_warning() {
        for (most, sessions, severity, words) in [
            (3, 2, Severity::Failure, "allows 3 sessions; `sessions = 2` needs 4, and 6 at worst"),
            (4, 2, Severity::Warning, "so that calls that hang can be replaced"),
            (5, 2, Severity::Warning, "allows 5 sessions"),
            (6, 2, Severity::Good, "and 6 at worst"),
            (u64::MAX, 1, Severity::Good, "needs 3, and 4 at worst"),
        ] {
            let mut findings = Findings::default();
            judge_sessions("hsm", most, sessions, &mut findings);
            let Findings(found) = findings;
            let told = |finding: &super::super::Finding| format!("{} -> {}", finding.what, finding.remedy);
            let is_as_expected =
                |finding| told(finding).contains(words) && finding.severity == severity && found.len() == 1;
            assert!(found.iter().any(is_as_expected), "{most}, {sessions}: {found:#?}");
        }
    }
}
