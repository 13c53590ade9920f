//! A configuration and its token URIs, as an administrator or a template engine might leave them: every error has a
//! text, and no text ends the process.
#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use trousseau::config::{Config, TokenUri};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Ok(uri) = text.parse::<TokenUri>() {
            assert_eq!(uri.to_string().parse(), Ok(uri), "what is written is read as the same");
        }
        let mut file = tempfile();
        file.write_all(bytes).expect("a temporary file");
        if let Err(error) = Config::load(file.path()) {
            assert!(!error.to_string().is_empty() && !error.remedy().is_empty());
        }
    }
});

fn tempfile() -> tempfile::NamedTempFile {
    tempfile::NamedTempFile::new().expect("a temporary file")
}
