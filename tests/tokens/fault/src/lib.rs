//! A PKCS#11 module that forwards every call to a real one and makes faults, as README.md says.
//!
//! [`table`] is the function list, [`special`] the functions that need more than forwarding, [`dress`] those by which tokens differ; all pass through
//! [`faults::intercept`], which asks the [`rules`] that [`watch`] keeps current.
#![allow(non_snake_case)]

mod codes;
mod dress;
mod faults;
mod pins;
mod real;
mod rules;
mod sessions;
mod special;
mod table;
mod watch;
