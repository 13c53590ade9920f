//! YAML with the line of everything: what somebody wrote long ago is refused with its place.
//!
//! It may hold secrets: nothing here is shown but keys, and what is dropped is wiped.

use yaml_rust2::Event;
use yaml_rust2::parser::Parser;
use yaml_rust2::scanner::TScalarStyle;
use zeroize::Zeroizing;

/// No configuration of a plugin nests deeper.
const DEPTH: usize = 16;

/// A value, and the line on which it begins.
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Value,
}

pub(super) enum Value {
    Null,
    Text(Zeroizing<String>),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key, the line on which it stands, and its value.
pub(super) struct Entry {
    pub(super) line: usize,
    pub(super) key: String,
    pub(super) value: Node,
}

/// What is wrong, and the line on which it is.
pub(super) struct Wrong(pub(super) usize, pub(super) String);

/// Reads one document. Empty, it is null.
pub(super) fn read(text: &str) -> Result<Node, Wrong> {
    let mut reader = Reader::default();
    let mut parser = Parser::new_from_str(text);
    // One by one: the parser's own way to read all of them calls itself for each level, without a bound.
    loop {
        match parser.next_token() {
            Ok((Event::StreamEnd, _)) => return Ok(reader.document.unwrap_or(Node { line: 1, value: Value::Null })),
            Ok((event, mark)) => reader.take(event, mark.line())?,
            Err(error) => return Err(Wrong(error.marker().line(), format!("not YAML: {}", error.info()))),
        }
    }
}

#[derive(Default)]
struct Reader {
    /// The lists and maps that are not complete, the innermost last.
    open: Vec<Open>,
    document: Option<Node>,
}

struct Open {
    node: Node,
    /// In a map: the key whose value comes next.
    key: Option<(usize, String)>,
}

impl Reader {
    fn take(&mut self, event: Event, line: usize) -> Result<(), Wrong> {
        let done = match event {
            Event::Scalar(text, style, ..) => {
                let text = Zeroizing::new(text);
                let null = style == TScalarStyle::Plain && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL");
                self.complete(Node { line, value: if null { Value::Null } else { Value::Text(text) } })
            }
            Event::SequenceStart(..) => self.begin(Node { line, value: Value::List(Vec::new()) }),
            Event::MappingStart(..) => self.begin(Node { line, value: Value::Map(Vec::new()) }),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(open) => self.complete(open.node),
                None => Ok(()),
            },
            Event::Alias(_) => Err("an alias: write what it stands for".to_owned()),
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart | Event::DocumentEnd => {
                Ok(())
            }
        };
        done.map_err(|what| Wrong(line, what))
    }

    fn begin(&mut self, node: Node) -> Result<(), String> {
        if self.open.len() == DEPTH {
            return Err(format!("nested deeper than {DEPTH}"));
        }
        self.open.push(Open { node, key: None });
        Ok(())
    }

    /// Puts a complete value where it belongs.
    fn complete(&mut self, node: Node) -> Result<(), String> {
        let Some(Open { node: Node { value, .. }, key }) = self.open.last_mut() else {
            return match self.document.replace(node) {
                None => Ok(()),
                Some(_) => Err("a second document: keep one in the file".to_owned()),
            };
        };
        match (value, key.take()) {
            (Value::List(list), _) => list.push(node),
            (Value::Map(map), Some((line, key))) => map.push(Entry { line, key, value: node }),
            (Value::Map(map), None) => {
                let Value::Text(text) = node.value else { return Err("a key that is not text".to_owned()) };
                if map.iter().any(|entry| entry.key == *text) {
                    return Err(format!("`{}` stands twice", text.escape_debug()));
                }
                *key = Some((node.line, text.to_string()));
            }
            (Value::Null | Value::Text(_), _) => {}
        }
        Ok(())
    }
}
