//! The ways to log in to an OpenBao. Each is set up once, and gives a token of the policy that is named like the key.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use base64ct::{Base64UrlUnpadded, Encoding};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bao::Bao;
use crate::certificates::{Certificate, openssl};
use crate::secrets;

/// What a plugin that logs in by AppRole is given.
pub struct AppRole {
    pub role_id: String,
    pub secret_id: String,
}

const ROLE: &str = "auth/approle/role/plugin";

impl Bao {
    fn enable(&self, method: &str) {
        self.root.wants("POST", &format!("sys/auth/{method}"), json!({"type": method}));
    }

    /// A token of this policy that lives so long.
    pub fn token(&self, policy: &str, ttl: &str) -> String {
        let wanted = json!({"policies": [policy], "ttl": ttl});
        secret(&self.root.wants("POST", "auth/token/create", wanted)["auth"]["client_token"])
    }

    pub fn revoke(&self, token: &str) {
        self.root.wants("POST", "auth/token/revoke", json!({"token": token}));
    }

    /// Revokes every token that came of a login by this method.
    pub fn revoke_logins(&self, method: &str) {
        self.root.wants("POST", &format!("sys/leases/revoke-prefix/auth/{method}"), json!({}));
    }

    /// The role `plugin`: tokens of this policy, with `more` parameters, such as `token_ttl`.
    pub fn approle(&self, policy: &str, more: &Value) -> AppRole {
        self.enable("approle");
        let mut role = json!({"token_policies": [policy]});
        role.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.root.wants("POST", ROLE, role);
        let role_id = text(&self.root.wants("GET", &format!("{ROLE}/role-id"), Value::Null)["data"]["role_id"]);
        let secret_id = self.root.wants("POST", &format!("{ROLE}/secret-id"), json!({}));
        AppRole { role_id, secret_id: secret(&secret_id["data"]["secret_id"]) }
    }

    /// A token that can be exchanged once for another secret-id of the role.
    pub fn wrapped_secret_id(&self, ttl: &str) -> String {
        let wrapping = self.root.with_header("X-Vault-Wrap-TTL", ttl);
        secret(&wrapping.wants("POST", &format!("{ROLE}/secret-id"), json!({}))["wrap_info"]["token"])
    }

    /// A certificate by which the role `plugin` is entered.
    pub fn client_certificate(&self, policy: &str) -> Certificate {
        self.enable("cert");
        let certificate = self.authority.issue("plugin");
        let pem = fs::read_to_string(self.authority.file()).unwrap();
        let role = json!({"certificate": pem, "allowed_common_names": ["plugin"], "token_policies": [policy]});
        self.root.wants("POST", "auth/cert/certs/plugin", role);
        certificate
    }

    /// Who signs tokens for the role `plugin`.
    pub fn jwt(&self, policy: &str) -> Issuer {
        self.enable("jwt");
        let issuer = Issuer::new();
        self.root.wants("POST", "auth/jwt/config", json!({"jwt_validation_pubkeys": [issuer.public_key()]}));
        let role = json!({
            "role_type": "jwt", "user_claim": "sub", "bound_audiences": [AUDIENCE], "bound_subject": SUBJECT,
            "token_policies": [policy],
        });
        self.root.wants("POST", "auth/jwt/role/plugin", role);
        issuer
    }

    /// The role `plugin` for the service account of [`Issuer::token`], with an API server behind it that vouches for
    /// every token.
    pub fn kubernetes(&self, policy: &str) -> Issuer {
        self.enable("kubernetes");
        let config = json!({
            "kubernetes_host": format!("http://{}", token_reviews()), "token_reviewer_jwt": "reviewer",
            "kubernetes_ca_cert": fs::read_to_string(self.authority.file()).unwrap(),
        });
        self.root.wants("POST", "auth/kubernetes/config", config);
        let role = json!({
            "bound_service_account_names": ["plugin"], "bound_service_account_namespaces": ["kube-system"],
            "audience": AUDIENCE, "token_policies": [policy],
        });
        self.root.wants("POST", "auth/kubernetes/role/plugin", role);
        Issuer::new()
    }
}

const AUDIENCE: &str = "vault";
const SUBJECT: &str = "system:serviceaccount:kube-system:plugin";

/// Signs tokens as Kubernetes does.
pub struct Issuer(TempDir);

impl Issuer {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        openssl(directory.path(), &["genrsa", "-out", "key", "2048"]);
        Self(directory)
    }

    fn public_key(&self) -> String {
        String::from_utf8(openssl(self.0.path(), &["rsa", "-in", "key", "-pubout"])).unwrap()
    }

    /// A token of the plugin's service account, which ends so many seconds from now.
    pub fn token(&self, seconds: i64) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        let account = json!({"namespace": "kube-system", "serviceaccount": {"name": "plugin", "uid": "0a1b"}});
        let claims = json!({
            "aud": [AUDIENCE], "sub": SUBJECT, "iss": "tests", "iat": now - 60, "nbf": now - 60, "exp": now + seconds,
            "kubernetes.io": account,
        });
        let encode = |part: &[u8]| Base64UrlUnpadded::encode_string(part);
        let header = json!({"alg": "RS256", "typ": "JWT"}).to_string();
        let signed = format!("{}.{}", encode(header.as_bytes()), encode(claims.to_string().as_bytes()));
        fs::write(self.0.path().join("signed"), &signed).unwrap();
        let signature = openssl(self.0.path(), &["dgst", "-sha256", "-sign", "key", "signed"]);
        format!("{signed}.{}", encode(&signature))
    }
}

/// An API server of which nothing is there but TokenReview. It is there until the tests end.
fn token_reviews() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut length = 0;
            let mut line = String::new();
            while stream.read_line(&mut line).unwrap_or(0) > 2 {
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                line.clear();
            }
            let mut body = vec![0; length];
            if stream.read_exact(&mut body).is_err() {
                continue;
            }
            let user = json!({"username": SUBJECT, "uid": "0a1b", "groups": ["system:serviceaccounts"]});
            let mut review: Value = serde_json::from_slice(&body).unwrap_or_default();
            review["status"] = json!({"authenticated": true, "user": user, "audiences": [AUDIENCE]});
            let answer = review.to_string();
            let head = format!(
                "HTTP/1.1 201 Created\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                answer.len()
            );
            // Who hangs up asked for nothing more.
            let _gone = stream.get_mut().write_all((head + &answer).as_bytes());
        }
    });
    address
}

/// Which no log may show.
fn secret(value: &Value) -> String {
    let secret = text(value);
    secrets::used(secret.as_bytes());
    secret
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not text")).to_owned()
}
