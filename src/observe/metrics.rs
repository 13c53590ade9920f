//! The text of `/metrics`: OpenMetrics 1.0.0. Every label has as many values as there are KEKs and tokens, and no more.

use std::fmt::{Display, Write};

use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::histogram::Histogram;
use crate::keyring::{KekDescription, Keyring};
use crate::provider::{Times, Vitals};
use crate::service::counters::{Call, Counters};
use crate::service::ended::name_of;
use crate::service::requests::Requests;

/// What can be told without asking a token.
pub(super) fn text(keyring: &Keyring, requests: &Requests, now: Timestamp) -> String {
    let mut text = Text::default();
    text.gauge("trousseau_build_info", "The version that runs, and its commit as `trousseau --version` says it");
    let build = [("version", env!("CARGO_PKG_VERSION")), ("commit", env!("TROUSSEAU_BUILD"))];
    text.sample("trousseau_build_info", &build, 1);
    let well = requests.well(now);
    text.gauge("trousseau_ready", "Whether Encrypt and Decrypt would work, as Status says it");
    text.sample("trousseau_ready", &[], u8::from(well.is_ok()));
    text.gauge("trousseau_key_id_info", "The key_id, hashed as the API server's own metrics hash it");
    if let Ok(key_set) = well {
        text.sample("trousseau_key_id_info", &[("key_id_hash", &hash(&key_set.to_string()))], 1);
    }
    text.gauge("trousseau_gaps", "Tokens that are out of reach, and KEKs that a token lacks");
    text.sample("trousseau_gaps", &[], count(keyring.gaps().len()));
    text.gauge("trousseau_concerns", "What somebody should see to: `trousseau key list` says what");
    text.sample("trousseau_concerns", &[], count(keyring.concerns(now).len()));
    text.gauge(
        "trousseau_ciphertexts_lacking_recipient",
        "Sealed on this host under the key_id of now without a provider",
    );
    for gap in keyring.envelope_gaps(now) {
        let labels = [("provider", gap.provider.as_str()), ("kek", &gap.identity.to_string())];
        text.sample("trousseau_ciphertexts_lacking_recipient", &labels, gap.envelopes);
    }
    let (keks, refused) = keyring.describe(now);
    text.gauge("trousseau_keys_refused", "Keys under the KEKs' label that are not used");
    text.sample("trousseau_keys_refused", &[], count(refused.len()));
    text.keks(&keks);
    let name = "trousseau_kek_proved_timestamp_seconds";
    text.gauge(name, "When an active KEK has last wrapped and unwrapped a value of the plugin's own");
    for (kek, at) in keyring.proofs() {
        text.sample(name, &[("kek", &kek.to_string())], at.as_second());
    }
    text.requests(requests.counters());
    if let Some(audit) = requests.audit() {
        text.counter("trousseau_audit_lost", "Events that could not be written into the audit log");
        text.sample("trousseau_audit_lost_total", &[], audit.lost());
        text.counter(
            "trousseau_audit_rewritten",
            "How often the audit log was found cut off or written anew by others",
        );
        text.sample("trousseau_audit_rewritten_total", &[], audit.rewritten());
    }
    text.vitals(&keyring.vitals());
    text.0 + "# EOF\n"
}

/// As kube-apiserver labels `key_id_hash`: SHA-256 in hex, after the hash's name.
fn hash(key_id: &str) -> String {
    format!("sha256:{}", base16ct::lower::encode_string(&Sha256::digest(key_id)))
}

/// As OpenMetrics writes a number: with a point, and nothing behind it that could be left out.
fn seconds(micros: u64) -> String {
    let text = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
    let short = text.trim_end_matches('0');
    if short.ends_with('.') { format!("{short}0") } else { short.to_owned() }
}

fn count(of: usize) -> i64 {
    of.try_into().unwrap_or(i64::MAX)
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn keks(&mut self, keks: &[KekDescription]) {
        let name = "trousseau_kek_not_before_timestamp_seconds";
        self.gauge(name, "When a KEK may begin to wrap");
        for kek in keks {
            let identity = kek.identity.to_string();
            let labels = [("provider", kek.provider.as_str()), ("kek", &identity), ("state", kek.state.as_str())];
            self.sample(name, &labels, kek.not_before.as_second());
        }
        let name = "trousseau_kek_period_end_timestamp_seconds";
        self.gauge(name, "When the period of an active KEK is over (keyring.max-age)");
        for (kek, ends) in keks.iter().filter_map(|kek| Some((kek, kek.period_ends?))) {
            self.sample(name, &[("provider", &kek.provider), ("kek", &kek.identity.to_string())], ends.as_second());
        }
        let name = "trousseau_kek_lacking";
        self.gauge(name, "A token within reach that lacks a KEK of its replicas");
        for (kek, token) in keks.iter().flat_map(|kek| kek.lacked_by.iter().map(move |token| (kek, token))) {
            let identity = kek.identity.to_string();
            self.sample(name, &[("provider", &kek.provider), ("kek", &identity), ("token", token)], 1);
        }
    }

    fn requests(&mut self, counters: &Counters) {
        let of = |call: Call| [("method", call.method()), ("version", call.version())];
        let all = || Call::ALL.iter().filter_map(|call| Some((*call, counters.of(*call)?)));
        let name = "trousseau_requests";
        self.counter(name, "Requests that were answered, by their gRPC code");
        for (call, counter) in all() {
            for (code, count) in counter.codes() {
                let [method, version] = of(call);
                self.sample(&format!("{name}_total"), &[method, version, ("code", name_of(code))], count);
            }
        }
        let name = "trousseau_request_duration_seconds";
        self.histogram(name, "From a request that was read whole to its answer");
        for (call, counter) in all() {
            self.times(name, &of(call), &counter.times);
        }
    }

    fn vitals(&mut self, parts: &[(&str, Vitals)]) {
        type Of = fn(&Vitals) -> u64;
        let latched = "Whether its last login was refused: no other is tried before something changes";
        let gauges: [(&str, &str, Of); 3] = [
            ("trousseau_token_up", "Whether a token, or a server, can be used, as far as is known", |of| {
                of.is_up.into()
            }),
            ("trousseau_login_refused", latched, |of| of.is_latched.into()),
            ("trousseau_queue_length", "Requests that wait for a session", |of| of.waiting as u64),
        ];
        for (name, help, value) in gauges {
            self.gauge(name, help);
            self.of_parts(name, parts, |part| vec![(None, value(part))]);
        }
        self.counter(
            "trousseau_connections",
            "How often it was connected to: at the start, when it healed, and to renew its module",
        );
        self.of_parts("trousseau_connections_total", parts, |part| vec![(None, part.connections)]);
        self.counter("trousseau_losses", "How often it was lost, by the class of what was wrong");
        let losses =
            |part: &Vitals| part.losses.iter().map(|(class, count)| (Some(("class", *class)), *count)).collect();
        self.of_parts("trousseau_losses_total", parts, losses);
        self.gauge("trousseau_sessions", "Sessions, or calls under way, by state");
        let sessions = |part: &Vitals| {
            part.sessions.iter().map(|(state, count)| (Some(("state", *state)), *count as u64)).collect()
        };
        self.of_parts("trousseau_sessions", parts, sessions);

        type Which = fn(&Times) -> &Histogram;
        let histograms: [(&str, &str, Which); 2] = [
            ("trousseau_queue_duration_seconds", "How long requests waited for a session", |times| &times.queue),
            ("trousseau_call_duration_seconds", "How long their calls took", |times| &times.call),
        ];
        for (name, help, which) in histograms {
            self.histogram(name, help);
            for (provider, Vitals { name: token, times, .. }) in parts {
                self.times(name, &[("provider", provider), ("token", token)], which(times));
            }
        }
    }

    /// The samples of each part of a provider, each with one label more at most.
    fn of_parts<'l>(
        &mut self,
        name: &str,
        parts: &'l [(&str, Vitals)],
        samples: impl Fn(&'l Vitals) -> Vec<(Option<(&'static str, &'l str)>, u64)>,
    ) {
        for (provider, part) in parts {
            for (label, value) in samples(part) {
                let of = [("provider", *provider), ("token", part.name.as_str())];
                self.sample(name, &of.into_iter().chain(label).collect::<Vec<_>>(), value);
            }
        }
    }

    fn times(&mut self, name: &str, labels: &[(&str, &str)], times: &Histogram) {
        let bucket = format!("{name}_bucket");
        let mut all = times.count(); // read once: others go on counting
        for (micros, count) in times.at_most() {
            all = all.max(count);
            self.sample(&bucket, &[labels, &[("le", &seconds(micros))]].concat(), count);
        }
        self.sample(&bucket, &[labels, &[("le", "+Inf")]].concat(), all);
        self.sample(&format!("{name}_count"), labels, all);
        self.sample(&format!("{name}_sum"), labels, seconds(times.micros()));
    }

    fn counter(&mut self, name: &str, help: &str) {
        self.line(format_args!("# TYPE {name} counter\n# HELP {name} {help}"));
    }

    fn histogram(&mut self, name: &str, help: &str) {
        self.line(format_args!("# TYPE {name} histogram\n# UNIT {name} seconds\n# HELP {name} {help}"));
    }

    fn gauge(&mut self, name: &str, help: &str) {
        self.line(format_args!("# TYPE {name} gauge\n# HELP {name} {help}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        match labels.as_slice() {
            [] => self.line(format_args!("{name} {value}")),
            labels => self.line(format_args!("{name}{{{}}} {value}", labels.join(","))),
        }
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        let Self(text) = self;
        // A String takes everything.
        writeln!(text, "{line}").unwrap_or_default();
    }
}

/// A label's value (OpenMetrics 1.0.0, section 3.1.4): a provider's name is the administrator's own.
fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_stay_within_their_quotes() {
        let mut text = Text::default();
        text.sample("a", &[("b", "c\"} 7\nd\\")], 1);
        assert_eq!(text.0, "a{b=\"c\\\"} 7\\nd\\\\\"} 1\n");
    }

    #[test]
    fn a_key_id_is_hashed_as_the_api_server_hashes_it() {
        // echo -n '1' | sha256sum, the label of Kubernetes' own tests
        assert_eq!(hash("1"), "sha256:6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b");
    }
}
