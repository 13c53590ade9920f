//! `trousseau probe`: a value goes out and comes back.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use jiff::SignedDuration;
use serde::Serialize;
use zeroize::Zeroizing;

use super::output::{Failure, Format, print, print_json};
use super::{OutputArgs, SocketArgs, some_duration};
use crate::config::Config;
use crate::service::client::{Client, ClientError};

pub(super) const EXAMPLES: &str = "It calls Status, then encrypts 32 random bytes, decrypts them and compares.

Examples:
  trousseau probe
  trousseau probe --config /etc/trousseau/trousseau.toml
  trousseau probe --socket /run/trousseau/kms.sock --output json";

#[derive(Args)]
pub(super) struct ProbeArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// The plugin's configuration, which names the socket.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How long each call may take.
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = some_duration)]
    timeout: SignedDuration,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Probed {
    key_id: String,
    plaintext_bytes: usize,
    ciphertext_bytes: usize,
    status_micros: u64,
    encrypt_micros: u64,
    decrypt_micros: u64,
}

pub(super) fn run(args: &ProbeArgs) -> Result<(), Failure> {
    let probed = super::runtime()?.block_on(probe(args))?;
    match args.output.output {
        Format::Json => print_json(&probed),
        Format::Text => print(&text(&probed)),
    }
}

async fn probe(args: &ProbeArgs) -> Result<Probed, Failure> {
    let config = args.config.as_deref().map(Config::read).transpose()?;
    let mut client = Client::connect(args.socket.of(config.as_ref()), args.timeout.unsigned_abs()).await?;
    let mut seed = Zeroizing::new(vec![0; 32]);
    getrandom::fill(&mut seed).map_err(|error| Failure::failed(format!("getrandom(2): {error}"), ""))?;

    let (status, status_micros) = timed(client.status()).await?;
    let ((ciphertext, key_id), encrypt_micros) = timed(client.encrypt(seed.to_vec())).await?;
    let ciphertext_bytes = ciphertext.len();
    let (opened, decrypt_micros) = timed(client.decrypt(ciphertext, key_id.clone())).await?;
    if Zeroizing::new(opened) != seed {
        return Err(Failure::failed("Decrypt gave back another value than was encrypted", "stop using this plugin"));
    }
    if status.key_id != key_id {
        let what = format!("Status says key_id {}, and Encrypt says {key_id}", status.key_id);
        return Err(Failure::failed(what, "probe again: a KEK may just have become active"));
    }
    let plaintext_bytes = seed.len();
    Ok(Probed { key_id, plaintext_bytes, ciphertext_bytes, status_micros, encrypt_micros, decrypt_micros })
}

async fn timed<T>(call: impl Future<Output = Result<T, ClientError>>) -> Result<(T, u64), ClientError> {
    let began = Instant::now();
    let answer = call.await?;
    Ok((answer, u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX)))
}

fn text(probed: &Probed) -> String {
    let milliseconds = |micros: u64| format!("{}.{:02} ms", micros / 1000, micros % 1000 / 10);
    format!(
        "key_id      {}\nStatus      {}\nEncrypt     {} bytes became {} in {}\nDecrypt     gave them back in {}\n\
         round trip  {}",
        probed.key_id,
        milliseconds(probed.status_micros),
        probed.plaintext_bytes,
        probed.ciphertext_bytes,
        milliseconds(probed.encrypt_micros),
        milliseconds(probed.decrypt_micros),
        milliseconds(probed.encrypt_micros + probed.decrypt_micros),
    )
}
