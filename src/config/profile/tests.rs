#![allow(clippy::unwrap_used)]

use super::*;

const GOOD: &str = "title = \"a token\"\nstatus = \"tested\"\nmodule-paths = []\nmodes = [\"encrypt\"]\n";

#[test]
fn every_shipped_profile_loads_and_says_from_where_it_is_known() {
    assert!(SHIPPED.iter().any(|(name, _)| *name == "generic"));
    for (name, text) in SHIPPED {
        Profile::parse(name, Path::new(name), text).unwrap();
    }
}

#[test]
fn a_profile_that_cannot_be_meant_is_refused_with_the_field_and_the_line() {
    for (text, what) in [
        ("modes = []", "modes is empty"),
        ("modes = [\"encrypted\"]", "line 4: unknown variant `encrypted`"),
        ("mode = [\"encrypt\"]", "line 4: unknown field `mode`"),
        ("modes = [\"encrypt\"]\nmechanisms = { gcm = 1 }", "mechanisms has gcm, which is not in modes"),
        ("modes = [\"encrypt\"]\nmechanisms = { ecb = 1 }", "line 5: unknown variant `ecb`"),
        ("modes = [\"encrypt\"]\nmechanisms = { encrypt = -1 }", "line 5: "),
        ("modes = [\"encrypt\"]\ngcm-iv = \"appended\"", "gcm-iv is for the mode gcm"),
        ("modes = [\"gcm\"]\ngcm-iv = \"constant\"", "line 5: unknown variant `constant`"),
        ("modes = [\"gcm\"]\nomit-attributes = [\"CKA_EXTRACTABLE\"]", "line 5: unknown variant `CKA_EXTRACTABLE`"),
        ("modes = [\"gcm\"]\nexcuses = [\"CKA_SENSITIVE\"]", "line 5: unknown variant `CKA_SENSITIVE`"),
        ("modes = [\"gcm\", \"encrypt\"]\nomit-attributes = [\"CKA_ALLOWED_MECHANISMS\"]", "which of its modes"),
        ("modes = [\"gcm\"]\nenvironment = [\"A=b\"]", "environment has `A=b`"),
        ("modes = [\"gcm\"]\nenvironment = [\"1A\"]", "environment has `1A`"),
        ("modes = [\"gcm\"]\nenvironment = [\"\"]", "environment has ``"),
        ("modes = [\"gcm\"]\nenvironment = \"A\"", "line 5: "),
        ("modes = [\"gcm\"]\nmax-sessions = 2", "max-sessions is less than 3"),
        ("modes = [\"oaep\"]\nmechanisms = { oaep = 0x80000001 }", "always CKM_RSA_PKCS_OAEP"),
        ("modes = [\"gcm\"]\nsees-new-keys = \"no\"", "line 5: "),
        ("modes = [\"gcm\"]\nrenew-after = 0", "renew-after is 0"),
        ("modes = [\"gcm\"]\nrenew-after = 1\nreinitialize = false", "renew-after contradicts"),
        ("modes = [\"gcm\"]\n[errors]\nCKR_PIN_INCORRECT = \"token\"", "line 6: CKR_PIN_INCORRECT blames the PIN"),
        ("modes = [\"gcm\"]\nerrors.CKR_PIN_LOCKED = \"session\"", "line 5: CKR_PIN_LOCKED blames the PIN"),
        ("modes = [\"gcm\"]\n[errors]\n0x6 = \"pin\"\n0xA3 = \"doubtful\"", "line 7: CKR_PIN_EXPIRED blames the PIN"),
        ("modes = [\"gcm\"]\n[errors]\nCKR_PIN_INVALID = \"login\"", "it cannot be of class `login`"),
        ("modes = [\"gcm\"]\n[errors]\nCKR_PIN_LEN_RANGE = \"fatal\"", "it cannot be of class `fatal`"),
    ] {
        let text = GOOD.replace("modes = [\"encrypt\"]", text);
        let error = Profile::parse("name", Path::new("name.toml"), &text).unwrap_err();
        assert!(error.to_string().contains(what), "{text}\n{error}");
    }
    let untested = GOOD.replace("tested", "community");
    let error = Profile::parse("name", Path::new("name.toml"), &untested).unwrap_err();
    assert!(error.to_string().contains("sources is empty"), "{error}");
}

#[test]
fn what_is_written_of_a_profile_is_read_as_the_same() {
    let quirks = "\n[errors]\nCKR_DEVICE_ERROR = \"token\"\n0x80000001 = \"session\"\n";
    let more = [("quirks", &*format!("{GOOD}{quirks}"))];
    for (name, text) in SHIPPED.iter().copied().chain(more) {
        let profile = Profile::parse(name, Path::new(name), text).unwrap();
        let written = profile.to_toml().unwrap();
        assert_eq!(Profile::parse(name, Path::new(name), &written).unwrap(), profile, "{written}");
        // A part of its modes is a profile too.
        for kept in &profile.modes {
            let found = profile.of_token("found".into(), "doctor", Path::new("/lib.so"), |mode| mode == *kept);
            let again = Profile::parse(name, Path::new(name), &found.to_toml().unwrap()).unwrap();
            assert_eq!((&again.modes, &again.errors), (&vec![*kept], &profile.errors), "{name}");
            assert_eq!(again.mechanism(*kept), profile.mechanism(*kept), "{name}");
        }
    }
}

#[test]
fn a_mechanism_is_the_profiles_or_else_the_standards() {
    let text = GOOD.replace("[\"encrypt\"]", "[\"encrypt\", \"encrypt-kwp\"]\nmechanisms = { encrypt = 0x80000170 }");
    let profile = Profile::parse("name", Path::new("name.toml"), &text).unwrap();
    assert_eq!([Mode::Encrypt, Mode::EncryptKwp].map(|mode| profile.mechanism(mode)), [0x8000_0170, 0x210b]);
}

#[test]
fn a_module_that_is_one_profiles_own_needs_no_name_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let module = |name: &str| Profile::of_module(Path::new(name), directory.path(), Path::new("trousseau.toml"));
    assert_eq!(module("/opt/here/libsofthsm2.so").unwrap().name, "softhsm");
    let error = module("/opt/here/libunknown.so").unwrap_err();
    assert!(error.to_string().contains("no profile has the module /opt/here/libunknown.so"), "{error}");

    let own = GOOD.replace("[]", "[\"/usr/local/libsofthsm2.so\"]");
    std::fs::write(directory.path().join("own.toml"), own).unwrap();
    let error = module("/opt/here/libsofthsm2.so").unwrap_err();
    assert!(error.to_string().contains("more than one profile"), "{error}");
    assert!(error.remedy().contains("own or softhsm"), "{}", error.remedy());
}
