//! `trousseau migrate`: who may read what it writes. What it writes and says is in `tests/cmd/migrate.trycmd`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

const OLD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cmd/migrate.in/");

/// The plugin's answer, and its standard output and error as one text.
fn convert(old: &Path, out: &Path) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trousseau"));
    let done = command.args(["migrate", "from-trousseau", "--config"]).arg(old).arg("--out").arg(out).output().unwrap();
    (done.status.success(), String::from_utf8([done.stdout, done.stderr].concat()).unwrap())
}

#[test]
fn secrets_go_into_files_for_their_owner_alone_and_are_shown_nowhere() {
    let directory = TempDir::new().unwrap();
    let new = directory.path().join("new");
    let (converted, said) = convert(&Path::new(OLD).join("v2-approle.yaml"), &new);
    assert!(converted, "{said}");
    for (name, mode) in [
        ("", 0o755),
        ("trousseau.toml", 0o644),
        ("credentials.conf", 0o644),
        ("credentials", 0o700),
        ("credentials/vault-role-id", 0o600),
        ("credentials/vault-secret-id", 0o600),
    ] {
        assert_eq!(fs::metadata(new.join(name)).unwrap().permissions().mode() & 0o7777, mode, "{name}");
    }
    let public = ["trousseau.toml", "credentials.conf"].map(|name| fs::read_to_string(new.join(name)).unwrap());
    let secret = fs::read_to_string(new.join("credentials/vault-secret-id")).unwrap();
    assert!(!public.concat().contains(&secret) && !said.contains(&secret), "{said}");
}

#[test]
fn no_refusal_shows_a_secret_and_none_leaves_anything_behind() {
    let directory = TempDir::new().unwrap();
    let new = directory.path().join("new");
    let refused = fs::read_dir(Path::new(OLD).join("refused")).unwrap().map(|entry| entry.unwrap().path());
    for old in refused {
        let (converted, said) = convert(&old, &new);
        assert!(!converted && !said.contains("t-secret") && !said.contains("ssss"), "{}: {said}", old.display());
        assert!(!new.exists(), "{}", old.display());
    }
}

/// By indentation alone, without a bracket: a process that calls itself for each level would end by a signal.
#[test]
fn what_nests_without_end_is_refused_as_well() {
    let directory = TempDir::new().unwrap();
    let old = directory.path().join("old.yaml");
    fs::write(&old, "- ".repeat(50_000)).unwrap();
    let (converted, said) = convert(&old, &directory.path().join("new"));
    assert!(!converted && said.contains("line 1: nested deeper than 16"), "{said}");
}

#[test]
fn where_one_file_is_there_already_none_is_written() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("trousseau.toml"), "mine").unwrap();
    let (converted, said) = convert(&Path::new(OLD).join("v2-approle.yaml"), directory.path());
    assert!(!converted && said.contains("nothing is overwritten"), "{said}");
    assert_eq!(fs::read_to_string(directory.path().join("trousseau.toml")).unwrap(), "mine");
    assert!(
        !directory.path().join("credentials/vault-secret-id").exists()
            && !directory.path().join("credentials.conf").exists()
    );
}
