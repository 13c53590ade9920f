//! The plugin under its own units, in containers that are set up like a control-plane host: systemd as PID 1, a SoftHSM
//! token, and the socket on a bind mount, through which the tests send their requests.
//!
//! What comes from packages needs $TROUSSEAU_PACKAGES beside that, see [`packages`].
//!
//! `tests/containers/run.sh cargo test --test containers` provides the daemon and the image. Without it, or where no
//! container can run, the tests say what was lacking and pass; $TROUSSEAU_TEST_REQUIRE lets the latter alone pass.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod boot;
mod changes;
mod load;
mod machine;
mod monitoring;
mod packages;
mod rotation;
mod static_pod;
mod supervision;
mod units;
