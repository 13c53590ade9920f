//! trousseau-profile(5), from the Markdown that stands beside the profiles: headings, paragraphs and tables.

use crate::roff::{head, prose, see_also};

pub fn page(text: &str, date: &str) -> String {
    let mut page = head("trousseau-profile", 5, date, "what Trousseau knows of a family of tokens");
    page += ".SH SYNOPSIS\n/etc/trousseau/hsm\\-profiles/NAME.toml\n.SH DESCRIPTION\n";
    for block in text.split("\n\n").map(str::trim).filter(|block| !block.is_empty() && !block.starts_with("# ")) {
        if let Some(heading) = block.strip_prefix("## ") {
            page += &format!(".SH {}\n", prose(&heading.to_uppercase()));
        } else if block.starts_with('|') {
            page += &table(block);
        } else {
            page += &format!(".PP\n{}\n", prose(&block.replace('\n', " ")));
        }
    }
    page += ".SH FILES\n.TP\n\\fI/usr/share/trousseau/hsm\\-profiles/\\fR\n";
    page += "The profiles that every binary carries, to be read. Changing these changes nothing: one of the same name in\n\
             \\fI/etc/trousseau/hsm\\-profiles/\\fR goes first.\n";
    page + &see_also(&["trousseau(1)", "trousseau.toml(5)", "trousseau-doctor(1)"])
}

/// Each row as a tag, and what is said of it; a third column under its own name.
fn table(block: &str) -> String {
    let mut rows = block.lines().map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect::<Vec<_>>());
    let names = rows.next().unwrap_or_default();
    let mut table = String::new();
    for cells in rows.skip(1) {
        if let [tag, first, rest @ ..] = cells.as_slice() {
            table += &format!(".TP\n{}\n{}\n", prose(tag), prose(first));
            for (cell, name) in rest.iter().zip(names.iter().skip(2)) {
                table += &format!(".br\n{}: {}\n", prose(name), prose(cell));
            }
        }
    }
    table
}
