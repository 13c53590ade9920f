//! `trousseau migrate …`: from another plugin's configuration to ours.

mod files;
mod trousseau;
mod yaml;

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use zeroize::Zeroizing;

use self::files::Files;
use self::trousseau::{Conversion, Refused};
use super::OutputArgs;
use super::output::{Failure, Format, print, print_json};
use crate::config::{CLUSTER_NAME, is_cluster_name};

#[derive(Subcommand)]
pub(super) enum MigrateVerb {
    /// Make a configuration of ondat/trousseau, version 1 or 2, into one of this plugin.
    #[command(after_help = FROM_TROUSSEAU_EXAMPLES)]
    FromTrousseau(FromTrousseauArgs),
}

const FROM_TROUSSEAU_EXAMPLES: &str = "Nothing is overwritten, and the old file stays as it is. Secrets in it go into \
files of their own under credentials/, which only root can read; credentials.conf hands them to the unit. What has no \
place in the new configuration is said, and so is what only you can know.

The guide for the whole way begins where this ends: /usr/share/doc/trousseau/guides/from-trousseau.md, or \
packaging/guides/from-trousseau.md in the source.

Examples:
  trousseau migrate from-trousseau --config /opt/trousseau-kms/config.yaml --cluster prod-1
  trousseau migrate from-trousseau --config old.yaml --out ./new --output json";

#[derive(Args)]
pub(super) struct FromTrousseauArgs {
    /// The old plugin's configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The directory for the new files; made if it is not there.
    #[arg(long, value_name = "DIR", default_value = "/etc/trousseau")]
    out: PathBuf,
    /// The name of the cluster, which can never be changed.
    #[arg(long, value_name = "NAME", value_parser = cluster)]
    cluster: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

const NEXT: &str = "step 2 of /usr/share/doc/trousseau/guides/from-trousseau.md (packaging/guides/ in the source)";

/// What was done, without a secret in it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    from_version: u8,
    written: Vec<PathBuf>,
    load_credential: Vec<String>,
    not_carried: Vec<String>,
    to_check: Vec<String>,
    next: &'static str,
}

pub(super) fn run(verb: &MigrateVerb) -> Result<(), Failure> {
    match verb {
        MigrateVerb::FromTrousseau(args) => from_trousseau(args),
    }
}

fn from_trousseau(args: &FromTrousseauArgs) -> Result<(), Failure> {
    let old = args.config.as_path();
    let text = fs::read_to_string(old).map(Zeroizing::new).map_err(|error| {
        let remedy = "name the file that the old plugin's --config-file-path named";
        Failure::configuration(format!("{}: cannot be read: {error}", old.display()), remedy)
    })?;
    let Conversion { generation, toml, secrets, secret_files, not_carried, mut to_check, had_secrets } =
        trousseau::convert(&text, args.cluster.as_deref()).map_err(|refused| failure(old, refused))?;
    if had_secrets {
        to_check.push(format!("{} still holds its secrets: remove it when nothing runs from it", old.display()));
    }
    let origin = old.display().to_string();
    let from = format!("# Made by `trousseau migrate` from {}, of version {generation}.\n", origin.escape_debug());
    let files = Files::new(&args.out, from + &toml, secrets, secret_files)?;
    let load_credential = files.load_credential();
    let written = files.write()?;
    let report = Report { from_version: generation, written, load_credential, not_carried, to_check, next: NEXT };
    match args.output.output {
        Format::Json => print_json(&report),
        Format::Text => print(&report.text()),
    }
}

fn cluster(text: &str) -> Result<String, String> {
    match is_cluster_name(text) {
        true => Ok(text.to_owned()),
        false => Err(format!("{CLUSTER_NAME}; it can never be changed")),
    }
}

fn failure(file: &Path, Refused { line, what, remedy }: Refused) -> Failure {
    let place = line.map(|line| format!(", line {line}")).unwrap_or_default();
    Failure::configuration(format!("{}{place}: {what}", file.display()), remedy)
}

impl Report {
    fn text(&self) -> String {
        let written: Vec<String> = self.written.iter().map(|file| file.display().to_string()).collect();
        let parts = [
            ("written", written.as_slice()),
            ("not carried over", &self.not_carried),
            ("to check", &self.to_check),
            ("next", &[self.next.to_owned()]),
        ];
        let part = |(title, lines): (&str, &[String])| format!("{title}\n  {}\n", lines.join("\n  "));
        let parts: Vec<String> = parts.into_iter().filter(|(_, lines)| !lines.is_empty()).map(part).collect();
        parts.join("\n").trim_end().to_owned()
    }
}
