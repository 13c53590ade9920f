//! The units, as systemd's own tools judge them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// Runs systemd-analyze on the units, with this drop-in; what it said is an error if it found fault or said anything
/// of its own accord.
fn analyze(arguments: &[&str], drop_in: Option<&str>, units: &[&str]) -> Result<String, String> {
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
    if let Some(drop_in) = drop_in.map(|name| format!("{name}.conf")) {
        let text = fs::read_to_string(packaged.join("drop-ins").join(&drop_in)).unwrap();
        fs::write(target.join(&drop_in), &text).unwrap();
        if text.contains("PrivateNetwork=no") {
            // As packaging/README.md says.
            fs::write(target.join("addresses.conf"), "[Service]\nIPAddressAllow=192.0.2.10 localhost\n").unwrap();
        }
    }
    let units = units.iter().map(|unit| directory.path().join(unit));
    let done = Command::new("systemd-analyze").args(arguments).args(units).output().unwrap();
    let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
    if done.status.success() { Ok(said) } else { Err(said) }
}

fn lacks_systemd_analyze() -> bool {
    let lacks = Command::new("systemd-analyze").arg("--version").output().is_err();
    if lacks {
        assert!(std::env::var_os("TROUSSEAU_TEST_REQUIRE").is_none(), "install systemd");
        eprintln!("skipped: systemd-analyze is lacking, which is in the package systemd");
    }
    lacks
}

/// Each drop-in, and the exposure that the service may have with it, times ten.
pub const DROP_INS: [(&str, u32); 15] = [
    ("aws-cloudhsm", 12),
    ("fortanix", 12),
    ("google-cloud-kms", 12),
    ("hpcs", 12),
    ("luna", 12),
    ("metrics", 4),
    ("nethsm", 12),
    ("nshield", 4),
    ("opencryptoki", 4),
    ("securosys", 12),
    ("softhsm", 4),
    ("tpm2", 4),
    ("transit", 12),
    ("utimaco", 12),
    ("yubihsm", 4),
];
/// Drop-ins that belong to no profile.
const OTHERS: [&str; 2] = ["metrics", "transit"];

/// The unit as it is, and with each drop-in alone.
fn variants() -> impl Iterator<Item = (Option<&'static str>, u32)> {
    let with = DROP_INS.map(|(name, limit)| (Some(name), limit));
    [(None, 4)].into_iter().chain(with)
}

/// What is in this directory of the repository, by name without its ending.
fn texts(directory: &str, ending: &str) -> BTreeMap<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let files = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|file| file.extension().is_some_and(|extension| extension == ending))
        .map(|file| (file.file_stem().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(&file).unwrap()))
        .collect()
}

#[test]
fn each_drop_in_is_a_profiles_and_says_how_that_is_known() {
    let drop_ins = texts("packaging/systemd/drop-ins", "conf");
    assert!(drop_ins.keys().eq(DROP_INS.iter().map(|(name, _)| name)), "{:?}", drop_ins.keys());
    let profiles = texts("hsm-profiles", "toml");
    for (name, drop_in) in &drop_ins {
        if OTHERS.contains(&name.as_str()) {
            continue;
        }
        let profile: toml::Table = profiles.get(name).expect(name).parse().unwrap();
        let head = format!("# Profile {name}, {}", profile["status"].as_str().unwrap());
        assert!(drop_in.starts_with(&head), "{name}.conf does not begin with: {head}");
        // Without these the library does not work.
        for variable in profile.get("environment").and_then(toml::Value::as_array).into_iter().flatten() {
            let line = format!("\nEnvironment={}=", variable.as_str().unwrap());
            assert!(drop_in.contains(&line), "{name}.conf lacks {line}");
        }
    }
    let readme = &texts("packaging", "md")["README"];
    for name in profiles.keys().filter(|name| *name != "README") {
        assert!(
            readme.contains(&format!("`{name}`")),
            "packaging/README.md says of {name} neither what its drop-in opens nor that it has none"
        );
    }
}

#[test]
fn no_unit_gives_the_sockets_directory_to_the_services_user() {
    for directory in ["packaging/systemd", "packaging/systemd/drop-ins"] {
        for (name, unit) in ["service", "socket", "conf"].into_iter().flat_map(|ending| texts(directory, ending)) {
            let gives = unit.lines().find(|line| line.starts_with("RuntimeDirectory"));
            assert_eq!(gives, None, "{name}: systemd, as root, gives what lies there to SocketUser=, links followed");
        }
    }
    let guides = texts("packaging/guides", "md");
    assert!(guides.values().all(|guide| !guide.contains("RuntimeDirectory")));
}

#[test]
fn no_unit_hides_from_the_service_who_connects() {
    for directory in ["packaging/systemd", "packaging/systemd/drop-ins"] {
        for (name, unit) in ["service", "conf"].into_iter().flat_map(|ending| texts(directory, ending)) {
            let hides = unit.lines().find(|line| line.starts_with("PrivateUsers"));
            assert_eq!(hides, None, "{name}: every peer but root and the service's user would be seen as uid 65534");
        }
    }
}

#[test]
fn systemd_finds_no_fault_in_the_units() {
    if lacks_systemd_analyze() {
        return;
    }
    for (drop_in, _) in variants() {
        let units = ["trousseau.service", "trousseau.socket", "trousseau-metrics.socket"];
        assert_eq!(analyze(&["verify", "--man=no"], drop_in, &units), Ok(String::new()), "{drop_in:?}");
    }
}

#[test]
fn the_service_is_exposed_to_little() {
    if lacks_systemd_analyze() {
        return;
    }
    for (drop_in, limit) in variants() {
        let arguments = ["security", "--offline=true", "--no-pager", &format!("--threshold={limit}")];
        let judged = analyze(&arguments, drop_in, &["trousseau.service"]);
        assert!(judged.is_ok(), "{drop_in:?}: {}", judged.unwrap_err());
    }
}
