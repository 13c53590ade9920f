//! `trousseau status`: what a serving plugin says of itself.

use std::time::Duration;

use clap::Args;

use super::output::{Failure, Format, print, print_json};
use super::{OutputArgs, SocketArgs};
use crate::service::client::Client;

pub(super) const EXAMPLES: &str = "Examples:
  trousseau status
  trousseau status --socket /run/trousseau/kms.sock --output json";

#[derive(Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    socket: SocketArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(args: &StatusArgs) -> Result<(), Failure> {
    let status = super::runtime()?.block_on(async {
        let mut client = Client::connect(&args.socket.socket, Duration::from_secs(3)).await?;
        client.status().await
    })?;
    match args.output.output {
        Format::Json => print_json(&status),
        Format::Text => {
            print(&format!("version  {}\nhealthz  {}\nkey_id   {}", status.version, status.healthz, status.key_id))
        }
    }
}
