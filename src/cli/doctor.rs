//! `trousseau doctor`: everything that a working plugin needs, tried live; each finding with its remedy.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::output::{Failure, Format, print, print_json, table};
use super::{ConfigArgs, OutputArgs, assemble};
use crate::config::{Config, Listen};
use crate::keyring::{KekState, Keyring};
use crate::provider::Provider;
use crate::provider::pkcs11::Pkcs11;
use crate::runtime::Leader;
use crate::service::client::Client;

pub(super) const EXAMPLES: &str =
    "It logs in to every token once, and tries what `serve` would. It changes nothing, and \
can run beside the serving plugin. Exit code 1: at least one finding is a failure.

Examples:
  trousseau doctor
  trousseau doctor --config ./trousseau.toml --output json";

/// How long the tokens, and the plugin, may take to answer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// What starts an API server, and so must start after us.
const AFTER_US: [&str; 3] = ["kubelet.service", "k3s.service", "rke2-server.service"];

#[derive(Args)]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Severity {
    Good,
    Warning,
    Failure,
}

#[derive(Serialize)]
struct Finding {
    area: &'static str,
    severity: Severity,
    what: String,
    remedy: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn good(&mut self, area: &'static str, what: impl Into<String>) {
        self.0.push(Finding { area, severity: Severity::Good, what: what.into(), remedy: String::new() });
    }

    fn warning(&mut self, area: &'static str, what: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { area, severity: Severity::Warning, what: what.into(), remedy: remedy.into() });
    }

    fn failure(&mut self, area: &'static str, what: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { area, severity: Severity::Failure, what: what.into(), remedy: remedy.into() });
    }

    fn failed(&mut self, area: &'static str, failure: &Failure) {
        self.failure(area, failure.what(), failure.remedy());
    }
}

pub(super) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let mut findings = Findings::default();
    super::runtime()?.block_on(examine(args, &mut findings));
    let Findings(findings) = findings;
    match args.output.output {
        Format::Json => print_json(&findings)?,
        Format::Text => print(&text(&findings))?,
    }
    let failures = findings.iter().filter(|finding| finding.severity == Severity::Failure).count();
    if failures == 0 {
        Ok(())
    } else {
        Err(Failure::failed(format!("{failures} of {} checks failed", findings.len()), ""))
    }
}

async fn examine(args: &DoctorArgs, findings: &mut Findings) {
    let file = args.config.config.display();
    let config = match Config::load(&args.config.config) {
        Ok(config) => config,
        Err(error) => return findings.failed("configuration", &error.into()),
    };
    findings.good("configuration", format!("{file} and the files that it names are good"));
    examine_profiles(&config, findings);
    let state = assemble::state(&config);
    let providers = state.and_then(|state| Ok((assemble::providers(&config, &state, &Leader::default())?, state)));
    match providers {
        Ok((providers, state)) => {
            if let Err(error) = state.check() {
                findings.failed("state", &error.into());
            }
            for provider in &providers {
                examine_tokens(provider, findings).await;
            }
            examine_keys(&assemble::keyring_of(&config, providers, state), findings).await;
        }
        Err(failure) => findings.failed("state", &failure),
    }
    examine_socket(&config.listen, findings).await;
    examine_api_servers(&config.listen, findings);
    examine_unit(findings);
}

/// How far each provider's profile can be trusted, and what it says that no program can check.
fn examine_profiles(config: &Config, findings: &mut Findings) {
    for profile in config.providers.iter().map(|provider| &provider.profile) {
        match profile.caveat() {
            Some(caveat) => {
                let remedy = format!("try each verb before you rely on it; it is from: {}", profile.sources.join(", "));
                findings.warning("profile", caveat, remedy);
            }
            None => findings.good("profile", format!("{} is tested", profile.name)),
        }
        for note in &profile.notes {
            findings.good("profile", format!("{}: {note}", profile.name));
        }
    }
}

/// The module, the slot, the login, and what the token says of itself.
async fn examine_tokens(pkcs11: &Pkcs11, findings: &mut Findings) {
    let deadline = Instant::now() + TIMEOUT;
    let Ok(diagnoses) = tokio::time::timeout(TIMEOUT, pkcs11.diagnose(deadline)).await else {
        let remedy = "see what the vendor's tools say of it";
        return findings.failure("token", format!("provider {}: a token does not answer", pkcs11.name()), remedy);
    };
    for diagnosis in diagnoses {
        match diagnosis {
            Ok(token) if token.complaints.is_empty() => {
                findings.good("token", format!("{} is logged in to", token.name))
            }
            Ok(token) => {
                for (what, remedy) in token.complaints {
                    findings.warning("token", format!("{} {what}", token.name), remedy);
                }
            }
            // These texts end with what to do.
            Err(reason) => findings.failure("token", reason.to_string(), ""),
        }
    }
}

async fn examine_keys(keyring: &Keyring, findings: &mut Findings) {
    let looked = async {
        keyring.settled().await;
        keyring.find_keks().await;
    };
    if tokio::time::timeout(TIMEOUT, looked).await.is_err() {
        return findings.failure("KEK", "the tokens do not answer", "see what their vendor's tools say");
    }
    report_keys(keyring, findings);
}

fn report_keys(keyring: &Keyring, findings: &mut Findings) {
    let (keks, refused) = keyring.describe(Timestamp::now());
    for kek in &keks {
        let held_by = kek.held_by.len();
        let what = format!("{} is {}, on {held_by} tokens, in mode {}", kek.identity, kek.state.as_str(), kek.mode);
        findings.good("KEK", what);
    }
    for refused in refused {
        findings.warning("KEK", format!("{} is not used: {}", refused.key, refused.reason), "");
    }
    for concern in keyring.concerns(Timestamp::now()) {
        findings.warning("KEK", concern, "");
    }
    if !keks.iter().any(|kek| kek.state == KekState::Active) && keyring.outages().is_empty() {
        findings.failure("KEK", "no KEK is active", "make one with `trousseau key generate`");
    }
}

/// Whether a plugin serves, and answers as it should.
async fn examine_socket(listen: &Listen, findings: &mut Findings) {
    let socket = listen.socket.display();
    match fs::metadata(&listen.socket) {
        Ok(metadata) if metadata.mode() & 0o7777 != listen.mode => {
            let what = format!("the mode of {socket} is {:04o}, not {:04o}", metadata.mode() & 0o7777, listen.mode);
            findings.warning("socket", what, "set SocketMode= in the socket unit, or restart the plugin");
        }
        _ => (),
    }
    let status = async { Client::connect(&listen.socket, Duration::from_secs(5)).await?.status().await };
    match status.await {
        Ok(status) => findings.good("socket", format!("{socket} answers: key_id {}", status.key_id)),
        Err(error) => findings.failed("socket", &error.into()),
    }
}

/// The users as which API servers run here must be allowed to connect.
fn examine_api_servers(listen: &Listen, findings: &mut Findings) {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let uids: BTreeSet<u32> = processes
        .filter(|process| fs::read_to_string(process.path().join("comm")).is_ok_and(|name| is_api_server(name.trim())))
        .filter_map(|process| Some(process.metadata().ok()?.uid()))
        .collect();
    for uid in uids {
        if listen.allow_uids.contains(&uid) {
            findings.good("peers", format!("the API server here runs as uid {uid}, which may connect"));
        } else {
            let what = format!("the API server here runs as uid {uid}, which may not connect");
            findings.failure("peers", what, format!("add {uid} to listen.allow-uids"));
        }
    }
}

/// Names of processes, as comm(5) cuts them.
fn is_api_server(name: &str) -> bool {
    ["kube-apiserver", "k3s-server", "k3s", "rke2"].contains(&name)
}

/// Under systemd, the unit must be ordered before what starts the API server.
fn examine_unit(findings: &mut Findings) {
    let properties = ["show", "trousseau.service", "--property=LoadState,Before"];
    let Ok(answer) = Command::new("systemctl").args(properties).output() else { return };
    let shown = String::from_utf8_lossy(&answer.stdout);
    if !shown.contains("LoadState=loaded") {
        return; // not run by systemd, or not by this one
    }
    let before: BTreeSet<&str> =
        shown.lines().filter_map(|line| line.strip_prefix("Before=")).flat_map(str::split_whitespace).collect();
    match AFTER_US.iter().find(|unit| !before.contains(*unit)) {
        None => findings.good("unit", "trousseau.service starts before kubelet, k3s and rke2-server"),
        Some(unit) => {
            let what = format!("trousseau.service is not ordered before {unit}: a boot may wait for what waits for it");
            findings.failure("unit", what, format!("add Before={unit} to the unit and `systemctl daemon-reload`"));
        }
    }
}

fn text(findings: &[Finding]) -> String {
    let row = |finding: &Finding| {
        let mark = match finding.severity {
            Severity::Good => "good",
            Severity::Warning => "warning",
            Severity::Failure => "FAILURE",
        };
        let mut what = finding.what.clone();
        if !finding.remedy.is_empty() {
            what.push_str("\n-> ");
            what.push_str(&finding.remedy);
        }
        vec![finding.area.to_owned(), mark.to_owned(), what]
    };
    table(&["AREA", "", "FINDING"], findings.iter().map(row).collect())
}
