//! What happens to every call on its way to the real module. No lock is held while it waits or is forwarded.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use std::{env, process, thread};

use cryptoki_sys::*;

use crate::rules::{Action, Rule, Rules};
use crate::table::forward;
use crate::{codes, dress, real, sessions, watch};

/// How often a call that hangs looks whether its rule is still there.
const POLL: Duration = Duration::from_millis(10);

/// What a call is about.
pub enum Place {
    Module,
    Slot(CK_SLOT_ID),
    Session(CK_SESSION_HANDLE),
}

pub struct Call<'a> {
    pub function: &'static str,
    pub place: Place,
    pub output: Option<Output<'a>>,
}

/// Where the bytes will be that a call gives.
pub struct Output<'a> {
    pub bytes: *mut CK_BYTE,
    pub length: *mut CK_ULONG,
    /// Makes the real call with another place for them.
    pub elsewhere: &'a dyn Fn(*mut CK_BYTE, *mut CK_ULONG) -> CK_RV,
}

/// A call, and what is known when it comes.
pub struct Context<'a> {
    call: &'a Call<'a>,
    pub rules: &'a Rules,
    /// The label of the token that it is about.
    pub token: Option<Arc<str>>,
}

impl Context<'_> {
    /// The rules that are about this call.
    pub fn about(&self) -> impl Iterator<Item = &Rule> {
        self.rules.0.iter().filter(|rule| rule.is_about(self.call.function, self.token.as_deref()))
    }
}

/// Has the rules' way with a call; `forward` does it, if it comes to that.
pub fn intercept(call: &Call, forward: impl FnOnce(&Context) -> CK_RV) -> CK_RV {
    let rules = watch::current();
    let somebody_asks = LOG.is_some() || rules.as_ref().is_none_or(|rules| !rules.0.is_empty());
    let token = if somebody_asks { token_of(&call.place) } else { None };
    let Some(rules) = rules else {
        log(call.function, token.as_deref(), CKR_GENERAL_ERROR);
        return CKR_GENERAL_ERROR;
    };
    let context = Context { call, rules: &rules, token };
    let code = before(&context).unwrap_or_else(|| {
        let code = resized(&context).unwrap_or_else(|| forward(&context));
        if code != CKR_OK {
            return code;
        }
        flip(&context);
        half_way(&context).unwrap_or(CKR_OK)
    });
    log(call.function, context.token.as_deref(), code);
    code
}

fn token_of(place: &Place) -> Option<Arc<str>> {
    match *place {
        Place::Module => None,
        Place::Slot(slot) => real::label(slot).map(Arc::from),
        Place::Session(session) => sessions::token(session),
    }
}

/// Does what comes before the real call. Returns what is answered in its place.
fn before(context: &Context) -> Option<CK_RV> {
    for rule in context.about() {
        // The others are done elsewhere, each where it can be.
        if rule.action.comes_before()
            && (!rule.is_of_results || gives_bytes(context.call))
            && let Some(drawn) = rule.fires()
        {
            match rule.action {
                Action::Return(code) => {
                    end_operation(context.call, code);
                    return Some(code);
                }
                Action::Delay(from, to) => thread::sleep(from + (to - from).mul_f64(drawn as f64 / u64::MAX as f64)),
                Action::Hang => while_it_is_there(rule),
                Action::Crash => process::abort(),
                Action::LoseSessions => lose_sessions(rule.token.as_deref()),
                _ => (),
            }
        }
    }
    None
}

/// Whether it is not a query for the length.
fn gives_bytes(call: &Call) -> bool {
    call.output.as_ref().is_some_and(|output| !output.bytes.is_null())
}

/// A call that gives bytes ends the operation that an earlier one began, unless it only asks for more room (PKCS#11
/// v3.1 section 5.2): so it is made, and what it gives is thrown away.
fn end_operation(call: &Call, code: CK_RV) {
    if let Some(output) = &call.output
        && code != CKR_BUFFER_TOO_SMALL
    {
        let mut thrown_away = [0; 4096];
        let mut length = thrown_away.len() as CK_ULONG;
        let _whatever = (output.elsewhere)(thrown_away.as_mut_ptr(), &mut length);
    }
}

/// What is answered though the call was made.
fn half_way(context: &Context) -> Option<CK_RV> {
    context.about().find_map(|rule| match rule.action {
        Action::HalfWay(code) => rule.fires().map(|_| code),
        _ => None,
    })
}

fn while_it_is_there(rule: &Rule) {
    while watch::current().is_some_and(|rules| rules.contains(rule)) {
        thread::sleep(POLL);
    }
}

fn lose_sessions(token: Option<&str>) {
    for slot in real::slots() {
        if token.is_none() || real::label(slot).as_deref() == token {
            forward!(C_CloseAllSessions(slot));
            sessions::forget_all(Some(slot));
        }
    }
}

/// Makes the call and gives more or fewer bytes than it made, if a rule wants that. A length query tells the same lie.
fn resized(context: &Context) -> Option<CK_RV> {
    let Output { bytes, length, elsewhere } = context.call.output.as_ref()?;
    let change = context.about().find_map(|rule| match rule.action {
        Action::Pad(more) => rule.fires().map(|_| more as isize),
        Action::Truncate(fewer) => rule.fires().map(|_| -(fewer as isize)),
        _ => None,
    })?;
    let mut made = vec![0; 4096];
    let mut made_len = made.len() as CK_ULONG;
    let place = if bytes.is_null() { std::ptr::null_mut() } else { made.as_mut_ptr() };
    let code = elsewhere(place, &mut made_len);
    if code != CKR_OK {
        return Some(code);
    }
    made[made_len as usize..].fill(0);
    made.truncate((made_len as usize).saturating_add_signed(change));
    if bytes.is_null() {
        // SAFETY: the caller's promise.
        unsafe { **length = made.len() as CK_ULONG };
        return Some(CKR_OK);
    }
    Some(dress::give(&made, (*bytes, *length)))
}

/// A length query has no output, and is no call to this rule.
fn flip(context: &Context) {
    let Some(Output { bytes, length, .. }) = context.call.output else { return };
    if bytes.is_null() || length.is_null() {
        return;
    }
    // SAFETY: the real module has just written so many bytes there.
    let output = unsafe { std::slice::from_raw_parts_mut(bytes, *length as usize) };
    for rule in context.about().filter(|rule| rule.action == Action::Flip) {
        if !output.is_empty()
            && let Some(drawn) = rule.fires()
        {
            let bit = drawn as usize % (output.len() * 8);
            output[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

static LOG: LazyLock<Option<File>> = LazyLock::new(|| {
    let path = env::var_os("TROUSSEAU_FAULT_LOG")?;
    let opened = File::options().append(true).create(true).open(&path);
    Some(opened.unwrap_or_else(|error| panic!("TROUSSEAU_FAULT_LOG {}: {error}", path.display())))
});

/// One write a line, so that processes can share the file. Never an argument: one of them is a PIN.
fn log(function: &str, token: Option<&str>, code: CK_RV) {
    if let Some(mut file) = LOG.as_ref() {
        let line = format!("{function} {} {}\n", token.unwrap_or("-"), codes::name(code));
        file.write_all(line.as_bytes()).expect("TROUSSEAU_FAULT_LOG takes no line");
    }
}
