//! The real binary over a throw-away token, and a client to it.

use std::env;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tonic::Code;
use trousseau::service::client::{Client, ClientError, PluginStatus};

use crate::secrets;
use crate::token::{PIN, Token};

/// No wait for a condition lasts longer.
const PATIENCE: Duration = Duration::from_secs(90);

/// What a test's own profile says for itself.
const TAKEN_OUT: [&str; 4] = ["renew-after", "reinitialize", "sees-new-keys", "one-host"];

/// A token and a configuration; every verb can be run on it.
pub struct Host {
    pub directory: TempDir,
    pub token: Token,
    /// Goes to the end of the configuration.
    pub extra: String,
    pub cluster: String,
    pub label: String,
    /// The elements of `tokens`.
    pub tokens: String,
    pub sessions: usize,
    /// Stands in the place of the token's `[[provider]]`.
    pub provider: Option<String>,
    /// `None`: the first of its token's.
    pub mode: Option<&'static str>,
    v1beta1: bool,
}

impl Host {
    /// With an empty token.
    pub fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let token = Token::make(directory.path());
        Self::with(directory, token)
    }

    pub fn with(directory: TempDir, token: Token) -> Self {
        let host = Self {
            directory,
            token,
            extra: String::new(),
            cluster: "test".into(),
            label: "trousseau-test".into(),
            tokens: r#""pkcs11:token=trousseau""#.into(),
            sessions: 2,
            provider: None,
            mode: env::var("TROUSSEAU_TEST_MODE").ok().map(|mode| &*mode.leak()),
            v1beta1: true,
        };
        host.write_secret("pin", PIN);
        if host.token.family.gcm_iv().is_some() {
            host.write_profile("");
            host.set_mode(&format!("hsm-profiles/{}.toml", host.token.family.profile()), 0o644);
        }
        host
    }

    /// KEKs that are made from now on wrap in this mode, if the token knows it.
    pub fn with_mode(self, mode: &'static str) -> Self {
        let known = self.token.family.modes().contains(&mode);
        Self { mode: known.then_some(mode), ..self }
    }

    /// Another host with the same token and configuration, and nothing else in common.
    pub fn other_host(&self) -> Self {
        let other = Self::with(TempDir::new().unwrap(), self.token.clone());
        Self { extra: self.extra.clone(), cluster: self.cluster.clone(), ..other }
    }

    pub fn without_v1beta1(self) -> Self {
        Self { v1beta1: false, ..self }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write_secret(&self, name: &str, text: &str) {
        // All but configurations and certificates, which have a name with an end, and what AppRole calls no secret.
        let file = name.rsplit('/').next().unwrap_or(name);
        if !file.contains('.') && file != "role-id" {
            secrets::used(text.trim_end().as_bytes());
        }
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(self.path(name)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    /// Gives the provider a second token, without a KEK.
    pub fn with_a_replica(mut self) -> Self {
        self.token.initialize(&["second"]);
        self.tokens = r#""pkcs11:token=trousseau", "pkcs11:token=second""#.into();
        self
    }

    pub fn configuration(&self) -> String {
        let Self { cluster, v1beta1, extra, .. } = self;
        let directory = self.directory.path().display();
        let provider = self.provider.clone().unwrap_or_else(|| self.provider_of_token());
        format!(
            r#"version = "v1"
[listen]
socket = "{directory}/kms.sock"
v1beta1 = {v1beta1}
[keyring]
cluster = "{cluster}"
state = "{directory}/state"
{provider}
{extra}
"#
        )
    }

    /// The `[[provider]]` of the token.
    pub fn provider_of_token(&self) -> String {
        let Self { token, label, tokens, sessions, .. } = self;
        let directory = self.directory.path().display();
        let (profile, module) = (token.family.profile(), token.family.module());
        format!(
            r#"[[provider]]
name = "hsm"
type = "pkcs11"
profile = "{profile}"
module = "{module}"
tokens = [{tokens}]
label = "{label}"
pin-file = "{directory}/pin"
sessions = {sessions}"#,
            module = module.display(),
        )
    }

    /// Puts the token's profile beside the configuration, with `more` at its end, and returns its text.
    pub fn write_profile(&self, more: &str) -> String {
        let name = format!("hsm-profiles/{}.toml", self.token.family.profile());
        let shipped = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&name)).unwrap();
        fs::create_dir_all(self.path("hsm-profiles")).unwrap();
        // A key or a table can be there once. Without its own attributes a token has no KEK.
        let is_there = more.contains("omit-attributes").then_some("omit-attributes");
        let kept = |line: &&str| !TAKEN_OUT.iter().chain(&is_there).any(|key| line.starts_with(key));
        let shipped = shipped.lines().take_while(|line| !line.starts_with('[')).filter(kept);
        let dress = self.token.family.gcm_iv().filter(|_| !more.contains("gcm-iv"));
        let dress = dress.map(|habit| format!("gcm-iv = \"{habit}\"\n")).unwrap_or_default();
        let text = format!("{}\n{dress}{more}\n", shipped.collect::<Vec<_>>().join("\n"));
        self.write_secret(&name, &text);
        text
    }

    /// Writes the configuration and returns its path.
    pub fn write_configuration(&self) -> PathBuf {
        self.write_secret("trousseau.toml", &self.configuration());
        self.path("trousseau.toml")
    }

    /// A command of the plugin in the token's environment.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.token.command(env!("CARGO_BIN_EXE_trousseau"));
        command.args(arguments).env_remove("STATE_DIRECTORY");
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        let configuration = self.write_configuration();
        let done = self.command(arguments).arg("--config").arg(configuration).output().unwrap();
        secrets::assert_shows_none(&String::from_utf8_lossy(&[&done.stdout[..], &done.stderr].concat()));
        done
    }

    /// `key generate`, and what it printed.
    pub fn generate(&self, activate_in: &str) -> Value {
        self.generate_on("hsm", activate_in)
    }

    pub fn generate_on(&self, provider: &str, activate_in: &str) -> Value {
        let mut arguments = vec!["key", "generate", "--output", "json", "--unsynchronized-clock-ok"];
        arguments.extend(["--provider", provider]);
        arguments.extend(["--activate-in", activate_in]);
        arguments.extend(self.mode.iter().flat_map(|mode| ["--mode", mode]));
        let done = self.run(&arguments);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice(&done.stdout).unwrap()
    }

    pub fn list(&self) -> Value {
        let done = self.run(&["key", "list", "--output", "json"]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice(&done.stdout).unwrap()
    }

    /// Starts `serve` and waits until it listens.
    pub fn serve(&self) -> Plugin {
        self.serve_with(&self.configuration())
    }

    pub fn serve_with(&self, configuration: &str) -> Plugin {
        self.write_secret("trousseau.toml", configuration);
        let mut command = self.command(&["serve", "--config"]);
        command.arg(self.path("trousseau.toml")).stdin(Stdio::null());
        self.start(command)
    }

    /// Starts `serve` with a log that says more, and waits until it is healthy.
    pub fn serve_healthy_and_talkative(&self) -> Plugin {
        let mut command = self.command(&["serve", "--config"]);
        command.arg(self.write_configuration()).env("TROUSSEAU_LOG", "trousseau=debug").stdin(Stdio::null());
        let mut plugin = self.start(command);
        plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
        plugin
    }

    /// A command of the shell's in the token's environment.
    pub fn shell(&self, script: &str) -> Command {
        let mut command = self.token.command("sh");
        command.args(["-c", script]);
        command
    }

    /// Starts a command that serves, and waits until it listens.
    pub fn start(&self, mut command: Command) -> Plugin {
        let log = self.path("log");
        let file = File::options().append(true).create(true).open(&log).unwrap();
        let child = command.stderr(file).spawn().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut plugin = Plugin { child, log, socket: self.path("kms.sock"), runtime };
        plugin.wait_until("it listens", |plugin| UnixStream::connect(&plugin.socket).is_ok());
        plugin
    }

    /// Starts `serve` and waits until it is healthy.
    pub fn serve_healthy(&self) -> Plugin {
        let mut plugin = self.serve();
        plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
        plugin
    }

    /// The program at a place from which any user may run it.
    pub fn program_for_strangers(&self) -> PathBuf {
        fs::set_permissions(self.directory.path(), Permissions::from_mode(0o755)).unwrap();
        let program = self.path("trousseau");
        // By a child: a descriptor of ours that is open for writing would be inherited by other tests' children, and
        // would keep the program from being started.
        let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_trousseau")).arg(&program).status().unwrap();
        assert!(copied.success());
        program
    }

    pub fn set_mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
    }
}

/// A serving plugin. It is ended when this is dropped, and its log is shown if the test has failed.
pub struct Plugin {
    child: Child,
    log: PathBuf,
    pub socket: PathBuf,
    runtime: tokio::runtime::Runtime,
}

/// A gRPC error.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub code: Code,
    pub message: String,
}

impl Plugin {
    pub fn status(&self) -> Result<PluginStatus, Answer> {
        self.call(async |client| client.status().await)
    }

    pub fn encrypt(&self, plaintext: &[u8]) -> Result<(Vec<u8>, String), Answer> {
        secrets::used(plaintext);
        self.call(async |client| client.encrypt(plaintext.to_vec()).await)
    }

    pub fn decrypt(&self, ciphertext: &[u8], key_id: &str) -> Result<Vec<u8>, Answer> {
        self.call(async |client| client.decrypt(ciphertext.to_vec(), key_id.to_owned()).await)
    }

    /// Sends so many Encrypts at one moment, each on a connection of its own, and waits for all answers.
    pub fn encrypt_at_once(&self, count: usize) -> Vec<Result<(), Answer>> {
        self.encrypt_at_once_timed(count).into_iter().map(|(answer, _)| answer).collect()
    }

    /// The same, with how long each answer took.
    pub fn encrypt_at_once_timed(&self, count: usize) -> Vec<(Result<(), Answer>, Duration)> {
        let (began, socket) = (Instant::now(), &self.socket);
        let encrypts = (0..count).map(|_| async move { (encrypt_once(socket).await, began.elapsed()) });
        self.runtime.block_on(futures_util::future::join_all(encrypts))
    }

    /// Sends so many Encrypts at one moment, and hangs up half a second later; none is refused in that time.
    pub fn encrypt_and_leave(&self, count: usize) {
        let encrypts = (0..count).map(|_| encrypt_once(&self.socket));
        let all = futures_util::future::join_all(encrypts);
        let answers = self.runtime.block_on(async { tokio::time::timeout(Duration::from_millis(500), all).await });
        assert!(answers.is_err(), "all were answered: {answers:?}");
    }

    /// Sends so many Encrypts, asks the plugin to end while they wait, and then does `release`.
    pub fn stop_while_encrypting(
        mut self,
        count: usize,
        release: impl FnOnce(),
    ) -> (Vec<Result<(), Answer>>, ExitStatus) {
        let encrypts: Vec<_> = {
            let _context = self.runtime.enter();
            (0..count).map(|_| tokio::spawn(encrypt_once_owned(self.socket.clone()))).collect()
        };
        let answers = self.runtime.block_on(async {
            // Nothing tells when all have arrived. They wait for three seconds at most.
            tokio::time::sleep(Duration::from_millis(1000)).await;
            self.terminate();
            tokio::time::sleep(Duration::from_millis(200)).await;
            release();
            futures_util::future::join_all(encrypts).await
        });
        let status = self.child.wait().unwrap();
        (answers.into_iter().map(Result::unwrap).collect(), status)
    }

    /// Sends so many identical Decrypts, each on a connection of its own. Once all share one call, the first half hangs
    /// up, `release` is done, and the other half's answers are returned. The plugin must log what is shared.
    pub fn decrypt_together(
        &self,
        count: usize,
        ciphertext: &[u8],
        key_id: &str,
        release: impl FnOnce(),
    ) -> Vec<Result<Vec<u8>, Answer>> {
        self.runtime.block_on(async {
            let decrypt = || {
                let (socket, ciphertext, key_id) = (self.socket.clone(), ciphertext.to_vec(), key_id.to_owned());
                tokio::spawn(async move {
                    let mut client = Client::connect(&socket, Duration::from_secs(10)).await.map_err(answer)?;
                    client.decrypt(ciphertext, key_id).await.map_err(answer)
                })
            };
            let mut decrypts: Vec<_> = (0..count).map(|_| decrypt()).collect();
            let began = Instant::now();
            while self.log().matches("its answer is shared").count() < count - 1 {
                assert!(began.elapsed() < PATIENCE, "waited in vain until all share one call");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            decrypts.drain(..count / 2).for_each(|decrypt| decrypt.abort());
            release();
            futures_util::future::join_all(decrypts).await.into_iter().map(Result::unwrap).collect()
        })
    }

    fn call<T>(&self, call: impl AsyncFnOnce(&mut Client) -> Result<T, ClientError>) -> Result<T, Answer> {
        self.runtime.block_on(async {
            let mut client = Client::connect(&self.socket, Duration::from_secs(5)).await.map_err(answer)?;
            call(&mut client).await.map_err(answer)
        })
    }

    /// A value goes out and comes back, so the plugin serves.
    pub fn round_trip(&self) -> (Vec<u8>, String) {
        let (ciphertext, key_id) = self.encrypt(b"thirty-two bytes of a fresh seed").unwrap();
        assert_eq!(self.decrypt(&ciphertext, &key_id).unwrap(), b"thirty-two bytes of a fresh seed");
        (ciphertext, key_id)
    }

    pub fn wait_until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let began = Instant::now();
        while !condition(self) {
            assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the plugin ended ({status}) before {what}");
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Asks it to end and waits for that.
    pub fn stop(mut self) -> ExitStatus {
        self.terminate();
        self.child.wait().unwrap()
    }

    /// Sends this Decrypt until the process has ended by itself, and returns its log as well.
    pub fn ends_by(mut self, ciphertext: &[u8], key_id: &str) -> (ExitStatus, String) {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status, self.log());
            }
            assert!(began.elapsed() < PATIENCE, "waited in vain until it ends");
            self.runtime.block_on(async {
                if let Ok(mut client) = Client::connect(&self.socket, Duration::from_secs(5)).await {
                    drop(client.decrypt(ciphertext.to_vec(), key_id.to_owned()).await);
                }
            });
        }
    }

    /// Has it read its configuration again.
    pub fn reload(&self) {
        self.signal(Signal::HUP);
    }

    fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends it as a power loss would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.terminate();
            self.child.wait().unwrap();
        }
        match thread::panicking() {
            true => eprintln!("the plugin's log:\n{}", self.log()),
            false => secrets::assert_shows_none(&self.log()),
        }
    }
}

async fn encrypt_once(socket: &Path) -> Result<(), Answer> {
    let mut client = Client::connect(socket, Duration::from_secs(10)).await.map_err(answer)?;
    client.encrypt(b"seed".to_vec()).await.map(drop).map_err(answer)
}

async fn encrypt_once_owned(socket: PathBuf) -> Result<(), Answer> {
    encrypt_once(&socket).await
}

/// Whether this process cannot take another user's place. It says so.
pub fn lacks_root() -> bool {
    let lacks = !rustix::process::geteuid().is_root();
    if lacks {
        eprintln!("skipped: only root can start a process of another user");
    }
    lacks
}

/// The part of a configuration that admits a key made elsewhere, whatever the token says of its history.
pub fn admit(id: &[u8]) -> String {
    admit_by_id(id) + "exception = \"restored from a backup\"\n"
}

/// The same, for a key whose history the token vouches for.
pub fn admit_by_id(id: &[u8]) -> String {
    let id = base16ct::lower::encode_string(id);
    format!("[[provider.kek]]\nid = \"{id}\"\nnot-before = 2026-01-01T00:00:00Z\n")
}

/// What the API server would be told. It may show it to anybody.
pub fn answer_of(status: &tonic::Status) -> Answer {
    secrets::assert_shows_none(status.message());
    Answer { code: status.code(), message: status.message().to_owned() }
}

fn answer(error: ClientError) -> Answer {
    match error {
        ClientError::Answer { status, .. } => answer_of(&status),
        late @ ClientError::Late { .. } => Answer { code: Code::Cancelled, message: late.to_string() },
        other => panic!("{other}"),
    }
}
