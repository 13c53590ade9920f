//! `trousseau key attest`: a report for a file cabinet. What the tokens say of the KEKs and of themselves, whether a key
//! like them can be got out, and with what software, where and when that was found.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::output::{Failure, Format, patiently, print, print_json};
use super::{ConfigArgs, OutputArgs, VERSION, assemble};
use crate::config::{Config, Exportable, Pkcs11Config, Status, TransitConfig};
use crate::disk;
use crate::provider::pkcs11::{KeyFacts, Outcome, Survey, Trials};
use crate::runtime::Leader;

pub(super) const EXAMPLES: &str = "It changes nothing about a KEK: of these it reads attributes only. What it tries, it \
tries on throw-away keys that it makes like a KEK and destroys: in a session where the token makes such keys, else in the \
token. A provider of type transit is named and not examined: whoever reads its key there can open every DEK as well, and the \
verdict is keys-stay-with-warnings at best. Exit code 1: key bytes came out, or a token could not be tried for a kind of KEK \
that it has; 69: one is out of reach; 2: no provider has tokens. Redirect the report into a file and keep it.

Examples:
  trousseau key attest
  trousseau key attest --output json > attestation.json";

/// How long the tokens may take. A slow one makes some twenty keys in it.
const TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Args)]
pub(super) struct AttestArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Attestation {
    time: Timestamp,
    host: String,
    software: Software,
    configuration: PathBuf,
    cluster: String,
    verdict: Verdict,
    providers: Vec<Provider>,
    not_examined: Vec<NotExamined>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Software {
    version: &'static str,
    binary: PathBuf,
    sha256: String,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Provider {
    name: String,
    profile: String,
    profile_status: Status,
    /// The same, for people, if it is not tested.
    #[serde(skip)]
    caveat: Option<String>,
    policy: Policy,
    tokens: Vec<Survey>,
    out_of_reach: Vec<String>,
    /// Tokens that are no replicas, for they are one.
    named_twice: Vec<String>,
}

/// A provider without tokens, whose KEKs open every DEK that they wrapped as well.
#[derive(Serialize)]
struct NotExamined {
    provider: String,
    #[serde(rename = "type")]
    of_type: &'static str,
}

impl NotExamined {
    fn of(config: &TransitConfig) -> Self {
        Self { provider: config.name.clone(), of_type: "transit" }
    }
}

#[derive(Serialize)]
struct Policy {
    exportable: Exportable,
}

/// The worst that was found on any token.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    KeysStay,
    KeysStayWithWarnings,
    Unproven,
    KeyBytesCameOut,
}

impl Verdict {
    fn of(trials: &Trials) -> Self {
        match trials.verdict() {
            Outcome::Refused => Self::KeysStay,
            Outcome::Warning => Self::KeysStayWithWarnings,
            Outcome::NotTried => Self::Unproven,
            Outcome::CameOut => Self::KeyBytesCameOut,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::KeysStay => "no way that was tried got key bytes out",
            Self::KeysStayWithWarnings => "no way that was tried got key bytes out; there are warnings",
            Self::Unproven => "NOT PROVED: a token could not be tried for a kind of KEK",
            Self::KeyBytesCameOut => "KEY BYTES CAME OUT",
        }
    }
}

pub(super) async fn attest(args: &AttestArgs) -> Result<(), Failure> {
    let config = Config::load(&args.config.config)?;
    if config.pkcs11().next().is_none() {
        let remedy = "`trousseau key list --attributes` shows what Vault or OpenBao says of its key";
        return Err(Failure::usage("no provider has tokens: there is nothing to attest", remedy));
    }
    let state = assemble::state(&config)?;
    let mut providers = Vec::new();
    for provider in config.pkcs11() {
        let pkcs11 = assemble::pkcs11(provider, &state, &Leader::default())?;
        let deadline = Instant::now() + TIMEOUT;
        let late = "its tokens did not answer within two minutes";
        let what = format!("trying to get throw-away keys out of the tokens of provider {}", provider.name);
        let surveys = patiently(&what, tokio::time::timeout(TIMEOUT, pkcs11.survey(true, deadline))).await;
        providers.push(match surveys {
            Ok(surveys) => {
                let (tokens, lost): (Vec<_>, Vec<_>) = surveys.into_iter().partition(Result::is_ok);
                let lost = lost.into_iter().filter_map(Result::err).map(|error| error.to_string()).collect();
                let twice = pkcs11.named_twice(deadline).await;
                described(provider, tokens.into_iter().flatten().collect(), lost, twice)
            }
            Err(_) => described(provider, Vec::new(), vec![format!("provider {}: {late}", provider.name)], Vec::new()),
        });
    }
    let not_examined: Vec<NotExamined> = config.transit().map(NotExamined::of).collect();
    let verdicts = providers.iter().flat_map(|provider| {
        let tried = provider.tokens.iter().map(|token| Verdict::of(&token.exportability));
        tried.chain(provider.out_of_reach.iter().map(|_| Verdict::Unproven))
    });
    let verdicts = verdicts.chain(not_examined.iter().map(|_| Verdict::KeysStayWithWarnings));
    let attestation = Attestation {
        time: Timestamp::now(),
        host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
        software: software(),
        configuration: args.config.config.clone(),
        cluster: config.keyring.cluster,
        verdict: verdicts.max().unwrap_or(Verdict::Unproven),
        providers,
        not_examined,
    };
    match args.output.output {
        Format::Json => print_json(&attestation)?,
        Format::Text => print(&text(&attestation))?,
    }
    conclude(&attestation)
}

fn described(
    provider: &Pkcs11Config,
    tokens: Vec<Survey>,
    out_of_reach: Vec<String>,
    named_twice: Vec<String>,
) -> Provider {
    Provider {
        name: provider.name.clone(),
        profile: provider.profile.name.clone(),
        profile_status: provider.profile.status,
        caveat: provider.profile.caveat(),
        policy: Policy { exportable: provider.exportable },
        tokens,
        out_of_reach,
        named_twice,
    }
}

/// The exit code.
fn conclude(attestation: &Attestation) -> Result<(), Failure> {
    match attestation.verdict {
        Verdict::KeyBytesCameOut => {
            let remedy = "use another token: this one keeps a KEK only from those who do not ask for it";
            return Err(Failure::failed("key bytes came out of a token", remedy));
        }
        Verdict::KeysStay | Verdict::KeysStayWithWarnings | Verdict::Unproven => (),
    }
    if let Some(lost) = attestation.providers.iter().flat_map(|provider| &provider.out_of_reach).next() {
        return Err(Failure::unavailable(lost.clone(), ""));
    }
    match attestation.verdict {
        Verdict::Unproven => {
            Err(Failure::failed(Verdict::Unproven.as_str(), "the report says what the token answered"))
        }
        _ => Ok(()),
    }
}

/// What made the report. The running file is hashed, whatever now lies in its place.
fn software() -> Software {
    let running = PathBuf::from("/proc/self/exe");
    Software {
        version: VERSION,
        sha256: disk::sha256(&running).unwrap_or_else(|error| format!("cannot be read: {error}")),
        binary: std::fs::read_link(&running).unwrap_or(running),
    }
}

fn text(attestation: &Attestation) -> String {
    let Attestation { time, host, software, configuration, cluster, verdict, providers, not_examined } = attestation;
    let mut text = format!(
        "Attestation of the key-encryption keys of cluster {cluster}\n\nverdict        {}\ntime           {time}\n\
         host           {host}\nsoftware       trousseau {}\n  binary       {}\n  SHA-256      {}\nconfiguration  {}\n",
        verdict.as_str(),
        software.version,
        software.binary.display(),
        software.sha256,
        configuration.display(),
    );
    for provider in providers {
        let _infallible = writeln!(
            text,
            "\nprovider {}\n  {}\n  [policy] exportable = \"{}\"",
            provider.name,
            provider.caveat.as_ref().unwrap_or(&format!("profile {} is tested", provider.profile)),
            provider.policy.exportable.as_str(),
        );
        for lost in &provider.out_of_reach {
            let _infallible = writeln!(text, "  OUT OF REACH: {lost}");
        }
        for twice in &provider.named_twice {
            let _infallible = writeln!(text, "  NAMED TWICE: {twice}");
        }
        provider.tokens.iter().for_each(|token| tell_token(&mut text, token));
    }
    for NotExamined { provider, of_type } in not_examined {
        let _infallible = writeln!(
            text,
            "\nprovider {provider}\n  NOT EXAMINED: of type {of_type}: whoever reads its key there can open every data key as \
             well; `trousseau key list --attributes` shows what its server says of it"
        );
    }
    text.truncate(text.trim_end().len());
    text
}

fn tell_token(text: &mut String, survey: &Survey) {
    let (token, module) = (&survey.token, &survey.token.module);
    let lines = [
        ("label", token.label.clone()),
        ("manufacturer", token.manufacturer.clone()),
        ("model", token.model.clone()),
        ("serial", token.serial.clone()),
        ("hardware", token.hardware.clone()),
        ("firmware", token.firmware.clone()),
        ("flags", token.flags.join(" ")),
        ("module", module.path.display().to_string()),
        ("SHA-256", module.sha256.clone()),
        ("library", format!("{}, {}, version {}", module.description, module.manufacturer, module.version)),
        ("PKCS#11", module.pkcs11.clone()),
    ];
    let _infallible = writeln!(text, "\n  {}", survey.name);
    for (name, value) in lines {
        let _infallible = writeln!(text, "    {name:<13}{value}");
    }
    for mode in &survey.modes {
        let told = mode.failure.as_deref().unwrap_or("wraps and unwraps");
        let _infallible = writeln!(text, "    mode {:<12} {told}", mode.mode);
    }
    let on = match survey.exportability.throw_away {
        Some(on) => format!("on {} like a KEK", on.as_str()),
        None => "nothing could be made to try it on".into(),
    };
    let _infallible = writeln!(text, "\n    ways out that were tried, {on}");
    for trial in &survey.exportability.trials {
        let _infallible =
            writeln!(text, "      {:<10}{} ({}): {}", trial.outcome.as_str(), trial.way, trial.like, trial.what);
    }
    if survey.keys.is_empty() {
        let _infallible = writeln!(text, "\n    no key has the KEKs' label");
    }
    survey.keys.iter().for_each(|key| tell_key(text, key));
}

fn tell_key(text: &mut String, key: &KeyFacts) {
    let id = key.id.as_deref().unwrap_or("without CKA_ID");
    let _infallible = match key.identity {
        Some(identity) if key.refused.is_none() => writeln!(text, "\n    KEK {identity}\n      id {id}"),
        _ => writeln!(text, "\n    key {id}"),
    };
    for (what, why) in [("NOT USED", &key.refused), ("EXCEPTION", &key.exception)] {
        if let Some(why) = why {
            let _infallible = writeln!(text, "      {what}: {why}");
        }
    }
    for (name, value) in &key.attributes {
        let value = match value {
            Some(value) => value.to_string(),
            None => "(not said)".into(),
        };
        let _infallible = writeln!(text, "      {name:<20}{value}");
    }
}
