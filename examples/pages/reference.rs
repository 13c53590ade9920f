//! trousseau.toml(5), from the reference configuration: its comments are the prose, its keys the tags.

use std::mem;

use crate::roff::{escape, head, prose, see_also};

/// Whether the line is a table or a key, be it commented out.
pub fn is_code(line: &str) -> bool {
    let is_example = line.starts_with("# [") || line.contains(" = ") && !line.contains(": ");
    !line.is_empty() && (!line.starts_with('#') || is_example)
}

pub fn page(reference: &str, date: &str) -> String {
    let mut page = head("trousseau.toml", 5, date, "the configuration of Trousseau");
    page += ".SH SYNOPSIS\n/etc/trousseau/trousseau.toml\n.SH DESCRIPTION\n";
    // Comments before a key are about it; lines of code that stand together share them.
    let (mut comments, mut code) = (Vec::new(), Vec::new());
    for line in reference.lines().chain([""]) {
        if !is_code(line) && !code.is_empty() || line.is_empty() {
            page += &entry(&mem::take(&mut comments), &mem::take(&mut code));
        }
        if is_code(line) {
            code.push(line);
        } else {
            comments.push(line.trim_start_matches('#').trim_start());
        }
    }
    page += ".SH FILES\n";
    for (file, what) in [
        ("/usr/share/trousseau/trousseau.toml", "This page as a configuration, to begin with."),
        ("/etc/trousseau/hsm-profiles/", "Profiles of one's own."),
        ("/var/lib/trousseau/", "What this host remembers between runs."),
    ] {
        page += &format!(".TP\n\\fI{}\\fR\n{what}\n", escape(file));
    }
    page + &see_also(&["trousseau(1)", "trousseau-check(1)", "trousseau-profile(5)"])
}

fn entry(comments: &[&str], code: &[&str]) -> String {
    let mut entry = String::new();
    let mut is_first = true;
    for line in code {
        let (mark, bare) = match line.strip_prefix("# ") {
            Some(bare) => ("# ", bare),
            None => ("", *line),
        };
        match bare.split_once(" = ") {
            None => entry += &format!(".SS {}\n", escape(bare)),
            Some((key, value)) => {
                let tag = if mem::take(&mut is_first) { ".TP" } else { ".TQ" };
                entry += &format!("{tag}\n{mark}\\fB{}\\fR = {}\n", escape(key), escape(value));
            }
        }
    }
    let text = prose(comments.join(" ").trim());
    match (text.is_empty(), is_first) {
        (true, true) => {}
        (true, false) => entry += "\\&\n",
        (false, true) => entry += &format!(".PP\n{text}\n"),
        (false, false) => entry += &format!("{text}\n"),
    }
    entry
}
