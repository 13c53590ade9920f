//! x
pub mod envelope;
pub mod identity;
pub mod secret;
