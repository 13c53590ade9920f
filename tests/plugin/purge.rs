//! What `apt purge` deletes: all that the plugin itself writes into its state directory, and nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::plugin::Host;

/// Each name of a state file that the sources have, with something in the place of what differs.
fn names_in_sources() -> BTreeSet<String> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let rooms = fs::read_dir(sources.join("state")).unwrap().map(|entry| entry.unwrap().path());
    let texts = rooms.chain([sources.join("state.rs")]).map(|file| fs::read_to_string(file).unwrap());
    let is_name = |literal: &&str| [".json", ".login", ".lock"].iter().any(|end| literal.ends_with(end));
    let named = |text: String| -> Vec<String> {
        let (text, _tests) = text.split_once("#[cfg(test)]").unwrap_or((&text, ""));
        let literals = text.split('"').skip(1).step_by(2).filter(is_name);
        // A login is noted under the name of its token: `Latch::new`.
        literals.map(|name| name.replace("{token}", "pin-0a").replace(['{', '}'], "")).collect()
    };
    texts.flat_map(named).collect()
}

#[test]
fn a_purge_deletes_what_the_plugin_has_noted_and_nothing_else() {
    let host = Host::new();
    host.generate("0s");
    host.serve_healthy().round_trip();
    let state = host.path("state");
    let mut names = names_in_sources();
    assert!(names.len() >= 9 && names.contains("gaps.json"), "{names:?}");
    names.extend(names.clone().iter().filter(|name| name.ends_with(".json")).map(|name| format!("{name}.new")));
    names.iter().for_each(|name| fs::write(state.join(name), "").unwrap());
    let others = ["token.object", "tpm2_pkcs11.sqlite3", "note.txt"];
    others.iter().for_each(|name| fs::write(state.join(name), "").unwrap());

    // Nothing of this host's.
    let script = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/deb/postrm")).unwrap();
    let script = script.replace("/var/lib/trousseau", state.to_str().unwrap()).replace("deb-systemd-helper", "absent");
    let nowhere = host.path("nowhere").display().to_string();
    let script = script.replace("/var/log/trousseau", &nowhere).replace("/etc/trousseau", &nowhere);
    let done = Command::new("sh").args(["-c", &script, "postrm", "purge"]).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    let left = fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.collect::<BTreeSet<_>>(), BTreeSet::from(others.map(str::to_owned)));
    assert!(String::from_utf8_lossy(&done.stdout).contains("has files that the package did not make"), "{done:?}");
}
