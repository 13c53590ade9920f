//! Whatever an older plugin may have left in etcd: what is found in it is in its canonical form, and nothing else.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use trousseau::legacy::{Format, parse};

fuzz_target!(|bytes: &[u8]| {
    let all = [Format::TrousseauV1, Format::TrousseauV2, Format::TrousseauV2Proxy, Format::VaultKubernetesKms];
    if let Ok(ciphertext) = parse(bytes, &BTreeSet::from(all)) {
        let canonical = ciphertext.to_string();
        assert!(ciphertext.version() > 0 && canonical.len() <= 1024);
        assert_eq!(parse(canonical.as_bytes(), &BTreeSet::from([Format::TrousseauV1])), Ok(ciphertext));
        assert!(parse(bytes, &BTreeSet::new()).is_err());
    }
});
