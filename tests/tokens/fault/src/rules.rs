//! The rules: their text, and whether one applies to a call.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use cryptoki_sys::{CK_ATTRIBUTE_TYPE, CK_FLAGS, CK_MECHANISM_TYPE, CK_RV, CKM_AES_GCM};

use crate::{codes, table};

/// What a rule does to a call.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Answer this, and do not forward.
    Return(CK_RV),
    /// Make the call, and answer this all the same.
    HalfWay(CK_RV),
    /// Wait at least so long, and less than so long.
    Delay(Duration, Duration),
    /// Wait until the rule is gone.
    Hang,
    /// abort(3).
    Crash,
    /// Close the sessions inside the real module.
    LoseSessions,
    /// Flip a bit of the output.
    Flip,
    /// Show no slot.
    Empty,
    /// Refuse more open sessions than so many.
    Limit(usize),
    /// Count wrong PINs, and lock after so many.
    LockAfter(u64),
    /// Put so many zeros after the output.
    Pad(usize),
    /// Cut so many bytes from the output's end.
    Truncate(usize),
    /// AES-GCM, by this mechanism, has another habit.
    Gcm(Habit, CK_MECHANISM_TYPE),
    /// Make no key by a template that has this attribute.
    Forbid(CK_ATTRIBUTE_TYPE),
    /// Make the key as if the template did not have this attribute.
    Drop(CK_ATTRIBUTE_TYPE),
    /// Know no such attribute.
    Hide(CK_ATTRIBUTE_TYPE),
    /// Say this of a key, whatever was asked for, or is so.
    Say(CK_ATTRIBUTE_TYPE, bool),
    /// Say that a token has this flag, or has it not.
    Flag(CK_FLAGS, bool),
}

/// Who makes the IV of AES-GCM, if it is not the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    /// The token: it writes it over the caller's zeros.
    Written,
    /// The token: it puts it before the ciphertext.
    Prepended,
    /// The token: it puts it after the tag.
    Appended,
    /// As prepended, but it is always one and the same.
    Constant,
    /// As prepended, but each session counts from 1.
    Counted,
}

impl Action {
    /// Whether it is done before the call is forwarded, or in its place.
    pub fn comes_before(&self) -> bool {
        use Action::{Crash, Delay, Hang, LoseSessions, Return};
        matches!(self, Return(_) | Delay(..) | Hang | Crash | LoseSessions)
    }

    /// Whether it applies to all calls, and not to some that are counted.
    fn always_applies(&self) -> bool {
        use Action::{Drop, Forbid, Gcm, Hide, Limit, LockAfter};
        matches!(self, Limit(_) | LockAfter(_) | Gcm(..) | Forbid(_) | Drop(_) | Hide(_))
    }
}

/// One line of the file.
#[derive(Debug)]
pub struct Rule {
    text: String,
    /// `None`: every function.
    function: Option<&'static str>,
    pub action: Action,
    after: u64,
    times: Option<u64>,
    probability: f64,
    /// Not about calls that only ask how long their bytes would be.
    pub is_of_results: bool,
    pub token: Option<String>,
    seed: u64,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    matched: AtomicU64,
    fired: AtomicU64,
}

/// The file's rules, in its order.
#[derive(Debug, Default)]
pub struct Rules(pub Vec<Rule>);

impl Rules {
    /// Reads `text`. Lines that stood in `previous` too keep their counters.
    ///
    /// # Errors
    /// The number of the line that is not a rule, and why.
    pub fn parse(text: &str, previous: &Self) -> Result<Self, (usize, String)> {
        let mut rules: Vec<Rule> = Vec::new();
        let mut seed = 0;
        for (n, line) in text.lines().enumerate() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                [] => (),
                [first, ..] if first.starts_with('#') => (),
                ["seed", number] => seed = parse(number).map_err(|error| (n + 1, error))?,
                [function, action @ ..] => {
                    let mut rule = parse_rule(words.join(" "), function, action).map_err(|error| (n + 1, error))?;
                    rule.seed = seed;
                    // Of lines that are alike, the second follows the second.
                    let earlier = rules.iter().filter(|other| other.text == rule.text).count();
                    if let Some(same) = previous.0.iter().filter(|other| other.text == rule.text).nth(earlier) {
                        rule.counters = Arc::clone(&same.counters);
                    }
                    rules.push(rule);
                }
            }
        }
        Ok(Self(rules))
    }

    /// Whether this rule, or the same line of an earlier file, is still there.
    pub fn contains(&self, rule: &Rule) -> bool {
        self.0.iter().any(|other| Arc::ptr_eq(&other.counters, &rule.counters))
    }
}

impl Rule {
    /// Whether the rule is about such a call.
    pub fn is_about(&self, function: &str, token: Option<&str>) -> bool {
        self.function.is_none_or(|wanted| wanted == function)
            && self.token.as_deref().is_none_or(|wanted| token == Some(wanted))
    }

    /// Counts a call that the rule is about. Returns, if the rule applies to it, a number that looks random.
    pub fn fires(&self) -> Option<u64> {
        let n = self.counters.matched.fetch_add(1, Relaxed);
        // By the count and not by a generator's state: threads cannot change what falls to which call.
        let text = self.text.bytes().fold(self.seed, |hash, byte| scramble(hash ^ u64::from(byte)));
        let drawn = scramble(text.wrapping_add(n));
        let applies = n >= self.after && (drawn >> 11) as f64 / ((1_u64 << 53) as f64) < self.probability;
        let times = self.times.unwrap_or(u64::MAX);
        let count = |fired| (fired < times).then_some(fired + 1);
        (applies && self.counters.fired.fetch_update(Relaxed, Relaxed, count).is_ok()).then(|| scramble(drawn))
    }
}

/// A step of SplitMix64.
fn scramble(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn parse_rule(text: String, function: &str, words: &[&str]) -> Result<Rule, String> {
    let function = match function {
        "*" => None,
        name => {
            Some(*table::NAMES.iter().find(|known| **known == name).ok_or(format!("no function is called {name}"))?)
        }
    };
    let (action, qualifiers) = parse_action(function, words)?;
    let counters = Arc::default();
    let (after, times, probability, is_of_results, token, seed) = (0, None, 1.0, false, None, 0);
    let mut rule = Rule { text, function, action, after, times, probability, is_of_results, token, seed, counters };
    let counts = !rule.action.always_applies();
    let mut pairs = qualifiers.chunks_exact(2);
    for pair in &mut pairs {
        match *pair {
            ["token", label] => rule.token = Some(label.to_owned()),
            ["of", "results"] if rule.action.comes_before() => {
                gives_bytes(rule.function)?;
                rule.is_of_results = true;
            }
            ["after", number] if counts => rule.after = parse(number)?,
            ["times", number] if counts => rule.times = Some(parse(number)?),
            ["probability", number] if counts => {
                rule.probability = parse(number)?;
                if !(0.0..=1.0).contains(&rule.probability) {
                    return Err(format!("{number} is not a probability: 0 to 1"));
                }
            }
            [word, ..] => return Err(format!("{word} is no qualifier here")),
            [] => (),
        }
    }
    match pairs.remainder() {
        [] => Ok(rule),
        [word, ..] => Err(format!("{word} is not followed by what it needs, or does not belong here")),
    }
}

fn parse_action<'a, 'b>(function: Option<&str>, words: &'a [&'b str]) -> Result<(Action, &'a [&'b str]), String> {
    let only = |wanted: &str, action| match function == Some(wanted) {
        true => Ok(action),
        false => Err(format!("this is for {wanted} only")),
    };
    let with_output = |action| gives_bytes(function).map(|()| action);
    match words {
        ["return", code, rest @ ..] => Ok((Action::Return(parse_code(code)?), rest)),
        ["half-way", code, rest @ ..] => Ok((Action::HalfWay(parse_code(code)?), rest)),
        ["delay", time, rest @ ..] => {
            let (from, to) = time.split_once("..").unwrap_or((time, time));
            let (from, to) = (parse_time(from)?, parse_time(to)?);
            if from > to { Err(format!("{time} ends before it begins")) } else { Ok((Action::Delay(from, to), rest)) }
        }
        ["hang", rest @ ..] => Ok((Action::Hang, rest)),
        ["crash", rest @ ..] => Ok((Action::Crash, rest)),
        ["lose-sessions", rest @ ..] => Ok((Action::LoseSessions, rest)),
        ["flip", rest @ ..] => Ok((with_output(Action::Flip)?, rest)),
        ["pad", number, rest @ ..] => Ok((with_output(Action::Pad(parse(number)?))?, rest)),
        ["truncate", number, rest @ ..] => Ok((with_output(Action::Truncate(parse(number)?))?, rest)),
        ["gcm", habit, rest @ ..] => {
            let habit = match *habit {
                "written" => Habit::Written,
                "prepended" => Habit::Prepended,
                "appended" => Habit::Appended,
                "constant" => Habit::Constant,
                "counted" => Habit::Counted,
                _ => return Err(format!("{habit} is no habit")),
            };
            let (code, rest) = match rest {
                ["by", code, rest @ ..] => (parse_hex(code)?, rest),
                _ => (CKM_AES_GCM, rest),
            };
            Ok((only("C_EncryptInit", Action::Gcm(habit, code))?, rest))
        }
        ["forbid", attribute, rest @ ..] => Ok((only("C_GenerateKey", Action::Forbid(parse_hex(attribute)?))?, rest)),
        ["drop", attribute, rest @ ..] => Ok((only("C_GenerateKey", Action::Drop(parse_hex(attribute)?))?, rest)),
        ["hide", attribute, rest @ ..] => Ok((only("C_GetAttributeValue", Action::Hide(parse_hex(attribute)?))?, rest)),
        ["empty", rest @ ..] => Ok((only("C_GetSlotList", Action::Empty)?, rest)),
        ["limit", number, rest @ ..] => Ok((only("C_OpenSession", Action::Limit(parse(number)?))?, rest)),
        ["lock-after", number, rest @ ..] => Ok((only("C_Login", Action::LockAfter(parse(number)?))?, rest)),
        ["say", text, rest @ ..] => match function {
            Some("C_GenerateKey" | "C_GenerateKeyPair" | "C_GetAttributeValue") => {
                let (name, value) = text.split_once('=').ok_or(format!("{text} is not CKA_…=true or =false"))?;
                let attribute =
                    codes::attribute(name).ok_or(format!("{name} is no attribute that is true or false"))?;
                Ok((Action::Say(attribute, parse(value)?), rest))
            }
            Some("C_GetTokenInfo") => {
                let (name, value) = text.split_once('=').ok_or(format!("{text} is not CKF_…=true or =false"))?;
                let flag = codes::flag(name).ok_or(format!("{name} is no flag of a token that can be said"))?;
                Ok((Action::Flag(flag, parse(value)?), rest))
            }
            _ => Err("say is for C_GenerateKey, C_GenerateKeyPair, C_GetAttributeValue or C_GetTokenInfo".into()),
        },
        [word, ..] => Err(format!("{word} is no action, or lacks what it needs")),
        [] => Err("there is no action".into()),
    }
}

fn gives_bytes(function: Option<&str>) -> Result<(), String> {
    match function.is_some_and(|name| table::WITH_OUTPUT.contains(&name)) {
        true => Ok(()),
        false => Err(format!("this is for one of {}", table::WITH_OUTPUT.join(", "))),
    }
}

fn parse_code(code: &str) -> Result<CK_RV, String> {
    codes::parse(code).ok_or(format!("{code} is neither a CKR_ name nor a number like 0x30"))
}

fn parse<T: std::str::FromStr>(number: &str) -> Result<T, String> {
    number.parse().map_err(|_| format!("{number} is not a number that is wanted here"))
}

/// `0x162`
fn parse_hex(text: &str) -> Result<CK_RV, String> {
    let number = text.strip_prefix("0x").and_then(|digits| CK_RV::from_str_radix(digits, 16).ok());
    number.ok_or_else(|| format!("{text} is not a number like 0x162"))
}

/// `5ms`, `300us`, `2s`.
fn parse_time(text: &str) -> Result<Duration, String> {
    let (digits, unit) = text.split_at(text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len()));
    let number = parse(digits)?;
    match unit {
        "us" => Ok(Duration::from_micros(number)),
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        _ => Err(format!("{text} is not a time: 300us, 5ms, 2s")),
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
