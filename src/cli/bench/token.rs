//! A token alone: calls straight at its sessions, in this process.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::Call;
use super::figures::Figures;
use super::progress::Progress;
use super::verdict::{Step, counted, still_rises};
use crate::cli::assemble;
use crate::cli::output::Failure;
use crate::config::Config;
use crate::provider::Provider;
use crate::provider::pkcs11::{Operation, Pkcs11};
use crate::runtime::Leader;

/// How long the token may take to say which KEKs it has.
const PATIENCE: Duration = Duration::from_secs(30);

/// The token of the provider that seals.
pub(super) struct Token {
    pkcs11: Pkcs11,
    /// How many sessions the configuration gives it.
    pub(super) sessions: usize,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Level {
    pub(super) call: Call,
    pub(super) sessions: usize,
    #[serde(flatten)]
    pub(super) figures: Figures,
}

/// What was measured, and why no more sessions were tried where the token gave none.
#[derive(Default)]
pub(super) struct Levels {
    pub(super) levels: Vec<Level>,
    pub(super) refused: Option<String>,
}

impl Token {
    /// `None`: there is none.
    pub(super) async fn open(config: &Config) -> Result<Option<Self>, Failure> {
        let Some(provider) = config.pkcs11().find(|provider| provider.seal) else { return Ok(None) };
        let state = assemble::state(config)?;
        let pkcs11 = assemble::pkcs11(provider, &state, &Leader::default())?;
        pkcs11.reach_every_token().await?;
        pkcs11.look(Instant::now() + PATIENCE).await?;
        Ok(Some(Self { pkcs11, sessions: provider.sessions }))
    }

    /// 1, 2, 4, … sessions at a time, as many as are configured, and twice as many (would more bring more?), of these
    /// no more than `max`.
    pub(super) fn steps(&self, max: usize) -> BTreeSet<usize> {
        let doubled = std::iter::successors(Some(1), |sessions| Some(sessions * 2));
        let configured = [self.sessions, 2 * self.sessions].into_iter().filter(|sessions| *sessions <= max);
        doubled.take_while(|sessions| *sessions <= max).chain(configured).collect()
    }

    /// Measures each number of sessions, until more of them bring no more.
    pub(super) fn measure(
        &self,
        calls: &[Call],
        max: usize,
        time: Duration,
        progress: &Progress,
    ) -> Result<Levels, Failure> {
        let mut measured = Levels::default();
        for sessions in self.steps(max) {
            for call in calls {
                progress.says(format!("{call:?} of the token alone, {} at a time", counted(sessions)));
                match self.measure_level(*call, sessions, time) {
                    Ok(level) => measured.levels.push(level),
                    Err(failure) if measured.levels.is_empty() => return Err(failure),
                    Err(failure) => {
                        measured.refused = Some(format!("{} at a time: {failure}", counted(sessions)));
                        return Ok(measured);
                    }
                }
            }
            if sessions >= self.sessions && !calls.iter().any(|call| still_rises(&measured.steps_of(*call))) {
                break;
            }
        }
        Ok(measured)
    }

    fn measure_level(&self, call: Call, sessions: usize, time: Duration) -> Result<Level, Failure> {
        let operation = match call {
            Call::Encrypt => Operation::Wrap,
            Call::Decrypt => Operation::Unwrap,
        };
        let before = cpu_time();
        let took = self.pkcs11.time(operation, sessions, time)?;
        let cpu = cpu_time().saturating_sub(before);
        // Each session did one call after the other: its rate is the inverse of its mean.
        let rate = |took: &Vec<Duration>| took.len() as f64 / took.iter().sum::<Duration>().as_secs_f64();
        let per_second = took.iter().filter(|took| !took.is_empty()).map(rate).sum();
        Ok(Level { call, sessions, figures: Figures::new(took.concat(), per_second, Some(cpu)) })
    }
}

impl Levels {
    /// What a verdict needs of them.
    pub(super) fn steps_of(&self, call: Call) -> Vec<Step> {
        let step = |level: &Level| Step {
            sessions: level.sessions,
            per_second: level.figures.per_second,
            call_micros: level.figures.mean_micros,
        };
        self.levels.iter().filter(|level| level.call == call).map(step).collect()
    }
}

/// What this process has used.
fn cpu_time() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime)).unwrap_or_default()
}
