//! The profiles in use: how far they can be trusted. And `--profile-out`: one of what was found, for a token of which
//! none knows anything yet.

use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;

use super::super::VERSION;
use super::Findings;
use crate::config::{Config, Mode, Profile};
use crate::provider::pkcs11::Survey;

const PROFILE: &str = "profile";
/// A profile holds no secret.
const READABLE: u32 = 0o644;

/// How far each provider's profile can be trusted, and what it says that no program can check.
pub(super) fn examine(config: &Config, findings: &mut Findings) {
    for profile in config.pkcs11().map(|provider| &provider.profile) {
        match profile.caveat() {
            Some(caveat) => {
                let remedy = format!("try each verb before you rely on it; it is from: {}", profile.sources.join(", "));
                findings.warning(PROFILE, caveat, remedy);
            }
            None => findings.good(PROFILE, format!("{} is tested", profile.name)),
        }
        for warning in profile.warnings() {
            findings.warning(PROFILE, warning, "");
        }
        for note in &profile.notes {
            findings.good(PROFILE, format!("{}: {note}", profile.name));
        }
    }
}

/// Writes it, unless nothing worked; a file that is there stays as it is.
pub(super) fn write(file: &Path, surveys: &[(Arc<Profile>, Survey)], findings: &mut Findings) {
    let shown = file.display();
    let has_modes = |(profile, survey): &&(Arc<Profile>, Survey)| !kept(profile, survey).is_empty();
    let Some((profile, survey)) = surveys.iter().find(has_modes) else {
        let remedy = "the findings say why; a profile like `generic`, with more modes, may find more";
        return findings.failure(PROFILE, format!("{shown} is not written: no mode was found that works"), remedy);
    };
    let text = match text(survey, profile) {
        Ok(text) => text,
        Err(error) => return findings.failure(PROFILE, format!("{shown} is not written: {error}"), "write it by hand"),
    };
    let opened = OpenOptions::new().write(true).create_new(true).mode(READABLE).open(file);
    // Whatever umask root has: the plugin reads it as a user of its own.
    let readable = opened.and_then(|file| file.set_permissions(Permissions::from_mode(READABLE)).map(|()| file));
    match readable.and_then(|mut file| file.write_all(text.as_bytes())) {
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

/// The modes that worked, and the one whose pairs some tokens make only where doctor writes nothing.
fn kept(profile: &Profile, survey: &Survey) -> Vec<Mode> {
    let worked = |mode: Mode| survey.modes.iter().any(|tried| tried.mode == mode.as_str() && tried.failure.is_none());
    let modes = profile.modes.iter().copied();
    modes.filter(|mode| worked(*mode) || *mode == Mode::Oaep && !is_tried(survey, *mode)).collect()
}

fn is_tried(survey: &Survey, mode: Mode) -> bool {
    survey.modes.iter().any(|tried| tried.mode == mode.as_str() && tried.tried_on.is_some())
}

/// The profile with which the token was tried, but for what was found otherwise.
fn text(survey: &Survey, profile: &Profile) -> Result<String, toml::ser::Error> {
    let (token, module) = (&survey.token, &survey.token.module);
    let found = [
        format!("written by `trousseau doctor` {} at {}", VERSION, Timestamp::now()),
        format!(
            "token {} {}, hardware {}, firmware {}",
            token.manufacturer, token.model, token.hardware, token.firmware
        ),
        format!("module {} {}, SHA-256 {}", module.description, module.version, module.sha256),
        format!("tried with profile {}, from which it has the notes and whatever is not said above", profile.name),
    ];
    let failed = survey.modes.iter().filter_map(|mode| Some(format!("mode {}: {}", mode.mode, mode.failure.as_ref()?)));
    let limit = token.max_sessions.filter(|most| *most > 0).map(|most| format!("it allows {most} sessions"));
    let kept = kept(profile, survey);
    let untried = "mode oaep was not tried: `trousseau key generate --mode oaep` proves it".to_owned();
    let untried = (kept.contains(&Mode::Oaep) && !is_tried(survey, Mode::Oaep)).then_some(untried);
    // A line of the token's must not end the comment.
    let comment = |line: String| format!("# {}\n", line.replace(char::is_control, " "));
    let comments: String = found.into_iter().chain(limit).chain(failed).chain(untried).map(comment).collect();
    let title = format!("{} {}", token.manufacturer, token.model);
    let found = profile.of_token(title, "what `trousseau doctor` found", &module.path, |mode| kept.contains(&mode));
    Ok(format!("{comments}{}", found.to_toml()?))
}
