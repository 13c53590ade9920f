//! Tokens with habits of their own: what the profile says of them holds, and where it does not, the token is not used.
//! They are the token of the suite in the dress of another, by the module that makes faults.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{fs, thread};

use serde_json::Value;
use tonic::Code;
use trousseau::envelope::Envelope;

use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::plugin::{Host, Plugin};

/// A host whose token has habits, and a profile that says something of them.
struct Dressed {
    host: Host,
    library: PathBuf,
}

impl Dressed {
    /// `habits` are the module's rules, and `profile` goes to the end of a profile without modes.
    fn new(library: &Path, habits: &str, profile: &str) -> Self {
        let dressed = Self { host: Host::new(), library: library.to_owned() };
        dressed.faults().set(habits);
        dressed.set_profile(profile);
        dressed
    }

    fn set_profile(&self, profile: &str) {
        fs::create_dir_all(self.host.path("hsm-profiles")).unwrap();
        let head = "title = \"dressed\"\nstatus = \"community\"\nsources = [\"this test\"]\nmodule-paths = []";
        self.host.write_secret("hsm-profiles/dressed.toml", &format!("{head}\n{profile}\n"));
    }

    fn faults(&self) -> Faults<'_> {
        Faults { host: &self.host, library: &self.library }
    }

    /// A verb, over the dressed token.
    fn command(&self, arguments: &[&str]) -> Command {
        let real = self.host.token.family.own_module();
        let configuration = self.host.configuration();
        let named = format!("profile = \"{}\"", self.host.token.family.profile());
        let configuration = configuration.replace(&named, "profile = \"dressed\"");
        let configuration = configuration.replace(&real.display().to_string(), &self.library.display().to_string());
        self.host.write_secret("dressed.toml", &configuration);
        let mut command = self.host.command(arguments);
        command.arg("--config").arg(self.host.path("dressed.toml"));
        command.env("TROUSSEAU_FAULT_MODULE", real).env("TROUSSEAU_FAULT_RULES", self.host.path("rules"));
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// In the last of the profile's modes.
    fn generate(&self) -> Output {
        let profile = fs::read_to_string(self.host.path("hsm-profiles/dressed.toml")).unwrap();
        let modes = profile.lines().find_map(|line| line.strip_prefix("modes = ")).unwrap();
        let mode = modes.trim_matches(['[', ']']).split(", ").last().unwrap().trim_matches('"');
        let clock = "--unsynchronized-clock-ok";
        self.run(&["key", "generate", "--output", "json", clock, "--activate-in", "0s", "--mode", mode])
    }

    fn serve_healthy(&self) -> Plugin {
        self.faults().start_healthy(self.command(&["serve"]))
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn whoever_makes_the_iv_of_aes_gcm_the_envelope_is_the_same() {
    if Family::chosen().lacks_aes() || Family::chosen().is_dressed() {
        return;
    }
    let Some(library) = library() else { return };
    let vendors = |code| format!("mechanisms = {{ gcm = {code} }}\nomit-attributes = [\"CKA_ALLOWED_MECHANISMS\"]");
    for (habit, rule, codes) in [
        ("ours", "", String::new()),
        ("written", "C_EncryptInit gcm written", String::new()),
        ("written", "C_EncryptInit gcm written by 0x8001e101", vendors("0x8001e101")),
        ("prepended", "C_EncryptInit gcm prepended by 0x80001087", vendors("0x80001087")),
        ("appended", "C_EncryptInit gcm appended", String::new()),
    ] {
        let profile = format!("modes = [\"gcm\"]\ngcm-iv = \"{habit}\"\n{codes}");
        let dressed = Dressed::new(&library, rule, &profile);
        let made = dressed.generate();
        assert!(made.status.success(), "{rule}: {}", said(&made));

        let plugin = dressed.serve_healthy();
        let (sealed, key_id) = plugin.round_trip();
        let (other, _) = plugin.round_trip();
        let wrapped = |sealed: &[u8]| Envelope::parse(sealed).unwrap().recipients[0].wrapped.to_vec();
        assert_ne!(wrapped(&sealed)[..12], wrapped(&other)[..12], "{rule}: one IV twice");
        // Each part of the wrapped DEK: IV, ciphertext, tag.
        for at in [0, 12, 59] {
            let mut damaged = sealed.clone();
            damaged[38 + at] ^= 1;
            let answer = plugin.decrypt(&damaged, &key_id).unwrap_err();
            assert_eq!(answer.code, Code::InvalidArgument, "{rule}, byte {at}: {answer:?}");
        }
        plugin.round_trip();
        drop(plugin);

        let plugin = dressed.serve_healthy();
        plugin.decrypt(&sealed, &key_id).unwrap();
        assert!(plugin.log().contains("nobody has run it"), "{}", plugin.log());
        drop(plugin);

        // The same token without its dress.
        dressed.faults().set("");
        dressed.set_profile("modes = [\"gcm\"]");
        let plugin = dressed.serve_healthy();
        plugin.decrypt(&sealed, &key_id).unwrap_or_else(|answer| panic!("{rule}: {answer:?}"));
    }
}

#[test]
fn a_token_that_does_something_else_than_its_profile_says_gets_no_kek() {
    if Family::chosen().lacks_aes() || Family::chosen().is_dressed() {
        return;
    }
    let Some(library) = library() else { return };
    let gcm = |habit: &str| format!("modes = [\"gcm\"]\ngcm-iv = \"{habit}\"");
    let wrapkey = || "modes = [\"wrapkey\"]".to_owned();
    let kwp = if Family::chosen() == Family::SoftHsm { "\nmechanisms = { wrapkey-kwp = 0x210a }" } else { "" };
    let mut cases = vec![
        ("C_EncryptInit gcm constant", gcm("prepended"), "used one IV twice"),
        ("C_EncryptInit gcm counted", gcm("prepended"), "used one IV twice"),
        ("C_EncryptInit gcm appended", gcm("ours"), "CKR_MECHANISM_PARAM_INVALID"),
        ("C_EncryptInit gcm appended", gcm("prepended"), "CKR_MECHANISM_PARAM_INVALID"),
        ("C_EncryptInit gcm prepended", gcm("written"), "CKR_MECHANISM_PARAM_INVALID"),
        // Each of these is wrong where it matters: an IV that is not the token's, or none.
        ("", gcm("written"), "made no IV"),
        ("C_EncryptInit gcm written by 0x1\nC_Encrypt pad 12", gcm("ours"), "72 bytes where 60 were due"),
        ("C_Encrypt pad 1", gcm("ours"), "61 bytes where 60 were due"),
        ("C_Encrypt truncate 1", gcm("ours"), "59 bytes where 60 were due"),
        ("C_Decrypt truncate 1", gcm("ours"), "an unwrapped DEK has 31 bytes"),
        ("C_EncryptInit return CKR_MECHANISM_INVALID", gcm("ours"), "CKR_MECHANISM_INVALID"),
        ("C_WrapKey return CKR_MECHANISM_INVALID", wrapkey(), "CKR_MECHANISM_INVALID"),
        ("C_WrapKey pad 8", wrapkey(), "48 bytes where 40 were due"),
        ("C_WrapKey truncate 8", wrapkey(), "32 bytes where 40 were due"),
        // What 0x210a is on some tokens.
        ("C_WrapKey pad 8", format!("modes = [\"wrapkey-kwp\"]{kwp}"), "48 bytes where 40 were due"),
        ("C_GenerateKey forbid 0x103", gcm("ours"), "CKR_ATTRIBUTE_VALUE_INVALID"),
        ("C_GetAttributeValue hide 0x163", gcm("ours"), "does not say whether it is LOCAL"),
        // A key that is not pinned is for the first mode of its kind.
        (
            "C_GenerateKey drop 0x40000600",
            format!("modes = [\"wrapkey\", \"wrapkey-kwp\"]{kwp}"),
            "for mode wrapkey-kwp",
        ),
    ];
    if Family::chosen() == Family::SoftHsm {
        // Left to itself, it makes keys that are not sensitive.
        let omits = format!("{}\nomit-attributes = [\"CKA_SENSITIVE\"]", gcm("ours"));
        cases.push(("", omits, "does not call it SENSITIVE"));
        // It takes an empty IV.
        cases.push(("", gcm("prepended"), "48 bytes where 60 were due"));
        cases.push(("", gcm("appended"), "48 bytes where 60 were due"));
        cases.push(("", "modes = [\"wrapkey\"]\nexplicit-iv = true".into(), "CKR_ARGUMENTS_BAD"));
    }
    // Most of the time they wait.
    for some in cases.chunks(4) {
        thread::scope(|scope| {
            for (rules, profile, reason) in some {
                scope.spawn(|| gets_no_kek(&library, rules, profile, reason));
            }
        });
    }
}

fn gets_no_kek(library: &Path, rules: &str, profile: &str, reason: &str) {
    let dressed = Dressed::new(library, rules, profile);
    let refused = dressed.generate();
    assert!(!refused.status.success() && said(&refused).contains(reason), "{rules}: {profile}: {}", said(&refused));
    let listed: Value = serde_json::from_slice(&dressed.run(&["key", "list", "--output", "json"]).stdout).unwrap();
    assert_eq!(listed["keks"].as_array().unwrap().len(), 0, "{rules}: {profile}: {listed}");
    assert_eq!(listed["refused"].as_array().unwrap().len(), 0, "{rules}: {profile}: {listed}");
}

#[test]
fn what_a_token_cannot_set_or_say_of_a_key_is_left_out_if_the_profile_says_so() {
    if Family::chosen().lacks_aes() || Family::chosen().is_dressed() {
        return;
    }
    let Some(library) = library() else { return };
    for (rules, quirk) in [
        (
            "C_GenerateKey forbid 0x170\nC_GenerateKey forbid 0x171",
            "omit-attributes = [\"CKA_MODIFIABLE\", \"CKA_COPYABLE\"]",
        ),
        (
            "C_GenerateKey forbid 0x40000600\nC_GenerateKey forbid 0x106\nC_GenerateKey forbid 0x107",
            "omit-attributes = [\"CKA_ALLOWED_MECHANISMS\", \"CKA_WRAP\", \"CKA_UNWRAP\"]",
        ),
        (
            "C_GetAttributeValue hide 0x163\nC_GetAttributeValue hide 0x165\nC_GetAttributeValue hide 0x164",
            "excuses = [\"CKA_LOCAL\", \"CKA_ALWAYS_SENSITIVE\", \"CKA_NEVER_EXTRACTABLE\"]",
        ),
    ] {
        let dressed = Dressed::new(&library, rules, &format!("modes = [\"gcm\"]\n{quirk}"));
        let made = dressed.generate();
        assert!(made.status.success(), "{rules}: {}", said(&made));
        dressed.serve_healthy().round_trip();
    }
}

#[test]
fn the_initial_value_of_aes_key_wrap_can_be_given() {
    if Family::chosen() != Family::Kryoptic {
        eprintln!("skipped: only kryoptic takes AES-KW with a parameter");
        return;
    }
    let Some(library) = library() else { return };
    for mode in ["encrypt", "encrypt-kwp", "wrapkey", "wrapkey-kwp"] {
        let dressed = Dressed::new(&library, "", &format!("modes = [\"{mode}\"]\nexplicit-iv = true"));
        assert!(dressed.generate().status.success(), "{mode}");
        let (sealed, key_id) = dressed.serve_healthy().round_trip();
        // It is the standard's: without it, the same is opened.
        dressed.set_profile(&format!("modes = [\"{mode}\"]"));
        dressed.serve_healthy().decrypt(&sealed, &key_id).unwrap();
    }
}
