//! What the pages are written in.

/// A page's head.
pub fn head(name: &str, section: u8, date: &str, about: &str) -> String {
    let title = name.to_uppercase();
    let source = concat!("Trousseau ", env!("CARGO_PKG_VERSION"));
    format!(
        ".TH {} {section} {date} \"{source}\" Trousseau\n.SH NAME\n{} \\- {}\n",
        escape(&title),
        escape(name),
        escape(about)
    )
}

/// Text that means itself.
pub fn escape(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq").replace('`', "\\(ga").replace('^', "\\(ha")
}

/// Lines that begin with a request would be taken for one.
fn guard(line: &str) -> String {
    if line.starts_with('.') { format!("\\&{line}") } else { line.to_owned() }
}

/// Prose in which `code` stands between backquotes, and links are Markdown's: their target is left out.
pub fn prose(text: &str) -> String {
    let mut out = String::new();
    for (i, piece) in text.split('`').enumerate() {
        if i % 2 == 1 {
            out += &format!("\\fB{}\\fR", escape(piece));
            continue;
        }
        let mut rest = piece;
        while let Some((before, name, after)) = link(rest) {
            out += &escape(before);
            out += &escape(name);
            rest = after;
        }
        out += &escape(rest);
    }
    guard(&out)
}

/// The first `[name](target)`: what stands before it, the name, and what follows.
fn link(text: &str) -> Option<(&str, &str, &str)> {
    let (head, tail) = text.split_once("](")?;
    let (before, name) = head.rsplit_once('[')?;
    let (_, after) = tail.split_once(')')?;
    Some((before, name, after))
}

/// Lines as they are.
pub fn verbatim(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(|line| guard(&escape(line))).collect();
    format!(".nf\n.RS 4\n{}\n.RE\n.fi\n", lines.join("\n"))
}

/// Pages to read on, from `name(section)`.
pub fn see_also(pages: &[&str]) -> String {
    let named = |page: &&str| {
        let (name, section) = page.split_once('(').unwrap_or((page, ""));
        format!("\\fB{}\\fR({section}", escape(name))
    };
    format!(".SH SEE ALSO\n{}\n", pages.iter().map(named).collect::<Vec<_>>().join(", "))
}

/// Without the breaks that mean nothing where they stand.
pub fn tidy(page: &str) -> String {
    let mut tidy: Vec<&str> = Vec::new();
    for line in page.lines() {
        let last = tidy.last().copied().unwrap_or_default();
        let is_idle = match line {
            ".PP" => last.starts_with(".SH") || last.starts_with(".SS"),
            ".br" => last == ".br",
            _ => line.is_empty(),
        };
        if !is_idle {
            tidy.push(line);
        }
    }
    tidy.join("\n") + "\n"
}
