//! The profiles that every binary carries, which build.rs found in `hsm-profiles/`. A file of the same name in the
//! configuration's `hsm-profiles/` goes first.

/// Each with its name, in order.
pub(super) const SHIPPED: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/profiles.rs"));
