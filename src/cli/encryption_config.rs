//! `trousseau encryption-config`: what an API server needs to be told, from the texts in `encryption-config/`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::SocketArgs;
use super::output::{Failure, print};

pub(super) const EXAMPLES: &str = "The output is a valid EncryptionConfiguration; the steps for the distribution are \
comments in it.

Examples:
  trousseau encryption-config --for kubeadm > encryption-config.yaml
  trousseau encryption-config --for k3s --resource secrets --resource configmaps";

#[derive(Args)]
pub(super) struct EncryptionConfigArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// Which distribution runs the API server.
    #[arg(long = "for", value_name = "DISTRIBUTION", default_value = "kubeadm")]
    distribution: Distribution,
    /// The provider's name; it is stored with the data and can never be changed.
    #[arg(long, value_name = "NAME", default_value = "trousseau", value_parser = provider_name)]
    name: String,
    /// What to encrypt; may be given several times.
    #[arg(long, value_name = "RESOURCE", default_value = "secrets", value_parser = resource)]
    resource: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Distribution {
    Kubeadm,
    Rke2,
    Rke,
    K3s,
}

pub(super) fn run(args: &EncryptionConfigArgs) -> Result<(), Failure> {
    let socket = absolute(&args.socket.socket)?;
    let directory = socket.parent().unwrap_or(&socket);
    let steps = match args.distribution {
        Distribution::Kubeadm => include_str!("encryption-config/kubeadm.txt"),
        Distribution::Rke2 => include_str!("encryption-config/rke2.txt"),
        Distribution::Rke => include_str!("encryption-config/rke.txt"),
        Distribution::K3s => include_str!("encryption-config/k3s.txt"),
    };
    let resources: Vec<String> = args.resource.iter().map(|resource| format!("      - {resource}")).collect();
    let text = [include_str!("encryption-config/common.yaml"), steps]
        .concat()
        .replace("@SOCKET@", &socket.display().to_string())
        .replace("@DIRECTORY@", &directory.display().to_string())
        .replace("@NAME@", &args.name)
        .replace("@RESOURCES@", &resources.join("\n"));
    print(text.trim_end())
}

fn absolute(socket: &std::path::Path) -> Result<PathBuf, Failure> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    match socket.to_str() {
        Some(text) if socket.is_absolute() && text.chars().all(plain) => Ok(socket.to_owned()),
        _ => Err(Failure::failed(
            format!("--socket {} is not an absolute path of letters, digits and `._-`", socket.display()),
            "the path is written into YAML and into a URL",
        )),
    }
}

/// The API server takes a provider's name without `:`; ours stays within DNS labels, so that YAML needs no quotes.
fn provider_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match text.starts_with(|c: char| c.is_ascii_lowercase()) && text.len() <= 63 && text.chars().all(plain) {
        true => Ok(text.to_owned()),
        false => Err("1 to 63 lower-case letters, digits and `-`, a letter first".into()),
    }
}

/// `resource` or `resource.group`.
fn resource(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
    match text.starts_with(|c: char| c.is_ascii_lowercase()) && text.chars().all(plain) {
        true => Ok(text.to_owned()),
        false => Err("a resource such as `secrets`, or `resource.group`".into()),
    }
}
