//! A plugin whose KEKs are versions of a key in a real OpenBao: what the rooms beside this one share.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::thread;

use tempfile::TempDir;

use crate::bao::Bao;
use crate::caller::{Load, Request};
use crate::family::Family;
use crate::plugin::{Host, Plugin};
use crate::token::Token;

/// The key, and the policy that lets the plugin use it.
pub const KEY: &str = "kek";

/// An OpenBao, and a host whose plugin has its key.
pub struct Site {
    pub bao: Bao,
    pub host: Host,
    /// Whether the host has a token as well, whose provider comes first.
    beside_token: bool,
    /// The lines of the `[[provider]]`, each value in TOML.
    lines: BTreeMap<&'static str, String>,
}

impl Site {
    /// `None`: there is no OpenBao here, which was said.
    pub fn new() -> Option<Self> {
        Some(Self::on(Bao::start()?))
    }

    /// With a token in a file, which is the plainest way to log in.
    pub fn on(bao: Bao) -> Self {
        let mut site = Self::without_key(bao);
        site.bao.create_key(KEY);
        site.bao.key_policy(KEY);
        site.log_in_by_token(KEY);
        site
    }

    /// The host has a token as well, with a KEK. `None`: there is no OpenBao, or an envelope has no room for both; this
    /// says so.
    pub fn beside_token() -> Option<Self> {
        if Family::chosen().lacks_aes() {
            return None;
        }
        let mut site = Self::new()?;
        site.host = Host::new();
        site.host.generate("0s");
        site.beside_token = true;
        site.log_in_by_token(KEY);
        Some(site)
    }

    /// The plugin cannot log in yet.
    pub fn without_key(bao: Bao) -> Self {
        let mut site = Self { bao, host: host_without_token(), beside_token: false, lines: BTreeMap::new() };
        let lines = [
            ("name", quoted("vault")),
            ("type", quoted("transit")),
            ("address", quoted(&site.bao.root.address)),
            ("key", quoted(KEY)),
            ("ca-file", quoted(&site.bao.authority.file().display().to_string())),
            ("activation-delay", quoted("0s")),
        ];
        lines.into_iter().for_each(|(name, value)| site.set(name, value));
        site
    }

    /// By a token of this policy, in the file `vault-token`.
    pub fn log_in_by_token(&mut self, policy: &str) {
        self.host.write_secret("vault-token", &self.bao.token(policy, "10m"));
        let auth = self.with_files(r#"{ method = "token", token-file = "%/vault-token" }"#);
        self.set("auth", auth);
    }

    /// Sets a line of the `[[provider]]`.
    pub fn set(&mut self, name: &'static str, value: String) {
        self.lines.insert(name, value);
        match self.beside_token {
            true => self.host.extra = self.provider(),
            false => self.host.provider = Some(self.provider()),
        }
    }

    /// The `[[provider]]`.
    pub fn provider(&self) -> String {
        let lines = self.lines.iter().map(|(name, value)| format!("{name} = {value}"));
        format!("[[provider]]\n{}\n", lines.collect::<Vec<_>>().join("\n"))
    }

    /// Another host, which remembers nothing, with the same configuration.
    pub fn another_host(&self) -> Host {
        let mut host = host_without_token();
        host.provider.clone_from(&self.host.provider);
        host
    }

    /// From now on the plugin is there.
    pub fn on_another_host(&mut self) {
        self.host = self.another_host();
    }

    /// `%` is the host's directory.
    pub fn with_files(&self, text: &str) -> String {
        text.replace('%', &self.host.directory.path().display().to_string())
    }
}

pub fn host_without_token() -> Host {
    let directory = TempDir::new().unwrap();
    let token = Token::place(directory.path());
    Host::with(directory, token)
}

/// The `[[provider]]` of a Vault that nobody reaches, with `more` at its end.
pub fn out_of_reach(more: &str) -> String {
    let auth = r#"{ method = "token", token-file = "/token" }"#;
    let address = quoted("https://127.0.0.1:1");
    format!(
        "[[provider]]\nname = \"vault\"\ntype = \"transit\"\naddress = {address}\nkey = \"{KEY}\"\nauth = {auth}\n{more}\n"
    )
}

/// As TOML has text.
pub fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

/// What is asked of the plugin, again and again, while this goes on.
pub fn under_load<T>(plugin: &Plugin, meanwhile: impl FnOnce(&Load<'_>) -> T) -> (Vec<Request>, T) {
    let shared = (Mutex::default(), AtomicBool::new(false));
    thread::scope(|scope| {
        let load = Load::begin(scope, &shared, &plugin.socket, 3);
        load.goes_on(10);
        let done = meanwhile(&load);
        load.goes_on(10);
        (load.end(), done)
    })
}

/// None of them failed.
pub fn assert_all_succeeded(requests: &[Request], while_what: &str) {
    let failed: Vec<_> = requests.iter().filter(|request| request.outcome.is_err()).collect();
    assert!(failed.is_empty(), "{while_what}: {} of {} failed: {failed:#?}", failed.len(), requests.len());
}
