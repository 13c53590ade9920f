//! KEKs of two RSA pairs: what they have not signed never reaches the token.

use std::fs;

use rsa::{BoxedUint, Pkcs1v15Sign, PrivateKey};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tonic::Code;
use trousseau::envelope::Envelope;

use crate::attest::host_of_pairs;
use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::plugin::{Answer, Host};

/// Where the wrapped DEK of an envelope's first recipient begins.
const WRAPPED: usize = 38;

/// SoftHSM lists RSA-OAEP and takes no hash but SHA-1.
#[test]
fn a_kek_that_does_not_work_is_not_left_in_the_token() {
    let host = host_of_pairs();
    if host.token.family != Family::SoftHsm {
        eprintln!("skipped: this token does not refuse what it lists");
        return;
    }
    let generate = ["key", "generate", "--unsynchronized-clock-ok", "--activate-in", "0s", "--config"];
    let configuration = host.write_configuration();
    let made = host.command(&generate).arg(&configuration).output().unwrap();
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(said.contains("does not work") && said.contains("it was removed again"), "{said}");
    let listed = host.command(&["key", "list", "--output", "json", "--config"]).arg(&configuration).output().unwrap();
    let keys: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!((&keys["keks"], &keys["refused"]), (&json!([]), &json!([])), "{keys:#} {listed:?}");
}

#[test]
fn an_unsigned_or_re_signed_recipient_is_refused_and_the_token_decrypts_nothing() {
    let family = Family::chosen();
    if !family.modes().contains(&"oaep") {
        eprintln!("skipped: the profile of {family:?} has no mode oaep");
        return;
    }
    let Some(library) = library() else { return };
    let mut host = Host::new();
    host.sessions = 1;
    host.generate("0s");
    let faults = Faults { host: &host, library: &library };
    let plugin = faults.start_healthy(faults.command_with_log("calls"));
    let ((sealed, key_id), (other, _)) = (plugin.round_trip(), plugin.round_trip());
    let calls = || fs::read_to_string(host.path("calls")).unwrap();

    let envelope = Envelope::parse(&sealed).unwrap();
    let recipient = &envelope.recipients[0];
    let half = recipient.wrapped.len() / 2;
    let (ciphertext, signature) = recipient.wrapped.split_at(half);
    let (other_ciphertext, other_signature) = Envelope::parse(&other).unwrap().recipients[0].wrapped.split_at(half);
    let forger = forger(half * 8);
    let forge = |ciphertext: &[u8]| {
        let signed = Sha256::new()
            .chain_update(b"trousseau rsa-oaep v1\0")
            .chain_update(recipient.identity.as_bytes())
            .chain_update(ciphertext);
        forger.sign(Pkcs1v15Sign::new::<Sha256>(), &signed.finalize()).unwrap()
    };
    for (case, wrapped) in [
        ("unsigned", [ciphertext, &vec![0; half]].concat()),
        ("a ciphertext for a signature", [ciphertext, other_ciphertext].concat()),
        ("another ciphertext under a true signature", [other_ciphertext, signature].concat()),
        ("another signature", [ciphertext, other_signature].concat()),
        ("signed again by another key", [ciphertext, &forge(ciphertext)].concat()),
        ("another ciphertext, signed by another key", [other_ciphertext, &forge(other_ciphertext)].concat()),
    ] {
        let mut forged = sealed.clone();
        forged[WRAPPED..WRAPPED + 2 * half].copy_from_slice(&wrapped);
        // A look at the token may come between, or a probe: these decrypt something of the plugin's own.
        let mut asked = (0..5).map(|_| {
            let before = calls().len();
            let Answer { code, message } = plugin.decrypt(&forged, &key_id).unwrap_err();
            assert_eq!(code, Code::InvalidArgument, "{case}: {message}");
            assert!(message.starts_with("the ciphertext is damaged or is not one of this"), "{case}: {message}");
            calls()[before..].to_owned()
        });
        assert!(asked.any(|asked| !asked.contains("C_Decrypt")), "{case}: the token decrypts each time");
    }
    let before = calls().len();
    assert_eq!(plugin.decrypt(&sealed, &key_id).unwrap(), b"thirty-two bytes of a fresh seed");
    assert!(calls()[before..].contains("C_Decrypt"));
}

/// A key that is not the KEK's.
fn forger(bits: usize) -> PrivateKey {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/oaep-1.json");
    let vectors: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let vector = vectors.as_array().unwrap().iter().find(|vector| vector["bits"] == bits).unwrap();
    let number = |name: &str| {
        BoxedUint::from_be_slice_vartime(&base16ct::lower::decode_vec(vector[name].as_str().unwrap()).unwrap())
    };
    let (n, d) = (number("modulus"), number("private_exponent"));
    PrivateKey::from_components(n, BoxedUint::from(65537_u32), d, vec![]).unwrap()
}
