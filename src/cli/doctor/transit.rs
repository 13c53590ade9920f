//! Vault and OpenBao: whether they can be reached and logged in to, and let us do what must be done.

use std::time::Instant;

use jiff::SignedDuration;

use super::{Findings, TIMEOUT};
use crate::config::{Method, TransitConfig};
use crate::provider::Provider;
use crate::provider::transit::Transit;

const TRANSIT: &str = "Transit";
/// A key's versions become active by their creation time, which is the server's.
const CLOCKS_APART: SignedDuration = SignedDuration::from_secs(30);

pub(super) async fn examine(transit: &Transit, config: &TransitConfig, findings: &mut Findings) {
    let place = transit.place();
    if matches!(config.auth.method, Method::AppRole { wrapped: true, .. }) {
        let what = format!("{place} is not tried: its wrapped secret id opens once, and is for the plugin that serves");
        return findings.warning(TRANSIT, what, "`trousseau status` and `trousseau probe` say how that fares");
    }
    let deadline = Instant::now() + TIMEOUT;
    transit.settled().await;
    let survey = match transit.survey(deadline).await {
        Ok(survey) => survey,
        // These texts end with what to do.
        Err(error) => return findings.failure(TRANSIT, error.to_string(), ""),
    };
    let method = config.auth.method.as_str();
    findings.good(TRANSIT, format!("{place} is logged in to by {method}; its server has version {}", survey.version));
    for (capability, path) in &survey.denied {
        let what = format!("{place}: the policy of the plugin's token does not allow {capability} on {path}");
        findings.failure(TRANSIT, what, format!("path \"{path}\" {{ capabilities = [\"{capability}\"] }}"));
    }
    if survey.clock_ahead.abs() > CLOCKS_APART {
        let apart = SignedDuration::from_secs(survey.clock_ahead.abs().as_secs());
        let direction = if survey.clock_ahead.is_negative() { "behind" } else { "ahead of" };
        let what = format!("{place}: its server's clock is {apart:#} {direction} this host's");
        findings.warning(TRANSIT, what, "set both right: a new version becomes active by its creation time");
    }
    if let Err(error) = transit.look(deadline).await {
        findings.failure(TRANSIT, error.to_string(), "");
    }
}
