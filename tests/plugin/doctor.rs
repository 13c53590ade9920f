//! `doctor`: what is made wrong is found, with a remedy, and nothing else is called a failure.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::attest::{host_of_pairs, run};
use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::pin::until_low;
use crate::plugin::{Host, admit};
use crate::token::Key;

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
    let cases: [(&str, Break, &str, &str, &str); 11] = [
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
            "no directory for the audit log",
            |host| {
                host.extra = format!("[audit]\nfile = \"{}\"", host.path("nowhere/audit.log").display());
                vec![]
            },
            "audit log",
            "failure",
            "make its directory, and give it to the plugin's user",
        ),
        (
            "an audit log that is somebody else's",
            |host| {
                host.extra = format!("[audit]\nfile = \"{}\"", host.path("logs/audit.log").display());
                std::fs::create_dir(host.path("logs")).unwrap();
                std::os::unix::fs::symlink("/dev/null", host.path("logs/audit.log")).unwrap();
                vec![]
            },
            "audit log",
            "failure",
            "it is not a plain file",
        ),
        (
            "a wrong PIN",
            |host| {
                host.token.try_wrong_pins(until_low());
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
            "an EncryptionConfiguration that others can read",
            |host| {
                let file = host.path("encryption.yaml");
                let endpoint = format!("unix://{}", host.path("kms.sock").display());
                let kms = format!("{{kms: {{apiVersion: v2, name: trousseau, timeout: 3s, endpoint: {endpoint}}}}}");
                let text = format!("resources: [{{resources: [secrets], providers: [{kms}]}}]");
                host.write_secret("encryption.yaml", &format!("kind: EncryptionConfiguration\n{text}\n"));
                host.set_mode("encryption.yaml", 0o640);
                vec!["--encryption-config", file.to_str().unwrap().to_owned().leak()]
            },
            "API server",
            "warning",
            "its mode is 0640: chmod 0600",
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
fn what_the_tokens_flags_say_amiss_is_told_with_a_remedy() {
    let Some(library) = library() else { return };
    let host = Host::new();
    let faults = Faults { host: &host, library: &library };
    let cases = [
        ("CKF_LOGIN_REQUIRED=false", "needs no login: anybody may use its keys: initialize it with a user PIN"),
        ("CKF_USER_PIN_TO_BE_CHANGED=true", "wants its PIN to be changed: change it with the vendor's tools"),
        ("CKF_WRITE_PROTECTED=true", "is write-protected: no KEK can be made in it: lift that to make a KEK"),
        ("CKF_ERROR_STATE=true", "says that it failed its self-test: restart it, and ask its vendor"),
    ];
    let rules: Vec<String> = cases.iter().map(|(flag, _)| format!("C_GetTokenInfo say {flag}")).collect();
    for (rules, says) in [("", false), (&*rules.join("\n"), true)] {
        faults.set(rules);
        let done = faults.verb(&["doctor", "--output", "json"]).output().unwrap();
        let findings: Vec<Value> =
            serde_json::from_slice(&done.stdout).unwrap_or_else(|error| panic!("{error}: {done:?}"));
        for (flag, words) in cases {
            assert_eq!(has(&findings, "token", "warning", words), says, "{flag}: {findings:#?}");
        }
    }
}

#[test]
fn one_token_under_two_names_is_no_pair_of_replicas() {
    if Family::chosen().stands_one_token_alone() {
        return;
    }
    let mut host = Host::new();
    let attested = || -> Value {
        let done = host.run(&["key", "attest", "--output", "json"]);
        serde_json::from_slice(&done.stdout).unwrap_or_else(|error| panic!("{error}: {done:?}"))
    };
    assert_eq!(attested()["providers"][0]["named-twice"], serde_json::json!([]));
    let model = attested()["providers"][0]["tokens"][0]["token"]["model"].as_str().unwrap().replace(' ', "%20");
    host.tokens = format!(r#""pkcs11:token=trousseau", "pkcs11:token=trousseau;model={model}""#);
    let words = "is token pkcs11:token=trousseau of provider hsm once more, and no replica of it";
    let (findings, code) = findings(&host, &[]);
    assert!(has(&findings, "token", "failure", words), "{findings:#?}");
    assert_eq!(code, Some(1));
    let done = host.run(&["key", "generate", "--unsynchronized-clock-ok"]);
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    assert!(String::from_utf8_lossy(&done.stderr).contains(words), "{done:?}");
    let attested = host.run(&["key", "attest"]);
    assert!(String::from_utf8_lossy(&attested.stdout).contains(words), "{attested:?}");
}

#[test]
fn a_replica_that_lacks_the_kek_is_a_failure() {
    if Family::chosen().stands_one_token_alone() {
        return;
    }
    let host = Host::new().with_a_replica();
    let kek = host.generate("0s")["identity"].as_str().unwrap().to_owned(); // in the first one only
    let (findings, code) = findings(&host, &[]);
    for words in ["pkcs11:token=second", "lacks KEK", &kek] {
        assert!(has(&findings, "replicas", "failure", words), "{words}: {findings:#?}");
    }
    assert_eq!(code, Some(1));
}

#[test]
fn a_library_that_the_module_needs_and_that_is_not_there_is_named() {
    let host = Host::new();
    let (module, needed) = (host.path("libvendor.so"), host.path("libvendor-needs-this.so"));
    let link = |library: &Path, with: &[&Path]| {
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-x", "c", "/dev/null", "-x", "none", "-Wl,--no-as-needed", "-o"]).arg(library).args(with);
        assert!(cc.status().unwrap().success());
    };
    link(&needed, &[]);
    link(&module, &[&needed]);
    std::fs::remove_file(&needed).unwrap();
    let own = host.token.family.module().display().to_string();
    host.write_secret("trousseau.toml", &host.configuration().replace(&own, module.to_str().unwrap()));
    let mut command = host.command(&["doctor", "--output", "json", "--config"]);
    let done = command.arg(host.path("trousseau.toml")).output().unwrap();
    let findings: Vec<Value> = serde_json::from_slice(&done.stdout).unwrap_or_else(|error| panic!("{error}: {done:?}"));
    for words in ["libvendor.so cannot be loaded", "libvendor-needs-this.so: cannot open shared object", "with `ldd "] {
        assert!(has(&findings, "token", "failure", words), "{words}: {findings:#?}");
    }
    assert_eq!(done.status.code(), Some(1));
}

#[test]
fn a_profile_of_what_was_found_can_be_used() {
    let host = Host::new();
    if host.token.family.modes() == ["oaep"] {
        host.generate("0s"); // by which the mode is tried
    }
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
    let mode = std::fs::metadata(&file).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o644, "root writes it, and the plugin's user reads it");
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
    command.arg(host.path("trousseau.toml")).env("TROUSSEAU_FAULT_MODULE", host.token.family.own_module());
    let began = Instant::now();
    let done = command.env("TROUSSEAU_FAULT_RULES", host.path("rules")).output().unwrap();
    assert!(began.elapsed() < Duration::from_secs(90), "{:?}", began.elapsed());
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    let findings: Vec<Value> = serde_json::from_slice(&done.stdout).unwrap();
    assert!(has(&findings, "token", "failure", "did not answer"), "{findings:#?}");
    // The others are examined all the same.
    assert!(has(&findings, "socket", "failure", "is the plugin running?"), "{findings:#?}");
}

#[test]
fn a_token_that_lists_what_the_mode_oaep_needs_and_refuses_it_is_told_with_a_remedy() {
    let Some(library) = library() else { return };
    let host = host_of_pairs();
    let takes_it = host.token.family != Family::SoftHsm; // which takes no hash but SHA-1
    if takes_it {
        host.generate("0s");
    }
    let refusal = "answered CKR_MECHANISM_INVALID";
    for (rules, words) in [
        ("", "wraps and unwraps"),
        ("C_DecryptInit return CKR_MECHANISM_INVALID", refusal),
        ("C_SignInit return CKR_MECHANISM_INVALID", refusal),
    ] {
        let works = takes_it && rules.is_empty();
        let findings: Vec<Value> =
            serde_json::from_slice(&run(&host, &library, rules, &["doctor", "--output", "json"]).stdout).unwrap();
        let (severity, remedy) = if works { ("good", "") } else { ("warning", "take the mode out of the profile") };
        let words = if takes_it { words } else { "mode oaep does not work with a throw-away key" };
        for words in ["mode oaep", words, remedy] {
            assert!(has(&findings, "token", severity, words), "{rules}, {words}: {findings:#?}");
        }
        let done = run(&host, &library, rules, &["key", "attest", "--output", "json"]);
        let report: Value = serde_json::from_slice(&done.stdout).unwrap();
        let mode = &report["providers"][0]["tokens"][0]["modes"][0];
        assert_eq!((&mode["mode"], &mode["tried-on"]), (&"oaep".into(), &"throw-away-key".into()), "{report:#}");
        assert_eq!(mode["failure"].is_null(), works, "{report:#}");
        assert!(!takes_it || works || mode["failure"].to_string().contains(refusal), "{report:#}");
    }
}
