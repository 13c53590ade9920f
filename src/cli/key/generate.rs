//! `trousseau key generate`: makes a KEK, or shows how it would.

use std::collections::BTreeMap;
use std::time::Instant;

use clap::Args;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::super::output::{Failure, Format, patiently, print, print_json};
use super::super::{ConfigArgs, OutputArgs, assemble, audit, duration};
use super::{TIMEOUT, clock_is_synchronized, in_time};
use crate::config::{AuditConfig, Config, Mode, Pkcs11Config};
use crate::identity::Identity;
use crate::provider::pkcs11::{Generated, LONGEST_WAIT, NotGenerated, Pkcs11, Plan};
use crate::provider::{Attributes, Provider, Value};
use crate::runtime::Leader;

/// How long a KEK waits before it becomes active, so that every control plane has seen it by then.
const DEFAULT_WAIT: SignedDuration = SignedDuration::from_mins(10);

pub(super) const EXAMPLES: &str =
    "Every plugin that uses the token sees the new KEK within 30 seconds, or after a restart \
where its profile has `sees-new-keys = false`; it unwraps with it from then on, and makes it active at its instant. The \
first KEK of a keyring is active at once. Before the instant, `trousseau key list --expect ID` on each host says whether \
its plugin is ready.

It refuses while a configured replica is out of reach, while two keys have one CKA_ID, and while this host's clock is \
not synchronized, which timedatectl tells, or is behind the newest KEK. It makes none in a token that hands out a \
throw-away key like it, unless `[policy] exportable` says so; where none can be tried, it says that. With `[audit] \
on-failure = \"refuse\"` it makes none that cannot be logged; otherwise a KEK of which the audit log has no line is printed, \
and the exit code is 1. If the token is lost meanwhile, the failure and the audit log name the id of the KEK that may have \
been made.

The key is made in the first token. Its vendor's tools clone it to the replicas: do that before the instant. Back up \
the token before a KEK wraps anything that you cannot lose.

Examples:
  trousseau key generate --dry-run
  trousseau key generate
  trousseau key generate --activate-in 1h
  trousseau key generate --provider hsm --mode gcm --output json";

#[derive(Args)]
pub(in super::super) struct GenerateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The provider, where the configuration has several.
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// When it becomes active, from now, 0s to 30d [default: 10m; at once for the first KEK].
    #[arg(long, value_name = "DURATION", value_parser = wait)]
    activate_in: Option<SignedDuration>,
    /// How it wraps [default: the profile's first mode].
    #[arg(long)]
    mode: Option<Mode>,
    /// Go on although this host's clock is not synchronized, or nobody here can tell.
    #[arg(long)]
    unsynchronized_clock_ok: bool,
    /// Show what the token would be asked for, after all the same checks, and make no KEK.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Made<'a> {
    identity: Identity,
    id: String,
    not_before: Timestamp,
    mode: &'static str,
    held_by: &'a [String],
    lacked_by: &'a [String],
    #[serde(flatten)]
    cautions: Cautions<'a>,
}

/// What whoever makes a KEK must know of its token.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Cautions<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    way_out: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    untried: Option<&'a str>,
    /// The profile's.
    warnings: Vec<String>,
}

impl<'a> Cautions<'a> {
    fn of(provider: &Pkcs11Config, plan: &'a Plan) -> Self {
        let warnings = provider.profile.warnings();
        Self { way_out: plan.way_out.as_deref(), untried: plan.untried.as_deref(), warnings }
    }

    fn text(&self) -> String {
        let way_out = self.way_out.map(|way| format!("\n  WARNING     such a key leaves its token: {way}"));
        let untried = self.untried.map(|why| {
            let remedy = "`trousseau key attest` tries it on keys in the token as well";
            format!("\n  not tried   whether such a key leaves its token: {why}: {remedy}")
        });
        let warnings = self.warnings.iter().map(|warning| format!("\n  WARNING     {warning}"));
        way_out.into_iter().chain(untried).chain(warnings).collect()
    }
}

/// What `--dry-run` prints.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Planned<'a> {
    not_before: Timestamp,
    mode: &'static str,
    made_in: &'a str,
    to_be_cloned_to: &'a [String],
    templates: Vec<Template<'a>>,
    #[serde(flatten)]
    cautions: Cautions<'a>,
}

/// What the token is asked for, for one object.
#[derive(Serialize)]
struct Template<'a> {
    object: &'static str,
    attributes: BTreeMap<&'static str, &'a Value>,
}

pub(super) async fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let config = Config::load(&args.config.config)?;
    let provider = assemble::choose_provider(&config, args.provider.as_deref(), |transit| {
        let what = format!("provider {} has its keys made by Vault or OpenBao", transit.name);
        Failure::failed(what, format!("rotate the key there, as who may do so: {}", transit.rotation()))
    })?;
    if let Some(mode) = args.mode.filter(|mode| !provider.profile.modes.contains(mode)) {
        let known: Vec<_> = provider.profile.modes.iter().map(|mode| mode.as_str()).collect();
        let what = format!("profile {} has no mode {}", provider.profile.name, mode.as_str());
        return Err(Failure::usage(what, format!("it has {}", known.join(", "))));
    }
    if let (Some(log), false) = (&config.audit, args.dry_run) {
        audit::can_be_logged(log)
            .map_err(|why| Failure::failed(format!("no KEK is made: {}", why.what()), why.remedy()))?;
    }
    let work = async {
        let (pkcs11, plan, deadline) = plan(&config, provider, args).await?;
        let generated = if args.dry_run { None } else { Some(pkcs11.generate(&plan, deadline).await) };
        Ok((plan, generated))
    };
    let what = format!("making keys in the token of provider {}", provider.name);
    let (plan, generated) = patiently(&what, in_time(work)).await?;
    let generated = generated.transpose().map_err(|failed| not_generated(failed, &plan, config.audit.as_ref()))?;
    // Whoever waits for the log knows the KEK by then.
    let shown = show(args, provider, &plan, generated.as_ref());
    if let (Some(Generated { identity, .. }), Some(log)) = (&generated, &config.audit) {
        let done = format!("KEK {identity} was made");
        audit::append(log, Some(*identity), &done, &format!("active from {}", plan.not_before))?;
    }
    shown
}

/// What failed; a KEK that may be there all the same is written down, since it will become active.
fn not_generated(failed: NotGenerated, plan: &Plan, log: Option<&AuditConfig>) -> Failure {
    if let (Some(left), Some(log)) = (failed.left, log) {
        let id = base16ct::lower::encode_string(&left.id);
        let done = format!("the KEK with id {id} may have been made");
        let what = format!("perhaps: whether it is there is not known; id {id}, active from {}", plan.not_before);
        if let Err(unlogged) = audit::append(log, left.identity, &done, &what) {
            let _the_failures_counts = unlogged.report();
        }
    }
    failed.error.into()
}

fn show(
    args: &GenerateArgs,
    provider: &Pkcs11Config,
    plan: &Plan,
    generated: Option<&Generated>,
) -> Result<(), Failure> {
    match (generated, args.output.output) {
        (Some(generated), Format::Json) => print_json(&made(provider, plan, generated)),
        (Some(generated), Format::Text) => print(&made_text(provider, plan, generated)),
        (None, Format::Json) => print_json(&Planned {
            not_before: plan.not_before,
            mode: plan.mode.as_str(),
            made_in: &plan.made_in,
            to_be_cloned_to: &plan.to_be_cloned_to,
            templates: plan.templates.iter().map(template).collect(),
            cautions: Cautions::of(provider, plan),
        }),
        (None, Format::Text) => print(&planned_text(provider, plan)),
    }
}

fn made<'a>(provider: &Pkcs11Config, plan: &'a Plan, generated: &'a Generated) -> Made<'a> {
    Made {
        identity: generated.identity,
        id: base16ct::lower::encode_string(&generated.id),
        not_before: plan.not_before,
        mode: plan.mode.as_str(),
        held_by: &generated.held_by,
        lacked_by: &generated.lacked_by,
        cautions: Cautions::of(provider, plan),
    }
}

fn made_text(provider: &Pkcs11Config, plan: &Plan, generated: &Generated) -> String {
    let made = made(provider, plan, generated);
    let of_tokens = format!("{} of {} tokens", made.held_by.len(), provider.tokens.len());
    let mut text = format!(
        "KEK {} made on provider {}\n  id          {}\n  mode        {}\n  active from {}\n  held by     {of_tokens}: if \
         all that hold it are lost, so is everything that it wrapped",
        made.identity, provider.name, made.id, made.mode, made.not_before,
    );
    for token in made.lacked_by {
        let lacks = format!(
            "\n  lacked by   {token}: clone the key there with the vendor's tools before {}, or that token cannot serve \
             what it wraps",
            made.not_before
        );
        text.push_str(&lacks);
    }
    text.push_str(&made.cautions.text());
    if made.not_before > Timestamp::now() {
        text.push_str(&format!("\n  until then  on every host: trousseau key list --expect {}", made.id));
    }
    text
}

fn planned_text(provider: &Pkcs11Config, plan: &Plan) -> String {
    let call = match plan.mode {
        Mode::Oaep => "C_GenerateKeyPair CKM_RSA_PKCS_KEY_PAIR_GEN, twice,",
        _ => "C_GenerateKey CKM_AES_KEY_GEN",
    };
    let mut text = format!(
        "no KEK is made; without --dry-run, token {} of provider {} would be asked for {call} with",
        plan.made_in, provider.name
    );
    for (object, template) in &plan.templates {
        if plan.templates.len() > 1 {
            text.push_str(&format!("\n for the {object}"));
        }
        for (name, value) in template {
            let name = format!("CKA_{name}");
            let value = if name == "CKA_ID" { shown_id(value) } else { value.to_string() };
            text.push_str(&format!("\n  {name:<22} {value}"));
        }
    }
    let count = 1 + plan.to_be_cloned_to.len();
    let held_by = format!(
        "\n  mode        {}\n  active from {}\n  held by     1 of {count} tokens: if it is lost before the key is backed \
         up or cloned, so is everything that it wrapped",
        plan.mode.as_str(),
        plan.not_before
    );
    text.push_str(&held_by);
    for token in &plan.to_be_cloned_to {
        text.push_str(&format!("\n  lacked by   {token}, until the vendor's tools have cloned it there"));
    }
    text + &Cautions::of(provider, plan).text()
}

/// All but the 48 bits of time is random, and another value when the key is made.
fn shown_id(id: &Value) -> String {
    let id = id.to_string();
    let (time, signs) = (id.get(..12).unwrap_or_default(), if id.len() > 32 { "01" } else { "" });
    format!(
        "{time}7…{signs} (a UUIDv7 of the instant below{})",
        if signs.is_empty() { "" } else { ", and the byte 01" }
    )
}

fn template<'a>((object, attributes): &'a (&'static str, Attributes)) -> Template<'a> {
    Template { object, attributes: attributes.iter().map(|(name, value)| (*name, value)).collect() }
}

/// The provider, how its next KEK is to be made, and by when all must be done.
async fn plan(
    config: &Config,
    provider: &Pkcs11Config,
    args: &GenerateArgs,
) -> Result<(Pkcs11, Plan, Instant), Failure> {
    let (pkcs11, newest, deadline) = reach(config, provider).await?;
    let wait = match (args.activate_in, newest) {
        (Some(wait), _) => wait,
        (None, Some(_)) => DEFAULT_WAIT,
        (None, None) => SignedDuration::ZERO,
    };
    let not_before = activation_instant(Timestamp::now(), wait, newest, args.unsynchronized_clock_ok)?;
    let plan = pkcs11.plan(not_before, args.mode, deadline).await?;
    Ok((pkcs11, plan, deadline))
}

/// Makes the first KEK of a provider that has none.
pub(in super::super) fn ensure_first(config: &Config, provider: &Pkcs11Config) -> Result<(), Failure> {
    super::super::runtime()?.block_on(in_time(async {
        let (pkcs11, newest, deadline) = reach(config, provider).await?;
        if newest.is_none() {
            let plan = pkcs11.plan(Timestamp::now(), None, deadline).await?;
            pkcs11.generate(&plan, deadline).await.map_err(|failed| failed.error)?;
        }
        Ok(())
    }))
}

/// The provider with every token connected and no doubt about any KEK, the activation instant of its newest KEK, and by
/// when all must be done.
async fn reach(config: &Config, provider: &Pkcs11Config) -> Result<(Pkcs11, Option<Timestamp>, Instant), Failure> {
    let deadline = Instant::now() + TIMEOUT;
    let pkcs11 = assemble::pkcs11(provider, &assemble::state(config)?, &Leader::default())?;
    pkcs11.reach_every_token().await?;
    let sighting = pkcs11.look(deadline).await?;
    if let Some(outage) = sighting.out_of_reach.first() {
        return Err(Failure::unavailable(outage.clone(), ""));
    }
    if let Some(twice) = pkcs11.named_twice(deadline).await.pop() {
        return Err(Failure::failed(twice, "name each token once in `tokens`"));
    }
    if let Some(twin) = sighting.refused.iter().find(|refused| refused.is_ambiguous) {
        return Err(Failure::failed(format!("{}: {}", twin.key, twin.reason), ""));
    }
    let newest = sighting.keks.iter().map(|kek| kek.rank().not_before).max();
    Ok((pkcs11, newest, deadline))
}

/// Reads `--activate-in`.
fn wait(text: &str) -> Result<SignedDuration, String> {
    let wait = duration(text)?;
    if wait > LONGEST_WAIT { Err("it is out of range: 0s to 30d".to_owned()) } else { Ok(wait) }
}

/// The instant, unless this host's clock cannot be right, or the KEK would never become active.
fn activation_instant(
    now: Timestamp,
    wait: SignedDuration,
    newest: Option<Timestamp>,
    unsynchronized_clock_ok: bool,
) -> Result<Timestamp, Failure> {
    // The id of the KEK, which carries the instant, counts milliseconds.
    let instant = now.saturating_add(wait).ok().and_then(|at| Timestamp::from_millisecond(at.as_millisecond()).ok());
    let instant =
        instant.ok_or_else(|| Failure::failed("the instant is out of range", "set this host's clock right"))?;
    // The first KEK's instant is compared with nothing.
    let Some(newest) = newest else { return Ok(instant) };
    if newest >= instant {
        let what =
            format!("the newest KEK is active from {newest}, and this one would be from {instant}: never active");
        return Err(Failure::failed(what, "set this host's clock right, or activate it later with --activate-in"));
    }
    if unsynchronized_clock_ok {
        return Ok(instant);
    }
    match clock_is_synchronized() {
        Some(true) => Ok(instant),
        Some(false) => Err(Failure::failed(
            "this host's clock is not synchronized: other hosts would switch to the KEK at another moment",
            "start chrony or systemd-timesyncd, or give --unsynchronized-clock-ok",
        )),
        None => Err(Failure::failed(
            "whether this host's clock is synchronized cannot be seen here",
            "see `timedatectl` on the host, then give --unsynchronized-clock-ok",
        )),
    }
}
