//! Writes the man pages and the completions into directories:
//!
//! ```text
//! cargo run --example pages -- DIRECTORY
//! ```
//!
//! The packages carry them. An example makes them and not a verb, since what the daemon does not need is not linked
//! into it; and so a package for another architecture gets them from the machine that builds it.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod markdown;
mod reference;
mod roff;
mod verbs;

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use clap_complete::Shell;
use jiff::Timestamp;

const CONFIGURATION: &str = include_str!("../../packaging/trousseau.toml");
const PROFILES: &str = include_str!("../../hsm-profiles/README.md");

/// Every page, with its file's name.
fn pages(date: &str) -> Vec<(String, String)> {
    let mut pages = verbs::pages(trousseau::cli::command(), date);
    pages.push(("trousseau.toml.5".into(), reference::page(CONFIGURATION, date)));
    pages.push(("trousseau-profile.5".into(), markdown::page(PROFILES, date)));
    pages.into_iter().map(|(name, text)| (name, roff::tidy(&text))).collect()
}

/// The day that the pages bear: that of the sources, as reproducible builds have it, else today.
fn date() -> Result<String, Box<dyn Error>> {
    let epoch = env::var("SOURCE_DATE_EPOCH").ok().map(|seconds| seconds.parse()).transpose()?;
    let instant = epoch.map_or_else(|| Ok(Timestamp::now()), Timestamp::from_second)?;
    Ok(instant.strftime("%Y-%m-%d").to_string())
}

fn main() -> Result<(), Box<dyn Error>> {
    let directory = PathBuf::from(env::args_os().nth(1).ok_or("usage: pages DIRECTORY")?);
    for (name, text) in pages(&date()?) {
        let section = name.rsplit('.').next().unwrap_or_default();
        let section = directory.join(format!("man{section}"));
        fs::create_dir_all(&section)?;
        fs::write(section.join(&name), text)?;
    }
    let completions = directory.join("completions");
    fs::create_dir_all(&completions)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut trousseau::cli::command(), "trousseau", &completions)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// The keys that serde knows there, from how it refuses another.
    fn keys_of(table: &str) -> Vec<String> {
        let said = toml::from_str::<trousseau::config::Profile>(&format!("{table}no-such-key = 1\n")).unwrap_err();
        let said = said.message().to_owned();
        let (_, expected) = said.split_once("expected one of ").unwrap_or_else(|| panic!("{said}"));
        expected.split(", ").map(|key| key.trim_matches('`').to_owned()).collect()
    }

    #[test]
    fn the_page_on_profiles_names_every_key() {
        let page = markdown::page(PROFILES, "2026-01-01");
        for key in keys_of("") {
            let tag = format!("\\fB{}", roff::escape(&key));
            assert!(page.contains(&tag) || page.contains(&format!("\\fB[{key}]")), "{key} is missing");
        }
    }

    #[test]
    fn the_page_on_the_configuration_has_every_key_and_all_the_prose_of_the_reference() {
        let page = reference::page(CONFIGURATION, "2026-01-01");
        let plain = page.replace("\\fB", "").replace("\\fR", "");
        for line in CONFIGURATION.lines().filter(|line| !line.is_empty()) {
            let words = roff::escape(&line.trim_start_matches('#').replace('`', ""));
            match line.trim_start_matches("# ").split_once(" = ") {
                Some((key, _)) if reference::is_code(line) => {
                    assert!(page.contains(&format!("\\fB{}\\fR", roff::escape(key))), "{key} is missing");
                }
                _ => assert!(words.split(' ').all(|word| plain.contains(word)), "{line} is missing"),
            }
        }
    }

    #[test]
    fn there_is_a_page_for_every_verb_with_its_examples() {
        let pages = pages("2026-01-01");
        for name in ["trousseau", "trousseau-serve", "trousseau-key", "trousseau-key-generate", "trousseau-pin-retry"] {
            let page = pages.iter().find(|(file, _)| *file == format!("{name}.1"));
            assert!(page.is_some(), "{name} has none");
        }
        let (_, generate) = pages.iter().find(|(file, _)| file == "trousseau-key-generate.1").unwrap();
        assert!(generate.contains(".SH EXAMPLES"), "{generate}");
        assert!(!generate.contains("Examples:"), "{generate}");
    }

    #[test]
    fn man_finds_no_fault_in_the_pages() {
        let groff = ["groff", "-ww", "-man", "-Kutf8", "-Tutf8", "-z"];
        let mandoc = ["mandoc", "-Tlint", "-Wwarning"];
        for command in [groff.as_slice(), &mandoc] {
            if Command::new(command[0]).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
                assert!(env::var_os("TROUSSEAU_TEST_REQUIRE").is_none(), "install {}", command[0]);
                eprintln!("skipped: {} is lacking, which Debian's package of that name has", command[0]);
                continue;
            }
            for (name, text) in pages("2026-01-01") {
                let mut child = Command::new(command[0])
                    .args(&command[1..])
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap();
                child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
                let done = child.wait_with_output().unwrap();
                let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
                assert_eq!(said, "", "{name}, by {}", command[0]);
            }
        }
    }
}
