//! `--profile-out`: a profile of what was found, for a token of which none knows anything yet.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use jiff::Timestamp;

use super::Findings;
use crate::provider::pkcs11::Survey;

const PROFILE: &str = "profile";

/// Writes it, unless nothing worked; a file that is there stays as it is.
pub(super) fn write(file: &Path, surveys: &[Survey], findings: &mut Findings) {
    let shown = file.display();
    let works = |survey: &&Survey| survey.modes.iter().any(|mode| mode.failure.is_none());
    let Some(survey) = surveys.iter().find(works) else {
        let remedy = "the findings say why; a profile like `generic`, with more modes, may find more";
        return findings.failure(PROFILE, format!("{shown} is not written: no mode was found that works"), remedy);
    };
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    match opened.and_then(|mut file| file.write_all(text(survey).as_bytes())) {
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

fn text(survey: &Survey) -> String {
    let (token, module) = (&survey.token, &survey.token.module);
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let found = [
        format!("written by `trousseau doctor` {} at {}", env!("CARGO_PKG_VERSION"), Timestamp::now()),
        format!(
            "token {} {}, hardware {}, firmware {}",
            token.manufacturer, token.model, token.hardware, token.firmware
        ),
        format!("module {} {}, SHA-256 {}", module.description, module.version, module.sha256),
        "only the modes were tried: reinitialize, errors and the like are as the standard has them".to_owned(),
    ];
    let failed = survey.modes.iter().filter_map(|mode| Some(format!("mode {}: {}", mode.mode, mode.failure.as_ref()?)));
    let limit = token.max_sessions.filter(|most| *most > 0).map(|most| format!("it allows {most} sessions"));
    // A line of the token's must not end the comment.
    let comment = |line: String| format!("# {}\n", line.replace(char::is_control, " "));
    let comments: String = found.into_iter().chain(limit).chain(failed).map(comment).collect();
    let works = survey.modes.iter().filter(|mode| mode.failure.is_none()).map(|mode| quoted(mode.mode));
    format!(
        "{comments}title = {}\nstatus = \"community\"\nmodule-paths = [{}]\nmodes = [{}]\n",
        quoted(&format!("{} {}", token.manufacturer, token.model)),
        quoted(&module.path.display().to_string()),
        works.collect::<Vec<_>>().join(", "),
    )
}
