//! A throw-away token, and keys in it that no command of ours would make.
//!
//! A module reads its configuration from the environment of its process. So a child of this very test binary, with
//! that environment, does what is to be done inside the token.

use std::ffi::{OsStr, OsString, c_ulong};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass};
use cryptoki::session::UserType;
use cryptoki::slot::Slot;
use rustix::process::{Pid, Signal, kill_process};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use trousseau::envelope::WrapAlgorithm;

use crate::family::Family;

/// Eight characters: kryoptic wants as many at least, openCryptoki at most.
pub const PIN: &str = "horse739";
/// With which openCryptoki's tokens come.
const SO_PIN: &str = "87654321";

/// A token's service takes no longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A token's files, and the environment by which a module finds them.
#[derive(Clone)]
pub struct Token {
    pub family: Family,
    pub directory: PathBuf,
    variables: Vec<(&'static str, OsString)>,
    /// What must run for it.
    service: Option<Arc<Service>>,
}

/// A script of `tests/tokens`, which runs until this is dropped.
struct Service(Child);

impl Service {
    /// Starts it, and waits until `ready` is there.
    fn start(mut command: Command, directory: &Path, ready: &str) -> Arc<Self> {
        fs::create_dir(directory).unwrap();
        let log = File::create(directory.join("service.log")).unwrap();
        let script = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut service = Self(script.spawn().unwrap());
        let began = Instant::now();
        while !directory.join(ready).exists() {
            let log = || fs::read_to_string(directory.join("service.log")).unwrap();
            assert!(service.0.try_wait().unwrap().is_none(), "{command:?} ended:\n{}", log());
            assert!(began.elapsed() < PATIENCE, "{command:?} is not ready:\n{}", log());
            thread::sleep(Duration::from_millis(20));
        }
        Arc::new(service)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        self.0.wait().unwrap();
    }
}

/// A key to be made inside the token.
#[derive(Clone, Serialize, Deserialize)]
pub struct Key {
    pub id: Vec<u8>,
    pub label: String,
    /// Its value, if it is imported and not generated.
    pub value: Option<Vec<u8>>,
    pub generic: bool,
    pub extractable: bool,
    /// C_WrapKey and C_UnwrapKey; otherwise C_Encrypt and C_Decrypt.
    pub wraps: bool,
    /// The mechanism that CKA_ALLOWED_MECHANISMS pins, if it pins one.
    pub allowed: Option<c_ulong>,
}

impl Key {
    pub fn generated(id: &[u8], label: &str) -> Self {
        let (id, label) = (id.to_vec(), label.to_owned());
        Self { id, label, value: None, generic: false, extractable: false, wraps: true, allowed: None }
    }
}

/// What the child does.
#[derive(Serialize, Deserialize)]
struct Errand {
    module: PathBuf,
    /// Labels of tokens to be initialized.
    tokens: Vec<String>,
    /// Keys to be made in the token that is named so.
    keys: Vec<(String, Key)>,
    /// Ids of keys to be removed from the first token.
    remove: Vec<Vec<u8>>,
    /// Wrong PINs to be tried on the first token, until it is locked.
    wrong_pins: usize,
}

const ERRAND: &str = "TROUSSEAU_TEST_ERRAND";
/// What the child prints before their number.
const WRONG_PINS_TRIED: &str = "wrong PINs tried: ";

impl Token {
    /// An initialized token labelled `trousseau`, in `directory`.
    pub fn make(directory: &Path) -> Self {
        let token = Self::place(directory);
        token.initialize(&["trousseau"]);
        token
    }

    /// The place of a token that is not there yet.
    pub fn place(directory: &Path) -> Self {
        let family = Family::chosen();
        let configured = |variable, text: String| {
            let configuration = directory.join("token.conf");
            fs::write(&configuration, text).unwrap();
            vec![(variable, configuration.into_os_string())]
        };
        let service = directory.join("service");
        let script = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokens").join(name);
        let (variables, service) = match family {
            Family::SoftHsm => {
                let tokens = directory.join("tokens");
                fs::create_dir(&tokens).unwrap();
                let text = format!("directories.tokendir = {}\nobjectstore.backend = file\n", tokens.display());
                (configured("SOFTHSM2_CONF", text), None)
            }
            Family::Kryoptic => {
                let slot = |n: u8| {
                    let file = directory.join(format!("token-{n}.sql"));
                    format!("[[slots]]\nslot = {n}\ndbtype = \"sqlite\"\ndbargs = \"{}\"\n", file.display())
                };
                (configured("KRYOPTIC_CONF", [slot(1), slot(2)].concat()), None)
            }
            Family::OpenCryptoki => {
                let mut command = Command::new("unshare");
                command.args(["--mount", "--ipc", "--propagation", "private"]);
                command.arg(script("opencryptoki.sh")).arg(&service);
                (vec![], Some(Service::start(command, &service, "run/pkcsslotd.socket")))
            }
            Family::Tpm2 => {
                let mut command = Command::new(script("tpm2.sh"));
                command.arg(&service);
                let bus = format!("unix:path={}", service.join("bus").display());
                let variables = vec![
                    ("TPM2_PKCS11_TCTI", "tabrmd:bus_type=session".into()),
                    ("DBUS_SESSION_BUS_ADDRESS", bus.into()),
                    ("TPM2_PKCS11_STORE", service.join("store").into_os_string()),
                ];
                (variables, Some(Service::start(command, &service, "ready")))
            }
        };
        let mut variables = variables;
        if let Some(habit) = family.gcm_iv() {
            variables.push(("TROUSSEAU_FAULT_MODULE", family.own_module().into()));
            variables.push(("TROUSSEAU_FAULT_DRESS", format!("C_EncryptInit gcm {habit}").into()));
        }
        Self { family, directory: directory.to_owned(), variables, service }
    }

    /// A command in the token's environment.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = match &self.service {
            Some(service) if self.family == Family::OpenCryptoki => {
                let mut enter = Command::new("/usr/bin/nsenter");
                enter.args(["--target", &service.0.id().to_string(), "--mount", "--ipc", "--"]).arg(program);
                enter
            }
            _ => Command::new(program),
        };
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    pub fn initialize(&self, labels: &[&str]) {
        self.run(&Errand { tokens: labels.iter().map(ToString::to_string).collect(), ..self.errand() });
    }

    pub fn make_keys(&self, keys: &[Key]) {
        self.make_keys_in("trousseau", keys);
    }

    pub fn make_keys_in(&self, token: &str, keys: &[Key]) {
        let keys = keys.iter().map(|key| (token.to_owned(), key.clone())).collect();
        self.run(&Errand { keys, ..self.errand() });
    }

    pub fn remove_key(&self, id: &[u8]) {
        self.run(&Errand { remove: vec![id.to_vec()], ..self.errand() });
    }

    /// Tries so many wrong PINs, and returns how many it were when the token said that it is locked: all, if it never
    /// did.
    pub fn try_wrong_pins(&self, count: usize) -> usize {
        let said = self.run(&Errand { wrong_pins: count, ..self.errand() });
        let tried =
            said.lines().find_map(|line| line.strip_prefix(WRONG_PINS_TRIED)).unwrap_or_else(|| panic!("{said}"));
        tried.parse().unwrap()
    }

    /// Whether the profile's first mode that makes AES-KW or AES-KWP is C_WrapKey.
    pub fn kw_wraps_objects(&self) -> bool {
        self.family == Family::SoftHsm
    }

    /// The code by which it knows what makes a wrap algorithm of the envelope.
    pub fn mechanism(&self, algorithm: WrapAlgorithm) -> c_ulong {
        match algorithm {
            WrapAlgorithm::AesKw => 0x2109,
            WrapAlgorithm::AesKwp if self.family == Family::SoftHsm => 0x210a,
            WrapAlgorithm::AesKwp => 0x210b,
            WrapAlgorithm::AesGcm => 0x1087,
            WrapAlgorithm::RsaOaep2048 | WrapAlgorithm::RsaOaep3072 => panic!("such a KEK is two keys"),
            WrapAlgorithm::Transit => panic!("such a KEK is in no token"),
        }
    }

    /// Where the module looks for the token's data.
    pub fn data(&self) -> PathBuf {
        match self.family {
            Family::SoftHsm => self.directory.join("tokens"),
            Family::Kryoptic => self.directory.join("token-1.sql"),
            Family::OpenCryptoki => self.directory.join("service/lib/first"),
            Family::Tpm2 => self.directory.join("service/store"),
        }
    }

    fn errand(&self) -> Errand {
        Errand { module: self.family.own_module(), tokens: vec![], keys: vec![], remove: vec![], wrong_pins: 0 }
    }

    /// Has the child do it; returns what it printed.
    fn run(&self, errand: &Errand) -> String {
        let done = self
            .command(env::current_exe().unwrap())
            .args(["--exact", "token::child", "--ignored", "--nocapture"])
            .env(ERRAND, serde_json::to_string(errand).unwrap())
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&[&done.stdout[..], &done.stderr].concat()).into_owned();
        // Not at the beginning of a line, where it would look like a test's.
        let told = || (log.clone() + &self.service_logs()).replace('\n', "\n  ");
        assert!(done.status.success(), "the token's child failed:\n  {}", told());
        log
    }

    /// What the token's service has said.
    fn service_logs(&self) -> String {
        let read = |name| fs::read_to_string(self.directory.join("service").join(name)).unwrap_or_default();
        ["service.log", "abrmd.log"].map(read).concat()
    }
}

#[test]
#[ignore = "not a test: what Token::run starts"]
fn child() {
    let Ok(errand) = env::var(ERRAND) else { return };
    let errand: Errand = serde_json::from_str(&errand).unwrap();
    let library = Pkcs11::new(&errand.module).unwrap();
    initialize(&library);
    for label in &errand.tokens {
        let slots = library.get_slots_with_token().unwrap();
        let free = |slot: &Slot| match library.get_token_info(*slot) {
            Ok(info) => !info.token_initialized(),
            Err(_) => *slot == by_place(&slots, label),
        };
        let slot = *slots.iter().find(|slot| free(slot)).unwrap();
        library.init_token(slot, &SecretString::from(SO_PIN), label).unwrap();
        let session = library.open_rw_session(slot).unwrap();
        session.login(UserType::So, Some(&SecretString::from(SO_PIN))).unwrap();
        session.init_pin(&SecretString::from(PIN)).unwrap();
    }
    for (token, key) in &errand.keys {
        make_key(&session(&library, token), key);
    }
    for id in &errand.remove {
        let session = session(&library, "trousseau");
        for key in session.find_objects(&[Attribute::Id(id.clone())]).unwrap() {
            session.destroy_object(key).unwrap();
        }
    }
    if errand.wrong_pins > 0 {
        eprintln!("\n{WRONG_PINS_TRIED}{}", try_wrong_pins(&library, errand.wrong_pins));
    }
    library.finalize().unwrap();
}

/// openCryptoki's daemon has its socket before it answers there; a TPM's is slow on a busy machine.
fn initialize(library: &Pkcs11) {
    let began = Instant::now();
    while let Err(error) = library.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
        assert!(began.elapsed() < PATIENCE, "{error}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn try_wrong_pins(library: &Pkcs11, count: usize) -> usize {
    let session = library.open_rw_session(slot(library, "trousseau")).unwrap();
    let is_locked = |_: &usize| match session.login(UserType::User, Some(&SecretString::from("no-such1"))) {
        Err(Error::Pkcs11(RvError::PinIncorrect, _)) => false,
        Err(Error::Pkcs11(RvError::PinLocked, _)) => true,
        other => panic!("{other:?}"),
    };
    (1..=count).find(is_locked).unwrap_or(count)
}

fn session(library: &Pkcs11, token: &str) -> cryptoki::session::Session {
    let session = library.open_rw_session(slot(library, token)).unwrap();
    session.login(UserType::User, Some(&SecretString::from(PIN))).unwrap();
    session
}

fn slot(library: &Pkcs11, token: &str) -> Slot {
    let slots = library.get_slots_with_token().unwrap();
    let named = |slot: &Slot| match library.get_token_info(*slot) {
        Ok(info) => info.label() == token,
        Err(_) => *slot == by_place(&slots, token),
    };
    *slots.iter().find(|slot| named(slot)).unwrap()
}

/// The cryptoki crate cannot read openCryptoki's CK_TOKEN_INFO. So its first token is the one that every test makes.
fn by_place(slots: &[Slot], token: &str) -> Slot {
    slots[usize::from(token != "trousseau")]
}

fn make_key(session: &cryptoki::session::Session, key: &Key) {
    let mut template = vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(if key.generic { KeyType::GENERIC_SECRET } else { KeyType::AES }),
        Attribute::Label(key.label.clone().into_bytes()),
        Attribute::Id(key.id.clone()),
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(key.extractable),
    ];
    if !key.generic {
        template.extend([
            Attribute::Wrap(key.wraps),
            Attribute::Unwrap(key.wraps),
            Attribute::Encrypt(!key.wraps),
            Attribute::Decrypt(!key.wraps),
        ]);
    }
    if let Some(code) = key.allowed {
        // CKA_ALLOWED_MECHANISMS: cryptoki has no name for CKM_AES_KEY_WRAP_KWP.
        let attribute = AttributeType::VendorDefined(0x4000_0600);
        template.push(Attribute::VendorDefined((attribute, code.to_ne_bytes().to_vec())));
    }
    match &key.value {
        Some(value) => {
            template.push(Attribute::Value(value.clone()));
            session.create_object(&template).unwrap();
        }
        None => {
            template.push(Attribute::ValueLen(32.into()));
            let mechanism = if key.generic { Mechanism::GenericSecretKeyGen } else { Mechanism::AesKeyGen };
            session.generate_key(&mechanism, &template).unwrap();
        }
    }
}
