//! `trousseau encryption-config`: what an API server needs to be told, from the texts in `encryption-config/`.

use std::path::Path;

use clap::{Args, ValueEnum};

use super::output::{Failure, print};
use crate::config::DEFAULT_SOCKET;

pub(super) const EXAMPLES: &str = "The output is a valid EncryptionConfiguration; the steps for the distribution are \
comments in it.

Examples:
  (umask 077; trousseau encryption-config --for kubeadm > encryption-config.yaml)
  trousseau encryption-config --for k3s --resource secrets --resource configmaps";

#[derive(Args)]
pub(super) struct EncryptionConfigArgs {
    /// The socket that the plugin serves.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, value_parser = socket)]
    socket: String,
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
    let directory = Path::new(&args.socket).parent().unwrap_or(Path::new("/"));
    let steps = match args.distribution {
        Distribution::Kubeadm => include_str!("encryption-config/kubeadm.txt"),
        Distribution::Rke2 => include_str!("encryption-config/rke2.txt"),
        Distribution::Rke => include_str!("encryption-config/rke.txt"),
        Distribution::K3s => include_str!("encryption-config/k3s.txt"),
    };
    let resources: Vec<String> = args.resource.iter().map(|resource| format!("      - {resource}")).collect();
    let text = [include_str!("encryption-config/common.yaml"), steps]
        .concat()
        .replace("@SOCKET@", &args.socket)
        .replace("@DIRECTORY@", &directory.display().to_string())
        .replace("@NAME@", &args.name)
        .replace("@RESOURCES@", &resources.join("\n"))
        .replace("@KINDS@", &args.resource.join(","));
    print(text.trim_end())
}

/// The path is written into YAML and into a URL.
fn socket(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    match text.starts_with('/') && text.chars().all(plain) {
        true => Ok(text.to_owned()),
        false => Err("an absolute path of letters, digits and `._-`".into()),
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
