//! The units, as systemd's own tools judge them.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// Runs systemd-analyze on the units, with these drop-ins; what it said is an error if it found fault or said anything
/// of its own accord.
fn analyze(arguments: &[&str], drop_ins: &[&str], units: &[&str]) -> Result<String, String> {
    let directory = TempDir::new().unwrap();
    let packaged = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd");
    for unit in ["trousseau.service", "trousseau.socket", "trousseau-metrics.socket"] {
        // The program must exist.
        let text = fs::read_to_string(packaged.join(unit)).unwrap();
        let text = text.replace("/usr/bin/trousseau", env!("CARGO_BIN_EXE_trousseau"));
        fs::write(directory.path().join(unit), text).unwrap();
    }
    let target = directory.path().join("trousseau.service.d");
    fs::create_dir(&target).unwrap();
    for drop_in in drop_ins {
        fs::copy(packaged.join("drop-ins").join(drop_in), target.join(drop_in)).unwrap();
    }
    let units = units.iter().map(|unit| directory.path().join(unit));
    let done = Command::new("systemd-analyze").args(arguments).args(units).output().unwrap();
    let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
    if done.status.success() { Ok(said) } else { Err(said) }
}

fn lacks_systemd_analyze() -> bool {
    let lacks = Command::new("systemd-analyze").arg("--version").output().is_err();
    if lacks {
        eprintln!("skipped: systemd-analyze is lacking, which is in the package systemd");
    }
    lacks
}

/// What may be added to the unit, and the exposure that it then may have, times ten.
const VARIANTS: [(&[&str], &str); 4] =
    [(&[], "4"), (&["softhsm.conf"], "4"), (&["metrics.conf"], "4"), (&["network.conf"], "12")];

#[test]
fn systemd_finds_no_fault_in_the_units() {
    if lacks_systemd_analyze() {
        return;
    }
    for (drop_ins, _) in VARIANTS {
        let units = ["trousseau.service", "trousseau.socket", "trousseau-metrics.socket"];
        assert_eq!(analyze(&["verify", "--man=no"], drop_ins, &units), Ok(String::new()), "{drop_ins:?}");
    }
}

#[test]
fn the_service_is_exposed_to_little() {
    if lacks_systemd_analyze() {
        return;
    }
    for (drop_ins, limit) in VARIANTS {
        let arguments = ["security", "--offline=true", "--no-pager", &format!("--threshold={limit}")];
        let judged = analyze(&arguments, drop_ins, &["trousseau.service"]);
        assert!(judged.is_ok(), "{drop_ins:?}: {}", judged.unwrap_err());
    }
}
