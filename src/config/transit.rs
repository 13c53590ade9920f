//! `[[provider]]` of type `transit`: a key of Vault's or OpenBao's Transit secrets engine, and how to log in there.

use std::path::{Path, PathBuf};

use http::Uri;
use jiff::SignedDuration;

use super::file::AuthMethod;
use super::{Check, ConfigError, Credential, Exportable, file, period};
use crate::disk;

/// Until every host has seen a new version of the key.
const DEFAULT_DELAY: &str = "10m";

/// One `[[provider]]` of type `transit`.
#[derive(Debug)]
pub struct TransitConfig {
    /// For people; renaming is harmless.
    pub name: String,
    /// Whether its active KEK wraps new DEKs; otherwise its KEKs only unwrap.
    pub seal: bool,
    /// `https://HOST:PORT`.
    pub address: Uri,
    /// The namespace that has the mount.
    pub namespace: Option<String>,
    /// Where the secrets engine is.
    pub mount: String,
    /// The key's name.
    pub key: String,
    /// How long after its creation a version becomes active.
    pub activation_delay: SignedDuration,
    /// Who vouches for the server, in PEM. `None`: whom the host trusts.
    pub ca_file: Option<PathBuf>,
    /// How to log in.
    pub auth: Auth,
    /// `[policy]`: what becomes of a key that can be exported.
    pub exportable: Exportable,
}

impl TransitConfig {
    /// The command that makes a new version of the key, for whom Vault lets do that.
    #[must_use]
    pub fn rotation(&self) -> String {
        let namespace = self.namespace.as_ref().map(|name| format!("-namespace={name} ")).unwrap_or_default();
        format!("vault write {namespace}-f {}/keys/{}/rotate", self.mount.trim_end_matches('/'), self.key)
    }
}

/// How a token is got.
#[derive(Clone, Debug)]
pub struct Auth {
    /// What is shown.
    pub method: Method,
    /// Where the auth method is.
    pub mount: String,
    /// The namespace that has it, where that is another one than the key's.
    pub namespace: Option<String>,
}

/// What is shown for a token.
#[derive(Clone, Debug)]
pub enum Method {
    /// A token that somebody else put there, and may replace.
    Token {
        /// Its file.
        token: Credential,
    },
    /// AppRole.
    AppRole {
        /// The role's id.
        role_id: Credential,
        /// The secret id, or the token that it is wrapped in.
        secret_id: Credential,
        /// Whether it is wrapped (response wrapping).
        wrapped: bool,
    },
    /// A TLS client certificate.
    Cert {
        /// The certificate and its chain, in PEM.
        cert: PathBuf,
        /// Its private key, in PEM.
        key: Credential,
        /// The role, where more than one may match.
        role: Option<String>,
    },
    /// A JWT, of the methods `jwt` and `kubernetes`.
    Jwt {
        /// The role.
        role: String,
        /// The file of the JWT, which somebody else keeps fresh.
        jwt: Credential,
    },
}

impl Method {
    /// The word for it in the configuration.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Token { .. } => "token",
            Self::AppRole { .. } => "approle",
            Self::Cert { .. } => "cert",
            Self::Jwt { .. } => "jwt",
        }
    }

    /// The secrets among it, by their keys in the configuration.
    #[must_use]
    pub fn secrets(&self) -> Vec<(&'static str, &Credential)> {
        match self {
            Self::Token { token } => vec![("auth.token-file", token)],
            Self::AppRole { role_id, secret_id, .. } => {
                vec![("auth.role-id-file", role_id), ("auth.secret-id-file", secret_id)]
            }
            Self::Cert { key, .. } => vec![("auth.key-file", key)], // a new certificate comes with a new key
            Self::Jwt { jwt, .. } => vec![("auth.jwt-file", jwt)],
        }
    }
}

impl Check<'_> {
    pub(super) fn transit(&self, file: file::Provider, exportable: Exportable) -> Result<TransitConfig, ConfigError> {
        let name = file.name;
        let wrong =
            |field: &str, what: &str, remedy: &str| self.error(format!("provider {name}: {field}: {what}"), remedy);
        let absent = |field: &str, remedy: &str| wrong(field, "not there", remedy);

        let text = file.address.ok_or_else(|| absent("address", "write for example \"https://vault.example:8200\""))?;
        let address = address_of(&text).map_err(|(what, remedy)| wrong("address", &what, remedy))?;
        let key = file.key.ok_or_else(|| absent("key", "name the key of the Transit secrets engine"))?;
        let mount = file.mount.unwrap_or_else(|| "transit".into());
        for (field, value) in [("key", Some(&key)), ("mount", Some(&mount)), ("namespace", file.namespace.as_ref())] {
            if let Some(value) = value.filter(|value| !is_path(value) || field == "key" && value.contains('/')) {
                return Err(wrong(field, &format!("`{}` is not a name", value.escape_debug()), NAMES));
            }
        }
        let delay = file.activation_delay.unwrap_or_else(|| DEFAULT_DELAY.into());
        let activation_delay = period(&delay).filter(|delay| *delay <= SignedDuration::from_hours(720));
        let activation_delay = activation_delay.ok_or_else(|| {
            wrong(
                "activation-delay",
                &format!("`{delay}` is not a length of time of at most 720h"),
                "write for example \"10m\"",
            )
        })?;
        if let Some(ca) = &file.ca_file {
            see_ca(ca).map_err(|(what, remedy)| wrong("ca-file", &format!("{}: {what}", ca.display()), &remedy))?;
        }
        let auth = file.auth.ok_or_else(|| absent("auth", "write for example { method = \"approle\", … }"))?;
        let auth = auth_of(auth).map_err(|(field, what, remedy)| wrong(&format!("auth.{field}"), &what, remedy))?;
        if let Method::Cert { cert, .. } = &auth.method
            && let Ok(metadata) = std::fs::metadata(cert)
        {
            disk::refuse_if_changeable_by_others(cert, &metadata)
                .map_err(|(what, remedy)| wrong("auth.cert-file", &format!("{}: {what}", cert.display()), &remedy))?;
        }
        let (seal, namespace, ca_file) = (file.seal, file.namespace, file.ca_file);
        Ok(TransitConfig { name, seal, address, namespace, mount, key, activation_delay, ca_file, auth, exportable })
    }
}

/// Who vouches for the server is there, and nobody else can put another in its place.
fn see_ca(ca: &Path) -> Result<(), (String, String)> {
    let wrong = |what: String| (what, "name the CA's certificate in PEM".to_owned());
    let metadata = std::fs::metadata(ca).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    disk::refuse_if_changeable_by_others(ca, &metadata)?;
    let pem = std::fs::read_to_string(ca).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    match pem.contains("-----BEGIN CERTIFICATE-----") {
        true => Ok(()),
        false => Err(wrong("has no certificate in PEM".into())),
    }
}

const NAMES: &str = "use letters, digits, `-`, `.`, `_`, and `/` between the parts of a mount or a namespace";

/// What needs no escape in a URL's path or in a header.
fn is_path(text: &str) -> bool {
    let is_name = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(plain)
    };
    text.len() <= 256 && text.trim_end_matches('/').split('/').all(is_name)
}

/// Data keys and tokens go there: never without TLS, and to nobody's path but ours.
fn address_of(text: &str) -> Result<Uri, (String, &'static str)> {
    const EXAMPLE: &str = "write for example \"https://vault.example:8200\"";
    let wrong = |what: &str| (format!("`{}` {what}", text.escape_debug()), EXAMPLE);
    let uri: Uri = text.parse().map_err(|_| wrong("is not a URL"))?;
    if uri.scheme_str() != Some("https") {
        return Err(wrong("does not begin with https://: data keys would go over the network in clear"));
    }
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err((format!("has a user name in it: {}", uri.host().unwrap_or_default()), EXAMPLE));
    }
    match (uri.host(), uri.path(), uri.query()) {
        (Some(host), "" | "/", None) if !host.is_empty() => Ok(uri),
        _ => Err(wrong("has more than a host and a port")),
    }
}

type Wrong = (&'static str, String, &'static str);

fn auth_of(file: file::Auth) -> Result<Auth, Wrong> {
    let (method, own, mount): (Method, &[&str], &str) = match file.method {
        AuthMethod::Token => {
            (Method::Token { token: credential("token-file", file.token_file.as_deref())? }, &["token-file"], "token")
        }
        AuthMethod::AppRole => {
            let role_id = credential("role-id-file", file.role_id_file.as_deref())?;
            let secret_id = credential("secret-id-file", file.secret_id_file.as_deref())?;
            let wrapped = file.wrapped.unwrap_or(false);
            (
                Method::AppRole { role_id, secret_id, wrapped },
                &["role-id-file", "secret-id-file", "wrapped", "mount"],
                "approle",
            )
        }
        AuthMethod::Cert => {
            let absent = || ("cert-file", "not there".into(), "name the client certificate in PEM");
            let cert = file.cert_file.clone().ok_or_else(absent)?;
            let key = credential("key-file", file.key_file.as_deref())?;
            (Method::Cert { cert, key, role: file.role.clone() }, &["cert-file", "key-file", "role", "mount"], "cert")
        }
        of_jwt @ (AuthMethod::Jwt | AuthMethod::Kubernetes) => {
            let role = file.role.clone().ok_or_else(|| ("role", "not there".into(), "name the role to log in as"))?;
            let jwt = credential("jwt-file", file.jwt_file.as_deref())?;
            let mount = if of_jwt == AuthMethod::Jwt { "jwt" } else { "kubernetes" };
            (Method::Jwt { role, jwt }, &["role", "jwt-file", "mount"], mount)
        }
    };
    let there = [
        ("mount", file.mount.is_some()),
        ("token-file", file.token_file.is_some()),
        ("role-id-file", file.role_id_file.is_some()),
        ("secret-id-file", file.secret_id_file.is_some()),
        ("wrapped", file.wrapped.is_some()),
        ("cert-file", file.cert_file.is_some()),
        ("key-file", file.key_file.is_some()),
        ("role", file.role.is_some()),
        ("jwt-file", file.jwt_file.is_some()),
    ];
    if let Some((field, _)) = there.into_iter().find(|(field, is_there)| *is_there && !own.contains(field)) {
        return Err((field, "this method has no such key".into(), "remove it, or write the other method"));
    }
    let mount = file.mount.unwrap_or_else(|| mount.into());
    for (field, value) in [("mount", Some(&mount)), ("namespace", file.namespace.as_ref())] {
        if let Some(value) = value.filter(|value| !is_path(value)) {
            return Err((field, format!("`{}` is not a name", value.escape_debug()), NAMES));
        }
    }
    Ok(Auth { method, mount, namespace: file.namespace })
}

fn credential(field: &'static str, text: Option<&str>) -> Result<Credential, Wrong> {
    let text = text.ok_or_else(|| (field, "not there".into(), "name the file"))?;
    Credential::parse(text).map_err(|(what, remedy)| (field, what, remedy))
}
