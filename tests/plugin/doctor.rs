//! `doctor`: what is made wrong is found, with a remedy, and nothing else is called a failure.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fault_module::{Faults, library};
use crate::plugin::{Host, admit};
use crate::token::{Family, Key};

/// What doctor finds about a host; with its exit code.
fn findings(host: &Host, more: &[&str]) -> (Vec<Value>, Option<i32>) {
    let done = host.run(&[&["doctor", "--output", "json"], more].concat());
    (serde_json::from_slice(&done.stdout).unwrap_or_else(|error| panic!("{error}: {done:?}")), done.status.code())
}

fn has(findings: &[Value], area: &str, severity: &str, words: &str) -> bool {
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    findings.iter().any(|finding| {
        let told = text(finding, "what") + ": " + &text(finding, "remedy");
        text(finding, "area") == area && text(finding, "severity") == severity && told.contains(words)
    })
}

#[test]
fn what_is_made_wrong_is_found_with_a_remedy() {
    if Family::chosen().lacks_aes() {
        return;
    }
    type Break = fn(&mut Host) -> Vec<&'static str>;
    let cases: [(&str, Break, &str, &str, &str); 8] = [
        ("no listener but the plugin", |_| vec![], "socket", "good", "serve --config"),
        (
            "a variable that the library requires",
            |host| {
                host.write_profile("environment = [\"TROUSSEAU_TEST_VENDOR\"]");
                vec![]
            },
            "environment",
            "failure",
            "is not set for the serving plugin",
        ),
        ("nothing", |_| vec![], "token", "good", "no way that was tried got a throw-away key out"),
        (
            "the socket's mode",
            |host| {
                host.set_mode("kms.sock", 0o666);
                vec![]
            },
            "socket",
            "warning",
            "is 0666, not 0600: set SocketMode=",
        ),
        (
            "a wrong PIN",
            |host| {
                host.token.try_wrong_pins(if host.token.family == Family::Kryoptic { 7 } else { 1 });
                vec![]
            },
            "PIN",
            "warning",
            "has seen a wrong PIN since the last login: log in once",
        ),
        (
            "a key that is no KEK",
            |host| {
                host.token.make_keys(&[Key { extractable: true, ..Key::generated(b"open", "trousseau-test") }]);
                vec![]
            },
            "KEK",
            "warning",
            "EXTRACTABLE=false",
        ),
        (
            "a KEK without a history",
            |host| {
                host.token.make_keys(&[Key { value: Some(vec![7; 32]), ..Key::generated(b"old", "trousseau-test") }]);
                host.extra = admit(b"old");
                vec![]
            },
            "KEK",
            "warning",
            "restored from a backup: when you can, rotate",
        ),
        (
            "an EncryptionConfiguration that is not there",
            |_| vec!["--encryption-config", "/no/such/file.yaml"],
            "API server",
            "failure",
            "/no/such/file.yaml cannot be read",
        ),
    ];
    for (case, break_it, area, severity, words) in cases {
        let mut host = Host::new();
        host.generate("0s");
        let plugin = host.serve_healthy();
        let more = break_it(&mut host);
        let (findings, code) = findings(&host, &more);
        assert!(has(&findings, area, severity, words), "{case}: {findings:#?}");
        let failed = findings.iter().any(|finding| finding["severity"] == "failure");
        assert_eq!((failed, code), (severity == "failure", Some(i32::from(failed))), "{case}: {findings:#?}");
        drop(plugin);
    }
}

#[test]
fn whoever_else_listens_is_named() {
    let host = Host::new();
    let _ours = std::os::unix::net::UnixListener::bind(host.path("kms.sock")).unwrap();
    let (findings, code) = findings(&host, &[]);
    let who = format!("(pid {}, uid {})", std::process::id(), rustix::process::geteuid().as_raw());
    for words in [&*who, "which is no trousseau plugin: it is handed what the API server encrypts"] {
        assert!(has(&findings, "socket", "failure", words), "{words}: {findings:#?}");
    }
    assert_eq!(code, Some(1));
}

#[test]
fn a_profile_of_what_was_found_can_be_used() {
    let host = Host::new();
    let modes = if host.token.family.modes() == ["oaep"] { &["oaep"][..] } else { &["wrapkey", "gcm"] };
    let omitted = match host.token.family {
        Family::OpenCryptoki => r#""CKA_DERIVE", "CKA_COPYABLE", "CKA_ALLOWED_MECHANISMS""#,
        Family::Tpm2 => {
            r#""CKA_DERIVE", "CKA_ENCRYPT", "CKA_DECRYPT", "CKA_SIGN", "CKA_VERIFY", "CKA_ALLOWED_MECHANISMS""#
        }
        Family::SoftHsm | Family::Kryoptic => r#""CKA_DERIVE""#,
    };
    host.write_profile(&format!(
        "omit-attributes = [{omitted}]\n[errors]\nCKR_DEVICE_ERROR = \"fatal\"\n0x80000001 = \"session\""
    ));
    let file = host.path("hsm-profiles/found.toml");
    let out = ["--profile-out", file.to_str().unwrap()];
    let (found, _) = findings(&host, &out);
    assert!(has(&found, "profile", "good", "read it before you use it"), "{found:#?}");
    // The quirks of the profile in use are those of the same token.
    let written = std::fs::read_to_string(&file).unwrap();
    for quirk in ["CKA_DERIVE", "CKR_DEVICE_ERROR = \"fatal\"", "0x80000001 = \"session\""] {
        assert!(written.contains(quirk), "{quirk}: {written}");
    }
    // It is not written over.
    let (found, _) = findings(&host, &out);
    assert!(has(&found, "profile", "failure", "a file that is not there yet"), "{found:#?}");

    // No module is named: the profile's is found.
    let configuration = host.configuration();
    let lines = configuration.lines().filter(|line| !line.starts_with("module = "));
    let profile = format!("profile = \"{}\"", host.token.family.profile());
    let configuration = lines.collect::<Vec<_>>().join("\n").replace(&profile, "profile = \"found\"");
    host.write_secret("trousseau.toml", &configuration);
    let configuration = host.path("trousseau.toml");
    for mode in modes {
        let generate = ["key", "generate", "--unsynchronized-clock-ok", "--activate-in", "0s", "--mode", mode];
        let done = host.command(&generate).arg("--config").arg(&configuration).output().unwrap();
        assert!(done.status.success(), "{mode}: {done:?}");
    }
}

#[test]
fn a_token_that_hangs_does_not_hold_it_up_for_ever() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    let host = Host::new();
    host.generate("0s");
    let faults = Faults { host: &host, library: &library };
    faults.set("C_GenerateKey hang");
    drop(faults.command()); // it writes the configuration
    let mut command = host.command(&["doctor", "--output", "json", "--config"]);
    command.arg(host.path("trousseau.toml")).env("TROUSSEAU_FAULT_MODULE", host.token.family.module());
    let began = Instant::now();
    let done = command.env("TROUSSEAU_FAULT_RULES", host.path("rules")).output().unwrap();
    assert!(began.elapsed() < Duration::from_secs(90), "{:?}", began.elapsed());
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    let findings: Vec<Value> = serde_json::from_slice(&done.stdout).unwrap();
    assert!(has(&findings, "token", "failure", "did not answer"), "{findings:#?}");
    // The others are examined all the same.
    assert!(has(&findings, "socket", "failure", "is the plugin running?"), "{findings:#?}");
}
