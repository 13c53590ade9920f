//! Section 1: a page for each verb, from the command line's own definition.

use clap::Command;
use clap_mangen::Man;

use crate::roff::{prose, see_also, verbatim};

pub fn pages(command: Command, date: &str) -> Vec<(String, String)> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    add(&command, date, &mut pages);
    pages
}

fn add(command: &Command, date: &str, pages: &mut Vec<(String, String)>) {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    pages.push((format!("{name}.1"), page(command, &name, date)));
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        add(verb, date, pages);
    }
}

fn page(command: &Command, name: &str, date: &str) -> String {
    let (description, examples, exit_codes) = sections(command);
    let man = Man::new(command.clone())
        .title(name)
        .section("1")
        .date(date)
        .source(concat!("Trousseau ", env!("CARGO_PKG_VERSION")))
        .manual("Trousseau");
    let mut page = Vec::new();
    man.render_title(&mut page).unwrap();
    man.render_name_section(&mut page).unwrap();
    man.render_synopsis_section(&mut page).unwrap();
    man.render_description_section(&mut page).unwrap();
    page.extend(description.bytes());
    if command.get_arguments().next().is_some() {
        man.render_options_section(&mut page).unwrap();
    }
    if command.get_subcommands().next().is_some() {
        man.render_subcommands_section(&mut page).unwrap();
    }
    let mut page = String::from_utf8(page).unwrap();
    if let Some(codes) = exit_codes {
        page += &format!(".SH EXIT STATUS\n{}", verbatim(&codes));
    }
    if let Some(examples) = examples {
        page += &format!(".SH EXAMPLES\n{}", verbatim(&examples));
    }
    let mut others = vec!["trousseau(1)", "trousseau.toml(5)", "trousseau-profile(5)"];
    others.retain(|page| *page != format!("{name}(1)"));
    page + &see_also(&others)
}

/// What the help says at its end: the prose, the examples, and the exit codes.
fn sections(command: &Command) -> (String, Option<String>, Option<String>) {
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (mut description, mut examples, mut codes) = (String::new(), None, None);
    for block in help.split("\n\n") {
        let (first, rest) = block.split_once('\n').unwrap_or((block, ""));
        match first {
            "Examples:" | "Example:" => examples = Some(unindented(rest)),
            "Exit codes:" => codes = Some(unindented(rest)),
            _ if block.is_empty() => {}
            _ => description += &format!(".PP\n{}\n", block.lines().map(prose).collect::<Vec<_>>().join("\n")),
        }
    }
    (description, examples, codes)
}

fn unindented(text: &str) -> String {
    text.lines().map(|line| line.strip_prefix("  ").unwrap_or(line)).collect::<Vec<_>>().join("\n")
}
