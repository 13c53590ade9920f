//! `trousseau doctor`: everything that a working plugin needs, tried live; each finding with its remedy.
//!
//! [`profile`] is what is known of the tokens before they are asked, [`environment`] what their libraries require,
//! [`host`] the machine, [`audit`] the audit log, [`token`] the tokens and their KEKs, [`transit`] Vault and OpenBao,
//! [`socket`] the plugin that serves, and [`kubernetes`] the API server. No check waits for ever: what blocks is done by a
//! thread that is left behind when its time is over.

mod audit;
mod encryption_config;
mod environment;
mod host;
mod kubernetes;
mod profile;
mod socket;
mod token;
mod transit;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tokio::sync::oneshot;

use super::output::{Failure, Format, print, print_json, table};
use super::{ConfigArgs, OutputArgs, assemble};
use crate::config::Config;
use crate::provider::transit::Purpose;
use crate::runtime::Leader;

pub(super) const EXAMPLES: &str = "It logs in to every token once, and tries what `serve` would; a PIN that the token may \
be about to lock is not tried. On each token it makes throw-away keys that live in its session, and tries to get them out; \
in the mode oaep, whose keys are slow to make, a KEK wraps and unwraps a random value. Nothing is left behind, and it can run beside the serving plugin. Run it as root, else it cannot look into the API server's \
mounts.

Exit code 0: no finding is a failure, though there may be warnings. 1: at least one is.

Examples:
  trousseau doctor
  trousseau doctor --profile-out /etc/trousseau/hsm-profiles/ours.toml
  trousseau doctor --encryption-config /etc/kubernetes/encryption/encryption-config.yaml
  trousseau doctor --config ./trousseau.toml --output json";

/// How long the tokens, and the plugin, may take to answer.
const TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Args)]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The API server's EncryptionConfiguration [default: what an API server here was started with].
    #[arg(long, value_name = "FILE")]
    encryption_config: Option<PathBuf>,
    /// Write a profile of what was found into this new file, for a token that no profile knows.
    #[arg(long, value_name = "FILE")]
    profile_out: Option<PathBuf>,
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

#[derive(Debug, Serialize)]
struct Finding {
    area: &'static str,
    severity: Severity,
    what: String,
    remedy: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, area: &'static str, severity: Severity, what: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { area, severity, what: what.into(), remedy: remedy.into() });
    }

    fn good(&mut self, area: &'static str, what: impl Into<String>) {
        self.add(area, Severity::Good, what, "");
    }

    fn warning(&mut self, area: &'static str, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(area, Severity::Warning, what, remedy);
    }

    fn failure(&mut self, area: &'static str, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(area, Severity::Failure, what, remedy);
    }

    fn failed(&mut self, area: &'static str, failure: &Failure) {
        self.failure(area, failure.what(), failure.remedy());
    }

    /// Adds what a thread finds that may block, unless it does.
    async fn add_from(&mut self, area: &'static str, examine: impl FnOnce(&mut Self) + Send + 'static) {
        let (done, findings) = oneshot::channel();
        let examine = move || {
            let mut findings = Self::default();
            examine(&mut findings);
            let _nobody_waits_any_more = done.send(findings);
        };
        let started = thread::Builder::new().name("doctor".into()).spawn(examine);
        match (started, tokio::time::timeout(TIMEOUT, findings).await) {
            (Ok(_), Ok(Ok(Self(findings)))) => self.0.extend(findings),
            (Err(error), _) => self.failure(area, format!("no thread: {error}"), "raise the limit on threads"),
            _ => self.failure(
                area,
                format!("a check did not end within {} s", TIMEOUT.as_secs()),
                "see what hangs: a module, a file system, or systemd",
            ),
        }
    }
}

pub(super) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let mut findings = Findings::default();
    let runtime = super::runtime()?;
    runtime.block_on(examine(args, &mut findings));
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
        Ok(config) => Arc::new(config),
        Err(error) => return findings.failed("configuration", &error.into()),
    };
    findings.good("configuration", format!("{file} and the files that it names are good"));
    profile::examine(&config, findings);
    let (path, theirs) = (args.config.config.clone(), Arc::clone(&config));
    let examine_host = move |findings: &mut Findings| {
        environment::examine(theirs.pkcs11().map(|provider| &*provider.profile), &path, findings);
        host::examine(&path, findings);
    };
    findings.add_from("host", examine_host).await;
    if let Some(log) = config.audit.clone() {
        let path = args.config.config.clone();
        findings.add_from(audit::AUDIT, move |findings| audit::examine(&path, &log, findings)).await;
    }
    match assemble::state(&config) {
        Ok(state) => {
            if let Err(error) = state.check() {
                findings.failed("state", &error.into());
            }
            // Before the login, which sets the token's count of wrong PINs back.
            let (theirs, of) = (Arc::clone(&config), Arc::clone(&state));
            findings.add_from("PIN", move |findings| token::examine_pins(&theirs, &of, findings)).await;
            match assemble::every_pkcs11(&config, &state, &Leader::default()) {
                Ok(providers) => {
                    let mut surveys = Vec::new();
                    for (pkcs11, provider) in providers.iter().zip(config.pkcs11()) {
                        let found = token::examine(pkcs11, provider, findings).await;
                        surveys.extend(found.into_iter().map(|survey| (Arc::clone(&provider.profile), survey)));
                    }
                    if let Some(file) = &args.profile_out {
                        profile::write(file, &surveys, findings);
                    }
                    let transits = assemble::every_transit(&config, &state, Purpose::Look);
                    for (transit, provider) in transits.iter().zip(config.transit()) {
                        transit::examine(transit, provider, findings).await;
                    }
                    let keyring = assemble::keyring_of(&config, providers, transits, state);
                    token::examine_keks(&keyring, findings).await;
                }
                Err(failure) => findings.failed("token", &failure),
            }
        }
        Err(failure) => findings.failed("state", &failure),
    }
    socket::examine(&args.config.config, &config.listen, findings).await;
    let (theirs, named) = (Arc::clone(&config), args.encryption_config.clone());
    findings.add_from("API server", move |findings| kubernetes::examine(&theirs.listen, named, findings)).await;
    findings.add_from("unit", host::examine_unit).await;
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
