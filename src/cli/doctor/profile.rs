//! The profiles in use: how far they can be trusted. And `--profile-out`: one of what was found, for a token of which
//! none knows anything yet.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use jiff::Timestamp;

use super::super::VERSION;
use super::Findings;
use crate::config::Config;
use crate::provider::pkcs11::Survey;

const PROFILE: &str = "profile";

/// How far each provider's profile can be trusted, and what it says that no program can check.
pub(super) fn examine(config: &Config, findings: &mut Findings) {
    for profile in config.providers.iter().map(|provider| &provider.profile) {
        match profile.caveat() {
            Some(caveat) => {
                let remedy = format!("try each verb before you rely on it; it is from: {}", profile.sources.join(", "));
                findings.warning(PROFILE, caveat, remedy);
            }
            None => findings.good(PROFILE, format!("{} is tested", profile.name)),
        }
        for note in &profile.notes {
            findings.good(PROFILE, format!("{}: {note}", profile.name));
        }
    }
}

/// Writes it, unless nothing worked; a file that is there stays as it is.
pub(super) fn write(file: &Path, surveys: &[(String, Survey)], findings: &mut Findings) {
    let shown = file.display();
    let works = |(_, survey): &&(String, Survey)| survey.modes.iter().any(|mode| mode.failure.is_none());
    let Some((profile, survey)) = surveys.iter().find(works) else {
        let remedy = "the findings say why; a profile like `generic`, with more modes, may find more";
        return findings.failure(PROFILE, format!("{shown} is not written: no mode was found that works"), remedy);
    };
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    match opened.and_then(|mut file| file.write_all(text(survey, profile).as_bytes())) {
        Ok(()) => {
            findings.good(PROFILE, format!("{shown} is written, from {}: read it before you use it", survey.name))
        }
        Err(error) => {
            findings.failure(
                PROFILE,
                format!("{shown} cannot be written: {error}"),
                "name a file that is not there yet",
            );
        }
    }
}

fn text(survey: &Survey, profile: &str) -> String {
    let (token, module) = (&survey.token, &survey.token.module);
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let found = [
        format!("written by `trousseau doctor` {} at {}", VERSION, Timestamp::now()),
        format!(
            "token {} {}, hardware {}, firmware {}",
            token.manufacturer, token.model, token.hardware, token.firmware
        ),
        format!("module {} {}, SHA-256 {}", module.description, module.version, module.sha256),
        format!("tried with profile {profile}: whatever else that says is not in here, and may be needed"),
    ];
    let failed = survey.modes.iter().filter_map(|mode| Some(format!("mode {}: {}", mode.mode, mode.failure.as_ref()?)));
    let limit = token.max_sessions.filter(|most| *most > 0).map(|most| format!("it allows {most} sessions"));
    // A line of the token's must not end the comment.
    let comment = |line: String| format!("# {}\n", line.replace(char::is_control, " "));
    let comments: String = found.into_iter().chain(limit).chain(failed).map(comment).collect();
    let works = survey.modes.iter().filter(|mode| mode.failure.is_none()).map(|mode| quoted(mode.mode));
    format!(
        "{comments}title = {}\nstatus = \"community\"\nsources = [{}]\nmodule-paths = [{}]\nmodes = [{}]\n",
        quoted(&format!("{} {}", token.manufacturer, token.model)),
        quoted("what `trousseau doctor` found"),
        quoted(&module.path.display().to_string()),
        works.collect::<Vec<_>>().join(", "),
    )
}
