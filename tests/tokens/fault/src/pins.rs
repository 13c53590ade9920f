//! Wrong PINs, counted in a file that processes share, as a real token counts them in itself: a line for each token,
//! `<count> <label>`.

use std::collections::BTreeMap;
use std::env;
use std::fs::File;
use std::io::{Read, Seek, Write};

use rustix::fs::{FlockOperation, flock};

/// How many wrong PINs the token has seen since the last right one.
pub fn count(token: &str) -> u64 {
    change(token, |count| count)
}

/// Changes the count, and returns it.
pub fn change(token: &str, change: impl FnOnce(u64) -> u64) -> u64 {
    let path = env::var_os("TROUSSEAU_FAULT_PIN_COUNT").expect("no rule needs the file without its name");
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    let mut counts: BTreeMap<&str, u64> = text
        .lines()
        .map(|line| {
            let (count, label) = line.split_once(' ').expect("a line is a count and a label");
            (label, count.parse().expect("a line is a count and a label"))
        })
        .collect();
    let before = counts.get(token).copied().unwrap_or(0);
    let after = change(before);
    if after != before {
        counts.insert(token, after);
        let text: String = counts.iter().map(|(label, count)| format!("{count} {label}\n")).collect();
        file.set_len(0).unwrap();
        file.rewind().unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }
    after
}
