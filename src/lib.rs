//! Trousseau is a Kubernetes KMS plugin: the key-encryption key (KEK) stays in a PKCS#11 token, and each request gets
//! a data key (DEK) of its own, which the KEK wraps through a pool of token sessions.
//!
//! # The way of an Encrypt
//!
//! It walks straight down, and its answer back up:
//!
//! 1. [`service::listener`] accepts the API server, if its uid is allowed; [`service::authority`] mends the one header
//!    that grpc-go and Rust's h2 disagree about.
//! 2. `service::v2` translates between the wire and the keyring.
//! 3. [`keyring`] chooses the active KEKs, makes a DEK, and has each of them wrap it.
//! 4. [`envelope`] seals the plaintext under the DEK, and lays out the bytes that etcd keeps.
//! 5. [`provider::pkcs11`] wraps the DEK: a queue, a thread that owns a session, and the C calls of the KEK's mode.
//!
//! Or [`provider::transit`] does, over HTTP, with one version of a key of Vault's. With several providers, each wraps the
//! same DEK, and any of them opens the envelope.
//!
//! Arrows point down only. Beside that way stand [`identity`], the names that live as long as the data; [`secret`],
//! the types that wipe themselves; [`state`], what one host remembers; [`health`], what Status says; [`config`], which
//! is checked once and ends at the constructors; [`legacy`], what older plugins left in etcd; [`systemd`], [`telemetry`] and [`observe`], what others are told; [`audit`], what auditors read; and
//! [`cli`], a file for each verb. Whether a token keeps a key in is tried by the verbs that ask for it (`key attest`,
//! `doctor`, `key generate`), on throw-away keys, in the room `exportability` of [`provider::pkcs11`]; what a key is worth
//! without a token's word for its history, in the room `admission`.
//!
//! # Who may know what
//!
//! Only [`service`] knows tonic, only [`provider::pkcs11`] knows cryptoki, and only [`keyring`] chooses a key. A new
//! kind of service that holds KEKs is a new room in [`provider`]; a new token family is a file in `hsm-profiles/`.
//!
//! # Threads
//!
//! One thread at a time runs everything asynchronous ([`runtime`]). Each token has a supervisor thread, and a thread for
//! each session: a C call blocks and cannot be cancelled, so it must not happen where others wait. Only while a token
//! answers sooner than a thread is woken does the async thread call it itself, and another stands by to take its place.

pub mod audit;
pub mod cli;
pub mod config;
mod disk;
pub mod envelope;
pub mod health;
pub mod histogram;
pub mod identity;
pub mod keyring;
pub mod legacy;
pub mod observe;
pub mod provider;
pub mod runtime;
pub mod secret;
pub mod service;
pub mod state;
mod sync;
pub mod systemd;
pub mod telemetry;
