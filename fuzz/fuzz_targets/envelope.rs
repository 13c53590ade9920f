//! Whatever lies in etcd: parsing ends well, and what parses opens under no DEK that did not seal it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use trousseau::envelope::Envelope;
use trousseau::secret::Dek;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(envelope) = Envelope::parse(bytes) {
        assert!((1..=8).contains(&envelope.recipients.len()));
        let dek = Dek::from_bytes(&[7; Dek::LEN]).expect("32 bytes");
        assert!(envelope.open(&dek).is_err());
    }
});
