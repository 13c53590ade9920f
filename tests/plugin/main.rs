//! The plugin through its public door: the real binary, a throw-away token of a real module, a real client.
//!
//! `TROUSSEAU_TEST_TOKEN` chooses the token: `softhsm` (default), `kryoptic` with `TROUSSEAU_KRYOPTIC_MODULE`,
//! `opencryptoki` (as root) or `tpm2`. A test that does not apply to a token says why, and is skipped.
//! `TROUSSEAU_TEST_MODE` chooses the mode of KEKs where a test does not: one of the profile's, by default its first.
//! `TROUSSEAU_TEST_GCM_IV` dresses a token with AES keys as one that makes the IV of AES-GCM itself: `written`,
//! `prepended` or `appended`, by the module that makes faults.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod attest;
mod audit;
mod audit_disk;
mod bao;
mod bao_logins;
mod bao_smoke;
mod caller;
mod certificates;
mod chaos;
mod command_line;
mod daemon;
mod disk;
mod doctor;
mod family;
mod fault_module;
mod faults;
mod foreign_input;
mod habits;
mod hangs;
mod keys;
mod load;
mod migrate;
mod oaep;
mod observe;
mod pin;
mod pin_faults;
mod plugin;
mod providers;
mod providers_transit;
mod purge;
mod renewal;
mod replicas;
mod rotation;
mod scenarios;
mod secrets;
mod sizes;
mod socket;
mod supervisor;
mod token;
mod transit;
mod transit_http;
mod transit_legacy;
mod transit_logins;
mod transit_outages;
mod transit_refusals;
mod transit_rotation;
mod transit_standby;
mod transit_tokens;
mod trickle;
mod v1beta1;
mod vectors;
mod verbs;
