//! The environment variables that a vendor's library requires: whether this process has them, and the one that serves.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::Findings;
use super::host;
use crate::config::Profile;

const ENVIRONMENT: &str = "environment";

/// Whose environment it is, and what is set there: `None` if that cannot be told.
type Known = (String, Option<Vec<String>>);

/// What is required, here and where the plugin runs, or will.
pub(super) fn examine<'p>(profiles: impl Iterator<Item = &'p Profile>, config: &Path, findings: &mut Findings) {
    let mut theirs = None;
    for profile in profiles.filter(|profile| !profile.environment.is_empty()) {
        let theirs = theirs.get_or_insert_with(|| of_plugin(config));
        examine_profile(profile, theirs.as_ref(), |name| std::env::var_os(name).is_some(), findings);
    }
}

fn examine_profile(
    profile: &Profile,
    theirs: Option<&Known>,
    is_set_here: impl Fn(&str) -> bool,
    findings: &mut Findings,
) {
    let Profile { name: of, .. } = profile;
    for name in &profile.environment {
        if !is_set_here(name) {
            let what = format!("{name}, which the library of profile {of} requires, is not set for this command");
            findings.warning(ENVIRONMENT, what, format!("set it: {name}=… trousseau doctor, as the plugin has it"));
        }
        match theirs {
            Some((who, Some(set))) if set.iter().any(|set| set == name) => {
                findings
                    .good(ENVIRONMENT, format!("{name}, which the library of profile {of} requires, is set for {who}"));
            }
            Some((who, Some(_))) => findings.failure(
                ENVIRONMENT,
                format!("{name}, which the library of profile {of} requires, is not set for {who}"),
                format!("`systemctl edit trousseau.service`: [Service], Environment={name}=…; and restart the plugin"),
            ),
            Some((who, None)) => findings.warning(
                ENVIRONMENT,
                format!("whether {name}, which the library of profile {of} requires, is set for {who} cannot be told"),
                "run it as root",
            ),
            None => (), // neither runs nor has a unit here
        }
    }
}

/// The environment of the process that serves, if one does, else of its unit.
fn of_plugin(config: &Path) -> Option<Known> {
    if let Some(plugin) = host::plugin(config) {
        let environment = fs::read(format!("{}/environ", plugin.path)).ok();
        let set = environment.map(|environment| names(String::from_utf8_lossy(&environment).split('\0')));
        return Some((format!("the serving plugin (pid {})", plugin.pid), set));
    }
    let properties = ["show", "trousseau.service", "--property=LoadState,Environment,EnvironmentFiles"];
    let answer = Command::new("systemctl").args(properties).output().ok()?;
    of_unit(&String::from_utf8_lossy(&answer.stdout))
}

/// From what `systemctl show` says of the unit. Files are not read: systemd reads them when it starts the unit.
fn of_unit(shown: &str) -> Option<Known> {
    let line = |name: &str| shown.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    if line("LoadState=") != "loaded" {
        return None;
    }
    let has_files = !line("EnvironmentFiles=").is_empty();
    let set = names(line("Environment=").split_whitespace().map(|word| word.trim_start_matches('"')));
    Some(("the unit trousseau.service".into(), (!has_files).then_some(set)))
}

fn names<'a>(assignments: impl Iterator<Item = &'a str>) -> Vec<String> {
    assignments.filter_map(|set| set.split_once('=')).map(|(name, _)| name.to_owned()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Severity::{Failure, Good, Warning};
    use super::*;

    #[test]
    fn what_is_not_set_is_told_of_where_it_is_missing() {
        let text =
            "title = \"a\"\nstatus = \"tested\"\nmodule-paths = []\nmodes = [\"gcm\"]\nenvironment = [\"A_CFG\"]";
        let profile: Profile = toml::from_str(text).unwrap();
        let unit = |rest: &str| of_unit(&format!("LoadState=loaded\n{rest}"));
        for (case, theirs, here, expected) in [
            ("nowhere else", None, false, &[Warning][..]),
            ("only here", None, true, &[]),
            ("no unit", of_unit("LoadState=not-found\nEnvironment="), true, &[]),
            ("in both", unit("Environment=B=1 A_CFG=/a"), true, &[Good]),
            ("quoted", unit("Environment=\"A_CFG=/a b\" B=1"), true, &[Good]),
            ("not in the unit", unit("Environment=B=A_CFG"), true, &[Failure]),
            ("in neither", unit("Environment="), false, &[Warning, Failure]),
            ("perhaps", unit("Environment=\nEnvironmentFiles=/etc/x (ignore_errors=no)"), true, &[Warning]),
        ] {
            let mut findings = Findings::default();
            examine_profile(&profile, theirs.as_ref(), |_| here, &mut findings);
            let found: Vec<_> = findings.0.iter().map(|finding| finding.severity).collect();
            assert_eq!(found, expected, "{case}: {:?}", findings.0);
        }
    }
}
