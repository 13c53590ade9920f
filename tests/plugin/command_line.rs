//! Configurations and command lines that cannot be used: each with its message, its remedy and its exit code.

use std::fs;
use std::os::unix::process::CommandExt;

use crate::family::Family;
use crate::plugin::Host;

/// A change to the good configuration, and what `check` then says; `line` stands for the changed line's number.
type Case = (&'static str, &'static str, &'static [&'static str]);

#[test]
fn a_bad_configuration_is_refused_with_its_place_and_a_remedy() {
    let cases: &[Case] = &[
        ("v1beta1 =", "v1beta2 =", &["line", "unknown field `v1beta2`", "did you mean `v1beta1`"]),
        ("pin-file", "pin-fiel", &["line", "did you mean `pin-file`"]),
        ("[keyring]", "[keyrings]", &["did you mean `keyring`"]),
        ("type = \"pkcs11\"", "type = \"pkcs12\"", &["line", "unknown variant `pkcs12`", "did you mean `pkcs11`"]),
        ("sessions = 2", "sessions = \"2\"", &["line", "invalid type", "man trousseau.toml"]),
        ("sessions = 2", "sessions = 0", &["sessions", "1 to 256"]),
        ("version = \"v1\"", "version = \"v2\"", &["line", "did you mean `v1`"]),
        ("cluster = \"test\"", "", &["cluster"]),
        ("cluster = \"test\"", "cluster = \"a b\"", &["keyring.cluster", "never be changed"]),
        ("pkcs11:token=trousseau", "token=trousseau", &["provider hsm: tokens", "pkcs11:"]),
        ("pin-file = \"/", "pin-file = \"credential:a/b\"\n#", &["provider hsm: pin-file", "not the name of a"]),
        ("pin-file = \"/", "pin-file = \"", &["is not an absolute path", "name the file"]),
        ("pkcs11:token=trousseau", "pkcs11:token=a?pin-value=1", &["pin-file"]),
        ("[\"pkcs11:token=trousseau\"]", "[]", &["no token is named"]),
        (
            "trousseau\"]",
            "x;serial=1\", \"pkcs11:serial=1;token=%78\"]",
            &["pkcs11:token=x;serial=1 stands there twice"],
        ),
        ("v1beta1 = true", "mode = \"0777\"", &["listen.mode `0777`"]),
        ("v1beta1 = true", "allow-uids = [65534]", &["65534", "user namespace"]),
        ("socket = \"", "socket = \"relative", &["listen.socket", "absolute"]),
        ("state = \"", "state = \"relative", &["keyring.state"]),
        ("state =", "max-age = \"ninety days\"\nstate =", &["keyring.max-age `ninety days`", "90d"]),
        ("state =", "max-age = \"3mo\"\nstate =", &["keyring.max-age `3mo`"]),
        ("state =", "max-age = \"-1d\"\nstate =", &["keyring.max-age `-1d`"]),
        ("sessions = 2", "seal = false", &["no [[provider]] seals"]),
        ("sessions = 2", "[[provider.kek]]\nid = \"XY\"\nnot-before = 2026-01-01T00:00:00Z", &["kek.id `XY`"]),
        ("sessions = 2", "[[provider.kek]]\nid = \"01\"\nnot-before = 2026-01-01", &["kek.not-before", "zone"]),
        (
            "sessions = 2",
            "[[provider.kek]]\nid = \"01\"\nnot-before = 2026-01-01T00:00:00Z\nexception = \" \"",
            &["kek.exception ` ` is not a reason"],
        ),
        ("sessions = 2", "[policy]\nexportable = \"ignore\"", &["unknown variant `ignore`", "refuse"]),
        (
            "sessions = 2",
            "[legacy]\nformats = [\"trousseau-v3\"]\nprovider = \"hsm\"",
            &["unknown variant `trousseau-v3`", "did you mean `trousseau-v1`"],
        ),
        ("sessions = 2", "[legacy]\nformats = []\nprovider = \"hsm\"", &["legacy.formats is empty"]),
        (
            "sessions = 2",
            "[legacy]\nformats = [\"trousseau-v1\"]\nprovider = \"valut\"",
            &["legacy.provider `valut`", "Transit key"],
        ),
        ("version", "version = [", &["line"]),
    ];
    let host = Host::new();
    for (from, to, said) in cases {
        let configuration = host.configuration();
        let before = configuration.find(from).expect(from);
        let line = format!("line {}", 1 + configuration[..before].lines().count());
        host.write_secret("trousseau.toml", &configuration.replacen(from, to, 1));
        let said: Vec<&str> = said.iter().map(|words| if *words == "line" { line.as_str() } else { words }).collect();
        assert_refused(&host, to, &said);
    }
    let long = host.configuration().replace("kms.sock", &"k".repeat(100));
    host.write_secret("trousseau.toml", &long);
    assert_refused(&host, "a long path", &["listen.socket", "at most 104 bytes"]);
    let legacy = "[legacy]\nformats = [\"trousseau-v2-proxy\"]\nprovider = \"hsm\"";
    let v2_alone = host.configuration().replace("v1beta1 = true", "") + legacy;
    host.write_secret("trousseau.toml", &v2_alone);
    assert_refused(&host, "v2 alone", &["legacy.formats names trousseau-v2-proxy", "`v1beta1 = true`"]);
    let unknown = host.configuration().replace(host.token.family.profile(), "no-such-hsm");
    host.write_secret("trousseau.toml", &unknown);
    assert_refused(&host, "profile", &["profile `no-such-hsm` is unknown", "softhsm"]);
}

/// `check` and `serve` both refuse what is in the file.
fn assert_refused(host: &Host, case: &str, said: &[&str]) {
    let file = host.path("trousseau.toml");
    for verb in ["check", "serve"] {
        let done = host.command(&[verb, "--config", file.to_str().unwrap()]).output().unwrap();
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(78), "{verb} with {case}: {stderr}");
        assert!(stderr.contains("trousseau: hint: "), "{verb} with {case}: {stderr}");
        for words in said {
            assert!(stderr.contains(words), "{verb} with {case}: `{words}` is missing in: {stderr}");
        }
    }
}

#[test]
fn a_file_that_others_can_change_or_read_is_refused() {
    let host = Host::new();
    let file = host.write_configuration();
    assert!(host.run(&["check"]).status.success());
    for (name, mode, said) in [
        ("trousseau.toml", 0o666, &["can be changed by others", "0666", "chmod go-w"][..]),
        ("trousseau.toml", 0o620, &["can be changed by others"]),
        ("pin", 0o644, &["can be read or changed by others", "chmod 0600"]),
        ("pin", 0o640, &["can be read or changed by others"]),
    ] {
        host.set_mode(name, mode);
        assert_refused(&host, &format!("{name} {mode:o}"), said);
        host.set_mode(name, 0o600);
    }
    let name = format!("hsm-profiles/{}.toml", host.token.family.profile());
    host.write_profile("");
    assert!(host.run(&["check"]).status.success());
    host.set_mode(&name, 0o666);
    assert_refused(&host, "the profile", &["hsm-profiles", "can be changed by others"]);
    fs::remove_file(&file).unwrap();
    assert_refused(&host, "no file", &["cannot be read: No such file", "--config"]);
}

#[test]
fn a_bad_profile_is_refused_with_its_place_and_a_remedy() {
    let host = Host::new();
    host.write_configuration();
    host.write_profile("reinitialize = false\n[errors]\nCKR_DEVICE_ERROR = \"fatal\"\n0x80000001 = \"bad-input\"");
    assert!(host.run(&["check"]).status.success());
    for (more, said) in [
        ("reinitialise = false", &["line", "unknown field `reinitialise`", "did you mean `reinitialize`"][..]),
        ("reinitialize = \"no\"", &["line", "invalid type", "man trousseau-profile"]),
        ("renew-after = 1\nreinitialize = false", &["renew-after contradicts reinitialize = false", "remove one"]),
        ("renew-after = 0", &["renew-after is 0"]),
        ("gcm-iv = \"constant\"", &["line", "unknown variant `constant`", "hsm-profiles/README.md"]),
        ("omit-attributes = [\"CKA_SENSITIV\"]", &["line", "did you mean `CKA_SENSITIVE`"]),
        ("excuses = [\"CKA_EXTRACTABLE\"]", &["line", "unknown variant `CKA_EXTRACTABLE`"]),
        ("max-sessions = 2", &["max-sessions is less than 3"]),
        ("max-sessions = 3", &["provider hsm: sessions", "give 3 sessions", "write 1 at most"]),
        ("errors.CKR_DEVICE_EROR = \"token\"", &["line", "`CKR_DEVICE_EROR`", "did you mean `CKR_DEVICE_ERROR`"]),
        ("errors.DEVICE = \"token\"", &["line", "unknown return code `DEVICE`", "hsm-profiles/README.md"]),
        ("errors.0x = \"token\"", &["line", "unknown return code `0x`"]),
        ("errors.0x0 = \"token\"", &["line", "0x0 is CKR_OK"]),
        ("errors.CKR_DEVICE_ERROR = \"tokn\"", &["line", "unknown variant `tokn`", "did you mean `token`"]),
        ("errors = { CKR_DEVICE_ERROR = \"token\", 0x30 = \"pin\" }", &["line", "CKR_DEVICE_ERROR is there twice"]),
    ] {
        let text = host.write_profile(more);
        let line = format!("{}.toml, line {}", host.token.family.profile(), text.trim_end().lines().count());
        let said: Vec<&str> = said.iter().map(|words| if *words == "line" { line.as_str() } else { words }).collect();
        assert_refused(&host, more, &said);
    }
}

#[test]
fn a_profile_that_is_not_named_is_that_of_the_module_if_it_is_one() {
    let host = Host::new();
    let profile = format!("profile = \"{}\"\n", host.token.family.profile());
    let module = format!("module = \"{}\"\n", host.token.family.module().display());
    let without = host.configuration().replace(&profile, "");
    host.write_secret("trousseau.toml", &without.replace(&module, ""));
    assert_refused(&host, "neither", &["provider hsm: profile", "name the token's family"]);
    host.write_secret("trousseau.toml", &without.replace(&module, "module = \"/no/such/library.so\"\n"));
    assert_refused(&host, "a module of nobody's", &["no profile has the module /no/such/library.so", "generic"]);

    // The shipped ones know the libraries of real tokens; the tests' kryoptic has a name of its own.
    let is_softhsm = host.token.family == Family::SoftHsm && !host.token.family.is_dressed();
    let known = is_softhsm.then_some("softhsm");
    if let Some(known) = known {
        host.write_secret("trousseau.toml", &without);
        let file = host.path("trousseau.toml");
        let done = host.command(&["check", "--config", file.to_str().unwrap()]).output().unwrap();
        assert!(String::from_utf8_lossy(&done.stdout).contains(&format!("profile {known}")), "{done:?}");
        fs::create_dir_all(host.path("hsm-profiles")).unwrap();
        host.write_secret("hsm-profiles/mine.toml", &fs::read_to_string("hsm-profiles/softhsm.toml").unwrap());
        assert_refused(&host, "two", &["more than one profile has the module", "mine or softhsm"]);
    }
}

#[test]
fn what_serve_would_not_work_with_as_the_host_is_is_a_warning_of_check() {
    let host = Host::new();
    fs::create_dir(host.path("state")).unwrap();
    let check = |configuration: &str| -> String {
        host.write_secret("trousseau.toml", configuration);
        let file = host.path("trousseau.toml");
        let done = host.command(&["check", "--config", file.to_str().unwrap()]).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    let configuration = host.configuration();
    assert!(!check(&configuration).contains("warning"), "{}", check(&configuration));
    let group = configuration.replace("v1beta1 =", "group = \"of-nobody\"\nv1beta1 =");
    assert!(check(&group).contains("warning   ") && check(&group).contains("group of-nobody does not exist: make the"));
    let module = format!("module = \"{}\"", host.token.family.module().display());
    let module = configuration.replace(&module, &format!("module = \"{}\"", host.directory.path().display()));
    assert!(check(&module).contains("is no file: install it"), "{}", check(&module));
    let audit = |file: &str| format!("{configuration}[audit]\nfile = \"{}\"\n", host.path(file).display());
    assert!(!check(&audit("audit.log")).contains("warning"), "{}", check(&audit("audit.log")));
    let nowhere = check(&audit("nowhere/audit.log"));
    assert!(nowhere.contains("warning   audit log ") && nowhere.contains("make its directory"), "{nowhere}");
    assert!(check(&audit("state")).contains("it is not a plain file"), "{}", check(&audit("state")));
    host.set_mode(".", 0o777);
    assert!(check(&configuration).contains("others could exchange it"), "{}", check(&configuration));
}

#[test]
fn a_profile_that_nobody_ran_says_so() {
    let host = Host::new();
    let named = |profile: &str| format!("profile = \"{profile}\"");
    let configuration = host.configuration().replace(&named(host.token.family.profile()), &named("generic"));
    host.write_secret("trousseau.toml", &configuration);
    let file = host.path("trousseau.toml");
    let said = |arguments: &[&str]| {
        let done = host.command(arguments).arg("--config").arg(&file).output().unwrap();
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    for arguments in [&["check"][..], &["check", "--output", "json"], &["doctor"], &["doctor", "--output", "json"]] {
        let said = said(arguments).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains("profile generic was written from documentation"), "{arguments:?}: {said}");
    }
    let checked: serde_json::Value = serde_json::from_str(&said(&["check", "--output", "json"])).unwrap();
    assert_eq!(checked["providers"][0]["profile-status"], "documented");
    let plugin = host.serve_with(&configuration);
    assert!(plugin.log().contains("nobody has run it yet: try it before you rely on it"), "{}", plugin.log());
}

#[test]
fn a_pin_file_holds_one_line() {
    let host = Host::new();
    host.write_configuration();
    for (content, said) in [
        ("", &["holds no secret"][..]),
        ("\n", &["holds no secret"]),
        ("one\ntwo\n", &["more than one line"]),
        (&"9".repeat(2000), &["more than one line"]),
    ] {
        host.write_secret("pin", content);
        assert_refused(&host, &format!("{content:.20?}"), said);
    }
    for good in ["pin", "pin\n", "pin\r\n"] {
        host.write_secret("pin", good);
        assert!(host.run(&["check"]).status.success(), "{good:?}");
    }
    fs::remove_file(host.path("pin")).unwrap();
    assert_refused(&host, "no PIN file", &["cannot be read", "create it"]);
}

#[test]
fn only_who_logs_in_needs_the_credential_of_the_unit() {
    let host = Host::new();
    host.generate("0s");
    let path = host.path("pin").display().to_string();
    host.write_secret("trousseau.toml", &host.configuration().replace(&path, "credential:pin"));
    let run = |verb: &[&str]| host.command(verb).arg("--config").arg(host.path("trousseau.toml")).output().unwrap();
    let mut serve = host.command(&["serve", "--config"]);
    serve.arg(host.path("trousseau.toml")).env("CREDENTIALS_DIRECTORY", host.path(""));
    let mut plugin = host.start(serve);
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    for verb in ["check", "status", "probe"] {
        let done = run(&[verb]);
        assert!(done.status.success(), "{done:?}");
    }
    let checked = String::from_utf8(run(&["check"]).stdout).unwrap();
    assert!(checked.contains("provider hsm: pin-file: credential:pin: systemd hands it"), "{checked}");
    for verb in [&["serve"][..], &["key", "list"]] {
        let done = run(verb);
        assert_eq!(done.status.code(), Some(78), "{done:?}");
        let of_service = "-p User=trousseau -p StateDirectory=trousseau";
        for words in ["provider hsm: pin-file: credential:pin", "hint: run it with", "systemd-run", of_service] {
            assert!(String::from_utf8_lossy(&done.stderr).contains(words), "{done:?}");
        }
    }
    // A unit without that line.
    let mut list = host.command(&["key", "list", "--config"]);
    let done = list.arg(host.path("trousseau.toml")).env("CREDENTIALS_DIRECTORY", host.path("state")).output().unwrap();
    assert_eq!(done.status.code(), Some(78), "{done:?}");
    for words in ["credential:pin: cannot be read", "hint: add LoadCredential=pin:FILE to the unit, or -p LoadCred"] {
        assert!(String::from_utf8_lossy(&done.stderr).contains(words), "{done:?}");
    }
}

#[test]
fn a_configuration_that_may_not_be_read_is_refused() {
    if crate::plugin::lacks_root() {
        return;
    }
    let host = Host::new();
    let file = host.write_configuration();
    let mut command = std::process::Command::new(host.program_for_strangers());
    let done = command.args(["check", "--config"]).arg(file).uid(54_321).gid(54_321).output().unwrap();
    assert_eq!(done.status.code(), Some(77));
    for words in ["Permission denied", "hint: run it as root"] {
        assert!(String::from_utf8_lossy(&done.stderr).contains(words), "{done:?}");
    }
    // The configuration is for everybody, and the PIN in it is not.
    host.set_mode("trousseau.toml", 0o644);
    let done = command.output().unwrap();
    assert_eq!(done.status.code(), Some(77), "{done:?}");
    for words in ["pin-file", "Permission denied", "hint: run it as root, or as the user that it belongs to"] {
        assert!(String::from_utf8_lossy(&done.stderr).contains(words), "{done:?}");
    }
}

#[test]
fn doctor_finds_what_is_wrong_and_says_what_to_do() {
    let findings = |host: &Host, code: i32| -> Vec<(String, String, String)> {
        let done = host.run(&["doctor", "--output", "json"]);
        assert_eq!(done.status.code(), Some(code), "{done:?}");
        let findings: Vec<serde_json::Value> = serde_json::from_slice(&done.stdout).unwrap();
        let text = |finding: &serde_json::Value, key: &str| finding[key].as_str().unwrap().to_owned();
        let told = |finding: &serde_json::Value| text(finding, "what") + ": " + &text(finding, "remedy");
        findings.iter().map(|finding| (text(finding, "area"), text(finding, "severity"), told(finding))).collect()
    };
    let has = |findings: &[(String, String, String)], area: &str, severity: &str, words: &str| {
        let found = findings.iter().any(|(a, s, told)| a == area && s == severity && told.contains(words));
        assert!(found, "{area} {severity} {words}: {findings:#?}");
    };
    let mut host = Host::new();
    let empty = findings(&host, 1);
    has(&empty, "configuration", "good", "trousseau.toml");
    has(&empty, "token", "good", "is logged in to");
    has(&empty, "KEK", "failure", "trousseau key generate");
    has(&empty, "socket", "failure", "is the plugin running?");

    host.generate("0s");
    let plugin = host.serve_healthy();
    let well = findings(&host, 0);
    has(&well, "KEK", "good", "is active");
    has(&well, "socket", "good", "key_id tr1-");
    drop(plugin);

    host.tokens = r#""pkcs11:token=absent""#.into();
    has(&findings(&host, 1), "token", "failure", "there: trousseau");
    host.write_secret("pin", "");
    has(&findings(&host, 1), "configuration", "failure", "holds no secret");
}

#[test]
fn dev_leaves_alone_what_it_has_not_made() {
    let ours = "# Made by `trousseau dev`.\nversion = \"of mine\"";
    for (case, files, said) in [
        (
            "a configuration of production",
            &[("trousseau.toml", "version = \"v1\""), ("pin", "1")][..],
            "was not made by",
        ),
        ("a PIN", &[("pin", "1")], "was not made by"),
        ("one that was changed", &[("trousseau.toml", ours)], "unknown variant `of mine`"),
    ] {
        let directory = tempfile::TempDir::new().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_trousseau"));
        let done = command.args(["dev", "--dir"]).arg(directory.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(78), "{case}: {stderr}");
        assert!(stderr.contains(said) && stderr.contains("trousseau: hint: "), "{case}: {stderr}");
        for (name, text) in files {
            assert_eq!(fs::read_to_string(directory.path().join(name)).unwrap(), *text, "{case}");
        }
        let entries = fs::read_dir(directory.path()).unwrap().count();
        assert!(case.contains("changed") || entries == files.len(), "{case}: {entries} files");
    }
}

/// But for the digits, which differ.
#[test]
fn the_readme_shows_what_key_generate_prints() {
    let host = Host::new().with_mode("wrapkey");
    if host.token.family != Family::SoftHsm {
        return;
    }
    let readme = include_str!("../../README.md");
    host.generate("0s");
    let printed = host.run(&["key", "generate", "--unsynchronized-clock-ok"]).stdout;
    let printed = String::from_utf8(printed).unwrap();
    let (_, shown) = readme.split_once("$ trousseau key generate\n").unwrap();
    let (shown, _) = shown.split_once("```").unwrap();
    let words = |text: &str| -> Vec<Vec<String>> {
        let has_no_digit = |word: &&str| !word.contains(|letter: char| letter.is_ascii_digit());
        text.lines().map(|line| line.split(' ').filter(has_no_digit).map(str::to_owned).collect()).collect()
    };
    assert_eq!(words(shown), words(&printed), "{printed}");
    let profile = include_str!("../../hsm-profiles/softhsm.toml");
    assert!(profile.contains("renew-after = 2000\n") && readme.contains("every 2,000 (`renew-after`"));
}

#[test]
fn command_lines_are_as_written_down() {
    trycmd::TestCases::new().case("tests/cmd/*.trycmd").env("COLUMNS", "100");
}

#[test]
fn the_reference_configuration_is_good_and_so_is_every_example_in_it() {
    let host = Host::new();
    let reference = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/trousseau.toml")).unwrap();
    host.write_secret("ca.pem", "-----BEGIN CERTIFICATE-----\n");
    let reference = reference
        .replace("# v1beta1 = false", "v1beta1 = true")
        .replace("/etc/trousseau/vault-ca.pem", host.path("ca.pem").to_str().unwrap())
        .replace("/etc/trousseau/pin", host.path("pin").to_str().unwrap())
        .replace("/usr/lib/softhsm/libsofthsm2.so", host.token.family.module().to_str().unwrap());
    let is_key = |text: &str| text.chars().all(|letter| letter.is_ascii_lowercase() || "-1".contains(letter));
    let is_example = |line: &str| {
        let key = line.strip_prefix("# ").and_then(|line| line.split_once(" = ")).map(|(key, _)| key);
        line.starts_with("# [") || key.is_some_and(is_key)
    };
    let with_examples: Vec<&str> =
        reference.lines().map(|line| if is_example(line) { line.trim_start_matches("# ") } else { line }).collect();
    for (case, text) in [("as it is", reference.clone()), ("with its examples", with_examples.join("\n"))] {
        host.write_secret("trousseau.toml", &text);
        let file = host.path("trousseau.toml");
        let done = host.command(&["check", "--output", "json", "--config", file.to_str().unwrap()]).output().unwrap();
        assert!(done.status.success(), "{case}: {}", String::from_utf8_lossy(&done.stderr));
    }
    let examples = with_examples.iter().filter(|line| !reference.contains(&format!("\n{line}\n"))).count();
    assert!(examples >= 30, "only {examples} examples were taken out of their comments");
}
