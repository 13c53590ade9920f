//! From a configuration of ondat/trousseau, either generation, to one of ours. Pure: from its text to texts.
//!
//! Version 1 reads it with viper: everything is under `vault`, and case plays no part. Version 2 reads it with yaml.v2: the
//! same keys at the top, in exactly this case, and others are passed over in silence.

use std::fmt::Write;
use std::path::Path;

use zeroize::Zeroizing;

use super::yaml::{self, Entry, Node, Value, Wrong};

/// As version 2 spells them.
const KEYS: [&str; 11] = [
    "keyNames",
    "address",
    "token",
    "clientCert",
    "clientKey",
    "roleID",
    "secretID",
    "vaultCACert",
    "tlsServerName",
    "transitPath",
    "authPath",
];

/// Longer is no secret of Vault's, and is not taken for one.
const SECRET_LIMIT: usize = 1024;

/// What becomes of an old configuration.
pub(super) struct Conversion {
    /// Which version wrote it: 1 or 2.
    pub(super) generation: u8,
    /// Our configuration, without the line that says whence it comes.
    pub(super) toml: String,
    /// What is a secret in it, by the name of its credential.
    pub(super) secrets: Vec<(&'static str, Zeroizing<String>)>,
    /// Secrets that are in files of their own already, by the name of their credential.
    pub(super) secret_files: Vec<(&'static str, String)>,
    /// What has no place in ours, and why.
    pub(super) not_carried: Vec<String>,
    /// What only a person can know.
    pub(super) to_check: Vec<String>,
    /// Whether there are secrets in the old one, carried over or not.
    pub(super) had_secrets: bool,
}

/// Why there is no conversion.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) line: Option<usize>,
    pub(super) what: String,
    pub(super) remedy: &'static str,
}

impl From<Wrong> for Refused {
    fn from(Wrong(line, what): Wrong) -> Self {
        Self { line: Some(line), what, remedy: "correct a copy of it, or name the file that the old plugin reads" }
    }
}

fn refused(what: impl Into<String>, remedy: &'static str) -> Refused {
    Refused { line: None, what: what.into(), remedy }
}

pub(super) fn convert(text: &str, cluster: Option<&str>) -> Result<Conversion, Refused> {
    if let Some(at) = text.lines().position(|line| line.contains("{{")) {
        let remedy = "name what the Vault agent made of it, /opt/trousseau-kms/config.yaml for example";
        return Err(Refused { line: Some(at + 1), what: "a template, not a configuration".into(), remedy });
    }
    let old = Old::read(text)?;
    let login = AuthPath::read(old.text("authPath")?.map_or("auth", |path| path))?;
    let mut new = New::default();
    new.transit(&old, &login)?;
    new.login(&old, login)?;
    new.finish(old, cluster)
}

/// The old configuration: its known keys, and those that it should not have.
struct Old {
    generation: u8,
    entries: Vec<Entry>,
    unknown: Vec<(usize, String)>,
}

impl Old {
    fn read(text: &str) -> Result<Self, Refused> {
        let document = yaml::read(text)?;
        let Value::Map(mut top) = document.value else {
            return Err(Wrong(document.line, "not a table of keys".into()).into());
        };
        let nested = top.iter().position(|entry| entry.key.eq_ignore_ascii_case("vault"));
        let Some(at) = nested else { return Self::of_version_2(top) };
        let Entry { value, line, .. } = top.remove(at);
        let Value::Map(entries) = value.value else { return Err(Wrong(line, "`vault` is not a table".into()).into()) };
        Self::of_version_1(top, entries)
    }

    fn of_version_1(top: Vec<Entry>, entries: Vec<Entry>) -> Result<Self, Refused> {
        let mut old = Self { generation: 1, entries: Vec::new(), unknown: Vec::new() };
        for Entry { line, key, value } in top {
            match &value.value {
                Value::Text(text) if key.eq_ignore_ascii_case("provider") && text.as_str() == "vault" => {}
                _ if key.eq_ignore_ascii_case("provider") => {
                    return Err(
                        Wrong(line, "`provider` is not `vault`, the only one that can be carried over".into()).into()
                    );
                }
                _ => old.unknown.push((line, key)),
            }
        }
        for entry in entries {
            match KEYS.iter().find(|known| known.eq_ignore_ascii_case(&entry.key)) {
                Some(known) if old.entries.iter().any(|entry| entry.key == *known) => {
                    return Err(Wrong(entry.line, format!("`{known}` stands twice")).into());
                }
                Some(known) => old.entries.push(Entry { key: (*known).to_owned(), ..entry }),
                None => old.unknown.push((entry.line, entry.key)),
            }
        }
        Ok(old)
    }

    fn of_version_2(top: Vec<Entry>) -> Result<Self, Refused> {
        let mut old = Self { generation: 2, entries: Vec::new(), unknown: Vec::new() };
        for entry in top {
            if KEYS.contains(&entry.key.as_str()) {
                old.entries.push(entry);
            } else if let Some(known) = KEYS.iter().find(|known| known.eq_ignore_ascii_case(&entry.key)) {
                let what = format!("`{}` was passed over: version 2 reads `{known}` alone", entry.key);
                let remedy = "spell it so if it was meant, or remove it if the old plugin works without it";
                return Err(Refused { line: Some(entry.line), what, remedy });
            } else {
                old.unknown.push((entry.line, entry.key));
            }
        }
        Ok(old)
    }

    fn get(&self, key: &str) -> Option<&Node> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        (!matches!(entry.value.value, Value::Null)).then_some(&entry.value)
    }

    /// A text of one line that is not empty.
    fn text(&self, key: &str) -> Result<Option<&Zeroizing<String>>, Refused> {
        let Some(node) = self.get(key) else { return Ok(None) };
        match &node.value {
            Value::Text(text) if text.contains(char::is_control) => {
                Err(Wrong(node.line, format!("`{key}` is not one line of text")).into())
            }
            Value::Text(text) => Ok((!text.is_empty()).then_some(text)),
            _ => Err(Wrong(node.line, format!("`{key}` is not text")).into()),
        }
    }

    fn has(&self, key: &str) -> Result<bool, Refused> {
        Ok(self.text(key)?.is_some())
    }

    fn secret(&self, key: &str) -> Result<Option<Zeroizing<String>>, Refused> {
        match self.text(key)? {
            Some(text) if text.len() > SECRET_LIMIT => {
                Err(refused(format!("`{key}` has more than {SECRET_LIMIT} bytes"), "see what it should be"))
            }
            text => Ok(text.cloned()),
        }
    }

    /// The names of keys, of which only the first was ever used.
    fn key_names(&self) -> Result<Vec<&str>, Refused> {
        let Some(node) = self.get("keyNames") else { return Ok(Vec::new()) };
        let not_names = || Wrong(node.line, "`keyNames` is not a list of names".into()).into();
        match &node.value {
            // viper makes a list of it.
            Value::Text(text) if self.generation == 1 => Ok(text.split(',').collect()),
            Value::List(list) => {
                let name = |node: &'_ Node| matches!(&node.value, Value::Text(text) if !text.is_empty());
                if !list.iter().all(name) {
                    return Err(not_names());
                }
                Ok(list
                    .iter()
                    .filter_map(|node| if let Value::Text(text) = &node.value { Some(text.as_str()) } else { None })
                    .collect())
            }
            _ => Err(not_names()),
        }
    }
}

#[derive(Default)]
struct New {
    /// The provider's lines.
    provider: String,
    namespace: String,
    secrets: Vec<(&'static str, Zeroizing<String>)>,
    secret_files: Vec<(&'static str, String)>,
    not_carried: Vec<String>,
    to_check: Vec<String>,
}

impl New {
    fn line(&mut self, key: &str, value: &str) {
        let _infallible = writeln!(self.provider, "{key} = {}", quoted(value));
    }

    /// Where Transit is, and which key.
    fn transit(&mut self, old: &Old, login: &AuthPath) -> Result<(), Refused> {
        let address = old.text("address")?.ok_or_else(|| missing("address"))?;
        self.line("address", address);
        if !address.starts_with("https://") {
            let what = "address is not https://…: this plugin speaks to Vault over TLS alone, so give Vault a certificate first";
            self.to_check.push(what.into());
        }
        let names = old.key_names()?;
        let (key, others) = names.split_first().ok_or_else(|| missing("keyNames"))?;
        let mount = segments(old.text("transitPath")?.map_or("transit", |path| path)).join("/");
        let mount = match mount.strip_prefix(&format!("{}/", login.namespace)) {
            Some(rest) => {
                self.line("namespace", &login.namespace);
                self.namespace.clone_from(&login.namespace);
                rest
            }
            None => &mount,
        };
        self.line("mount", mount);
        if mount.contains('/') {
            self.to_check.push(format!(
                "mount = {}: if its beginning is a namespace, write that as `namespace = …`",
                quoted(mount)
            ));
        }
        self.line("key", key);
        if !others.is_empty() {
            self.not_carried.push(format!("keyNames after the first, {key}: none of them was ever used"));
        }
        match old.text("vaultCACert")? {
            Some(file) => {
                self.line("ca-file", file);
                self.file("ca-file", file);
            }
            None => self.to_check.push(
                "no vaultCACert: if VAULT_CACERT was in the old plugin's environment, write it as `ca-file = …`".into(),
            ),
        }
        if old.text("tlsServerName")?.is_some() {
            let what = "tlsServerName: the host in address must be a name in Vault's certificate";
            self.not_carried.push(what.into());
        }
        let (transit, policy) = (mount, "update on {M}/encrypt/{K} and {M}/decrypt/{K}, read on {M}/keys/{K}");
        let policy = policy.replace("{M}", transit).replace("{K}", key);
        self.to_check.push(format!("the policy of the plugin's token allows: {policy}"));
        let what = "the old plugin's environment: write VAULT_NAMESPACE as `namespace = …`; nothing here is like VAULT_SKIP_VERIFY";
        self.to_check.push(what.into());
        Ok(())
    }

    /// How to log in, in the old plugin's order: a token, a certificate, an AppRole.
    fn login(&mut self, old: &Old, path: AuthPath) -> Result<(), Refused> {
        let token = old.secret("token")?;
        let certificate = old.text("clientCert")?.zip(old.text("clientKey")?);
        let role = old.secret("roleID")?;
        let mut ways = Vec::new();
        if let Some(token) = token {
            self.secrets.push(("vault-token", token));
            ways.push(("token", r#"method = "token", token-file = "credential:vault-token""#.to_owned()));
            self.to_check.push(
                "a token in a file ends some day, and Secrets are not readable from then on: an AppRole is renewed"
                    .into(),
            );
        }
        if let Some((file, key)) = certificate {
            if ways.is_empty() {
                self.file("cert-file", file);
                self.file("the key's file", key);
                self.secret_files.push(("vault-client-key", key.to_string()));
            }
            let file = quoted(file);
            let files = format!(r#"method = "cert", cert-file = {file}, key-file = "credential:vault-client-key""#);
            ways.push(("clientCert and clientKey", files + &path.place("cert", &self.namespace)));
        }
        if let Some(role) = role {
            let secret = old.secret("secretID")?;
            if ways.is_empty() {
                let secret =
                    secret.ok_or_else(|| refused("`roleID` without `secretID`", "give the role a secret-id"))?;
                self.secrets.extend([("vault-role-id", role), ("vault-secret-id", secret)]);
            }
            let files = r#"method = "approle", role-id-file = "credential:vault-role-id", secret-id-file = "credential:vault-secret-id""#;
            ways.push(("roleID and secretID", files.to_owned() + &path.place("approle", &self.namespace)));
        }
        let none =
            || refused("no token, no clientCert with clientKey, and no roleID", "see how the old plugin logs in");
        let ((used, way), others) = ways.split_first().ok_or_else(none)?;
        for (other, _) in others {
            self.not_carried.push(format!("{other}: the old plugin used {used}, and never these"));
        }
        for (key, other) in [("clientCert", "clientKey"), ("clientKey", "clientCert"), ("secretID", "roleID")] {
            if old.has(key)? && !old.has(other)? {
                self.not_carried.push(format!("{key}: without {other} the old plugin never used it"));
            }
        }
        if *used == "token" && old.has("authPath")? {
            let what = "authPath: a token logs in nowhere; if it is of another namespace than the key, write \
                        `namespace = …` in auth";
            self.not_carried.push(what.into());
        }
        let _infallible = writeln!(self.provider, "auth = {{ {way} }}");
        Ok(())
    }

    fn finish(mut self, old: Old, cluster: Option<&str>) -> Result<Conversion, Refused> {
        let had_secrets = old.has("token")? || old.has("roleID")? || old.has("secretID")?;
        for (line, key) in old.unknown {
            self.not_carried
                .push(format!("line {line}, `{}`: the old plugin did not know it either", key.escape_debug()));
        }
        let formats = match old.generation {
            1 => r#"["trousseau-v1"]"#,
            _ => {
                let what = "if version 1 served this cluster before, add \"trousseau-v1\" to legacy.formats";
                self.to_check.push(what.into());
                r#"["trousseau-v2", "trousseau-v2-proxy"]"#
            }
        };
        let named = cluster.map_or("\"\" # a name, which can never be changed".to_owned(), quoted);
        if cluster.is_none() {
            self.to_check
                .push("keyring.cluster needs a name, which can never be changed; --cluster NAME writes it".into());
        }
        let toml = format!(
            r#"version = "v1"

[listen]
# For what the old plugin wrote: off again when all of it is rewritten.
v1beta1 = true

[keyring]
cluster = {named}

[[provider]]
name = "vault"
type = "transit"
{provider}
# Gone again, with v1beta1, when all is rewritten.
[legacy]
formats = {formats}
provider = "vault"
"#,
            provider = self.provider,
        );
        let Self { secrets, secret_files, not_carried, to_check, .. } = self;
        Ok(Conversion { generation: old.generation, toml, secrets, secret_files, not_carried, to_check, had_secrets })
    }

    fn file(&mut self, key: &str, file: &str) {
        let place = if Path::new(file).is_absolute() {
            "is on this host"
        } else {
            "is written with its whole path on this host"
        };
        self.to_check.push(format!(
            "{key} = {}: see that it {place} (the old plugin ran in a container), and that the user trousseau can read it",
            quoted(file)
        ));
    }
}

/// What stands before and behind `auth` in the old plugin's login path.
struct AuthPath {
    namespace: String,
    mounts: String,
}

impl AuthPath {
    fn read(path: &str) -> Result<Self, Refused> {
        let segments = segments(path);
        let at = segments.iter().position(|segment| *segment == "auth");
        let at = at
            .ok_or_else(|| refused("`authPath` has no `auth` in it", "no login of Vault's is elsewhere: correct it"))?;
        let (before, behind) = segments.split_at(at);
        let mounts = behind.iter().skip(1).map(|segment| format!("{segment}/")).collect();
        Ok(Self { namespace: before.join("/"), mounts })
    }

    /// Where a method is mounted, if not where it is by default, and in which namespace, if not in the provider's.
    fn place(&self, method: &str, namespace: &str) -> String {
        let mut place = String::new();
        if !self.mounts.is_empty() {
            let _infallible = write!(place, ", mount = {}", quoted(&format!("{}{method}", self.mounts)));
        }
        if self.namespace != namespace {
            let _infallible = write!(place, ", namespace = {}", quoted(&self.namespace));
        }
        place
    }
}

/// As Go's path.Join reads it.
fn segments(path: &str) -> Vec<&str> {
    path.split('/').filter(|segment| !segment.is_empty()).collect()
}

fn missing(key: &str) -> Refused {
    let remedy = "of the old plugin's providers only vault can be carried over; name its configuration";
    refused(format!("`{key}` is missing"), remedy)
}

/// As TOML writes it.
fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

#[cfg(test)]
mod tests;
