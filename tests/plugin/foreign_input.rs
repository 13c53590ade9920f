//! Modules, tokens and PINs that are missing or wrong: the plugin serves, and says what to do.

use std::fs;
use std::path::Path;

use tempfile::TempDir;
use tonic::Code;
use trousseau::envelope::{self, Envelope};

use crate::family::Family;
use crate::plugin::{Host, Plugin};
use crate::token::Token;

/// Status is UNAVAILABLE with these words in it.
fn assert_says(plugin: &mut Plugin, words: &[&str]) {
    plugin.wait_until(&format!("Status says {words:?}"), |plugin| {
        plugin.status().is_err_and(|answer| words.iter().all(|word| answer.message.contains(word)))
    });
    for code in [plugin.status().unwrap_err().code, plugin.encrypt(b"seed").unwrap_err().code] {
        assert_eq!(code, Code::Unavailable);
    }
}

#[test]
fn a_token_that_comes_late_is_waited_for() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let token = Token::place(directory.path());
    let host = Host::with(directory, token);
    let mut plugin = host.serve();
    assert_says(&mut plugin, &["no token of", "matches"]);
    host.token.initialize(&["another"]);
    host.token.initialize(&["trousseau"]);
    assert_says(&mut plugin, &["has no KEK", "key generate"]);
    host.generate("0s");
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.round_trip();
}

#[test]
fn two_tokens_of_one_name_are_refused_with_their_serial_numbers() {
    if matches!(Family::chosen(), Family::OpenCryptoki | Family::Tpm2) {
        eprintln!("skipped: all tokens of {:?} have one serial number", Family::chosen());
        return;
    }
    let host = Host::new();
    host.token.initialize(&["trousseau"]);
    assert_says(&mut host.serve(), &["2 tokens match", "serial"]);
    assert_eq!(host.run(&["key", "list"]).status.code(), Some(69));
}

#[test]
fn a_module_that_is_missing_or_is_none_is_named() {
    let host = Host::new();
    fs::write(host.path("text.so"), "not a library").unwrap();
    let other_library = format!("/lib/{}-linux-gnu/libm.so.6", std::env::consts::ARCH);
    fs::copy(host.token.family.module(), host.path("open.so")).unwrap();
    host.set_mode("open.so", 0o775);
    for (module, words) in [
        (host.path("absent.so").display().to_string(), &["absent.so", "No such file"][..]),
        (host.path("text.so").display().to_string(), &["text.so", "cannot be loaded", "ldd"]),
        (other_library, &["libm", "not a PKCS#11 module"]),
        (host.path("open.so").display().to_string(), &["open.so can be changed by others", "0775", "chmod go-w"]),
    ] {
        let good = host.token.family.module().display().to_string();
        let configuration = host.configuration().replace(&good, &module);
        let mut plugin = host.serve_with(&configuration);
        assert_says(&mut plugin, words);
        assert_eq!(plugin.stop().code(), Some(0));
    }
}

/// Whose owner is root's alone to change.
#[test]
fn a_module_that_belongs_to_another_user_is_not_loaded() {
    if crate::plugin::lacks_root() {
        return;
    }
    let host = Host::new();
    let (module, copy) = (host.token.family.module().display().to_string(), host.path("theirs.so"));
    fs::copy(&module, &copy).unwrap();
    host.set_mode("theirs.so", 0o755);
    std::os::unix::fs::chown(&copy, Some(54_321), None).unwrap();
    let configuration = host.configuration().replace(&module, copy.to_str().unwrap());
    assert_says(&mut host.serve_with(&configuration), &["theirs.so belongs to uid 54321", "chown root"]);
}

#[test]
fn a_kek_that_the_token_has_lost_inside_takes_the_others_nowhere() {
    if Family::chosen() != Family::SoftHsm {
        eprintln!("skipped: only SoftHSM keeps each key in a file whose content a test can change");
        return;
    }
    let host = Host::new();
    let objects = || -> Vec<_> {
        let tokens = fs::read_dir(host.token.data()).unwrap();
        let files = tokens.flat_map(|token| fs::read_dir(token.unwrap().path()).unwrap());
        files.map(|file| file.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "object")).collect()
    };
    let before = objects();
    host.generate("0s");
    let first_kek = objects().into_iter().find(|object| !before.contains(object)).unwrap();
    let (old, old_key_id) = host.serve_healthy().round_trip();
    host.generate("0s");
    host.serve_healthy().round_trip();
    // The value of a key lies encrypted near the end of its object.
    let mut bytes = fs::read(&first_kek).unwrap();
    let value = bytes.windows(8).position(|window| window == 0x11_u64.to_be_bytes()).expect("CKA_VALUE");
    bytes[value + 40] ^= 1;
    fs::write(&first_kek, bytes).unwrap();

    let plugin = host.serve_healthy();
    plugin.round_trip();
    let answer = plugin.decrypt(&old, &old_key_id).unwrap_err();
    assert_eq!(answer.code, Code::Unavailable, "{}", answer.message);
    assert!(answer.message.contains("is not used"), "{}", answer.message);
    assert_eq!(plugin.log().matches("token connected").count(), 3, "one for each start:\n{}", plugin.log());
}

#[test]
fn a_wrong_pin_is_tried_once_and_a_new_one_at_once() {
    let host = Host::new();
    host.generate("0s");
    host.write_secret("pin", "wrong-pin-0000");
    let mut plugin = host.serve();
    assert_says(&mut plugin, &["CKR_PIN_INCORRECT", "not tried again"]);
    host.write_secret("pin", &format!("{}\n", crate::token::PIN));
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.round_trip();
}

#[test]
fn a_token_that_goes_away_is_reported_and_taken_back() {
    if Family::chosen() != Family::SoftHsm {
        eprintln!("skipped: only SoftHSM notices that its files are away, and that they are there again");
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    let (ciphertext, key_id) = plugin.round_trip();
    fs::rename(host.token.data(), host.path("away")).unwrap();
    plugin.wait_until("Encrypt notices", |plugin| plugin.encrypt(b"seed").is_err());
    let answer = plugin.decrypt(&ciphertext, &key_id).unwrap_err();
    assert_eq!(answer.code, Code::Unavailable, "{}", answer.message);
    assert!(answer.message.contains("the object is intact"), "{}", answer.message);
    assert_eq!(plugin.status().unwrap_err().code, Code::Unavailable);
    fs::rename(host.path("away"), host.token.data()).unwrap();
    plugin.wait_until("it is healthy again", |plugin| plugin.status().is_ok());
    assert_eq!(plugin.decrypt(&ciphertext, &key_id).unwrap(), b"thirty-two bytes of a fresh seed");
}

#[test]
fn a_token_that_is_lost_ends_the_process_if_its_module_must_not_be_initialized_again() {
    if Family::chosen() != Family::SoftHsm {
        eprintln!("skipped: only SoftHSM notices that its files are away, and that they are there again");
        return;
    }
    let host = Host::new();
    host.generate("0s");
    host.write_profile("reinitialize = false");
    let plugin = host.serve_healthy();
    let (ciphertext, key_id) = plugin.round_trip();
    fs::rename(host.token.data(), host.path("away")).unwrap();
    let (status, log) = plugin.ends_by(&ciphertext, &key_id);
    assert_eq!(status.code(), Some(69), "{log}");
    assert!(log.contains("cannot be initialized again"), "{log}");
    fs::rename(host.path("away"), host.token.data()).unwrap();
    let plugin = host.serve_healthy();
    plugin.round_trip();
    assert_eq!(plugin.stop().code(), Some(0));
}

#[test]
fn a_profile_says_what_a_code_means() {
    if Family::chosen().modes() == ["oaep"] {
        eprintln!("skipped: what the KEK has not signed never reaches the token");
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let (mut damaged, key_id) = host.serve_healthy().round_trip();
    damaged[40] ^= 1; // within the wrapped DEK
    // Tokens answer it with one of these, which mean by default that the reference is asked.
    let all = |class: &str| {
        let answers =
            ["CKR_GENERAL_ERROR", "CKR_DEVICE_ERROR", "CKR_ENCRYPTED_DATA_INVALID", "CKR_WRAPPED_KEY_INVALID"];
        host.write_profile(&format!("[errors]\n{}", answers.map(|code| format!("{code} = \"{class}\"\n")).concat()));
    };
    for (class, code) in [
        ("bad-input", Code::InvalidArgument),
        ("doubtful", Code::InvalidArgument),
        ("refused", Code::InvalidArgument),
        ("session", Code::Unavailable),
        ("token", Code::Unavailable), // and yet no stored value takes the service down
        ("fatal", Code::Unavailable),
    ] {
        all(class);
        let plugin = host.serve_healthy();
        let answer = plugin.decrypt(&damaged, &key_id).unwrap_err();
        assert_eq!(answer.code, code, "{class}: {}", answer.message);
        assert!(!plugin.log().contains("was lost"), "{class}:\n{}", plugin.log());
    }
}

#[test]
fn a_ciphertext_of_another_keyring_is_unknown_and_costs_no_token_call() {
    let host = Host::new();
    host.generate("0s");
    let plugin = host.serve_healthy();
    let mut other = host.other_host();
    (other.cluster, other.label) = ("another".into(), "trousseau-another".into());
    other.generate("0s");
    let elsewhere = Host::new();
    elsewhere.generate("0s");
    for (case, (sealed, key_id)) in [
        ("of another cluster on the same token", other.serve_healthy().round_trip()),
        ("of another token", elsewhere.serve_healthy().round_trip()),
    ] {
        let answer = plugin.decrypt(&sealed, &key_id).unwrap_err();
        assert_eq!(answer.code, Code::FailedPrecondition, "{case}: {}", answer.message);
    }
}

#[test]
fn a_damaged_state_file_is_named_and_never_replaced() {
    let host = Host::new();
    let kek = host.generate("0s");
    let (sealed, key_id) = host.serve_healthy().round_trip();
    let reference = host.path(&format!("state/reference-{}.json", kek["identity"].as_str().unwrap()));
    let good = fs::read(&reference).unwrap();
    fs::write(&reference, "{").unwrap();
    let mut plugin = host.serve();
    assert_says(&mut plugin, &["reference-", "backup"]);
    fs::write(&reference, good).unwrap();
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.decrypt(&sealed, &key_id).unwrap();
    drop(plugin);

    fs::write(host.path("state/active.json"), "{").unwrap();
    let mut plugin = host.serve();
    assert_says(&mut plugin, &["active.json", "backup"]);
    plugin.wait_until("it reads", |plugin| plugin.decrypt(&sealed, &key_id).is_ok());
}

#[test]
fn a_key_id_is_checked_before_anything_else_of_a_whole_envelope() {
    let host = Host::new();
    host.generate("0s");
    let plugin = host.serve_healthy();
    let (ciphertext, key_id) = plugin.round_trip();
    let long = "x".repeat(2048);
    for foreign in ["", "1", &long, &key_id.to_uppercase(), "tr1-00000000000000000000000000000000"] {
        let answer = plugin.decrypt(&ciphertext, foreign).unwrap_err();
        assert_eq!(answer.code, Code::FailedPrecondition, "{foreign}: {}", answer.message);
    }
    let own = "the ciphertext is damaged or is not one of this plugin's: restore the object, retrying does not help";
    for (case, damaged) in
        [("empty", vec![]), ("cut", ciphertext[..100].to_vec()), ("longer", [&ciphertext[..], &[0]].concat())]
    {
        let answer = plugin.decrypt(&damaged, &key_id).unwrap_err();
        assert_eq!((answer.code, answer.message.as_str()), (Code::InvalidArgument, own), "{case}");
    }
    // 886 bytes for AES-KW.
    let algorithm = Envelope::parse(&ciphertext).unwrap().recipients[0].algorithm;
    let most = envelope::plaintext_limit(1024, &[algorithm]);
    for (length, fits) in [(0, false), (1, true), (most, true), (most + 1, false), (4096, false)] {
        let answer = plugin.encrypt(&vec![7; length]);
        assert_eq!(answer.is_ok(), fits, "{length} bytes: {answer:?}");
        if let Err(answer) = answer {
            assert_eq!(answer.code, Code::InvalidArgument);
            assert!(answer.message.contains(&format!("1 to {most}")), "{}", answer.message);
        }
    }
}

#[test]
fn nss_is_refused_with_the_reason_and_nothing_is_lost() {
    // Its softokn hands a key out that says CKA_EXTRACTABLE=false. It does not come so far: it wants a string with
    // C_Initialize, which is nothing of PKCS#11.
    let module = format!("/usr/lib/{}-linux-gnu/libsoftokn3.so", std::env::consts::ARCH);
    if !Path::new(&module).exists() {
        assert!(std::env::var_os("TROUSSEAU_TEST_REQUIRE").is_none(), "{module}: install libnss3");
        eprintln!("skipped: it lacks {module} (libnss3)");
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let (sealed, key_id) = host.serve_healthy().round_trip();
    let own = host.token.family.module().display().to_string();
    let mut plugin = host.serve_with(&host.configuration().replace(&own, &module));
    assert_says(&mut plugin, &["libsoftokn3.so", "C_Initialize answered"]);
    let answer = plugin.decrypt(&sealed, &key_id).unwrap_err();
    assert_eq!(answer.code, Code::Unavailable, "{}", answer.message);
    assert!(answer.message.contains("the object is intact"), "{}", answer.message);
    assert_eq!(plugin.stop().code(), Some(0));
    host.serve_healthy().decrypt(&sealed, &key_id).unwrap();
}
