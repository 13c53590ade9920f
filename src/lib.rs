//! x
pub mod cli;
pub mod config;
pub mod envelope;
pub mod health;
pub mod identity;
pub mod keyring;
pub mod provider;
pub mod secret;
pub mod service;
pub mod state;
pub mod telemetry;
