//! A real OpenBao: its program is named by `TROUSSEAU_BAO`, what `tests/transit/openbao.sh` prints. It serves Transit on
//! loopback over TLS, with a certificate authority of its own, and keeps its data in files, so that it can be ended and
//! started again; a second node makes it a cluster with a standby.

use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::certificates::{Authority, Certificate};

/// No wait for a server lasts longer.
const PATIENCE: Duration = Duration::from_secs(45);

/// Mounted by [`Bao::start`] at the usual place.
const TRANSIT: &str = "transit";

/// One server or two, unsealed, with Transit.
pub struct Bao {
    pub nodes: Vec<Node>,
    /// As root, on the first node.
    pub root: Client,
    pub authority: Authority,
    unseal_key: String,
    directory: TempDir,
}

/// One server.
pub struct Node {
    pub address: String,
    process: Child,
    directory: PathBuf,
}

/// The program. `None`: it is not named; this says so.
fn program() -> Option<PathBuf> {
    const LACKS: &str = "TROUSSEAU_BAO: what tests/transit/openbao.sh prints";
    let named = env::var_os("TROUSSEAU_BAO").map(PathBuf::from);
    if named.is_none() {
        assert!(env::var_os("TROUSSEAU_TEST_REQUIRE").is_none(), "{LACKS}");
        eprintln!("skipped: it lacks {LACKS}");
    }
    named
}

impl Bao {
    /// `None`: there is no OpenBao here, which was said.
    pub fn start() -> Option<Self> {
        program()?;
        let directory = TempDir::new().unwrap();
        let authority = Authority::new(directory.path().join("authority"));
        let node = Node::start(directory.path().join("first"), &authority.issue("first"));
        let anybody = Client { address: node.address.clone(), ca_file: authority.file(), ..Client::default() };
        node.wait_for(&anybody, &[501]);
        let made = anybody.wants("POST", "sys/init", json!({"secret_shares": 1, "secret_threshold": 1}));
        let root = anybody.with_token(made["root_token"].as_str().unwrap());
        let unseal_key = made["keys"][0].as_str().unwrap().to_owned();
        let bao = Self { nodes: vec![node], root, authority, unseal_key, directory };
        bao.unseal();
        bao.root.wants("POST", &format!("sys/mounts/{TRANSIT}"), json!({"type": "transit"}));
        Some(bao)
    }

    /// With a second node, which is the standby.
    pub fn start_two() -> Option<Self> {
        let mut bao = Self::start()?;
        let node = Node::start(bao.directory.path().join("second"), &bao.authority.issue("second"));
        bao.nodes.push(node);
        let standby = bao.root_at(1);
        bao.nodes[1].wait_for(&standby, &[501]);
        let ca = fs::read_to_string(bao.authority.file()).unwrap();
        let leader = json!({"leader_api_addr": bao.root.address, "leader_ca_cert": ca});
        standby.wants("POST", "sys/storage/raft/join", leader);
        bao.unseal_node(1);
        Some(bao)
    }

    /// As root, on one of the nodes.
    pub fn root_at(&self, node: usize) -> Client {
        Client { address: self.nodes[node].address.clone(), ..self.root.clone() }
    }

    pub fn seal(&self) {
        self.root.wants("PUT", "sys/seal", Value::Null);
    }

    /// And waits until it serves.
    pub fn unseal(&self) {
        self.unseal_node(0);
    }

    fn unseal_node(&self, node: usize) {
        let client = self.root_at(node);
        let began = Instant::now();
        // A node that joins is not ready for the key at once.
        while client.post("sys/unseal", json!({"key": self.unseal_key})).0 != 200 {
            assert!(began.elapsed() < PATIENCE, "it is not unsealed:\n{}", self.nodes[node].log());
            thread::sleep(Duration::from_millis(50));
        }
        // Alone, a node that does not lead yet serves nothing.
        let health: &[u16] = if self.nodes.len() == 1 { &[200] } else { &[200, 429] };
        self.nodes[node].wait_for(&client, health);
    }

    /// Ends the first node, whose data stay.
    pub fn stop(&mut self) {
        self.nodes[0].end();
    }

    /// Starts the first node again, at the same address and sealed.
    pub fn start_again(&mut self) {
        self.nodes[0].process = spawn(&self.nodes[0].directory);
        self.nodes[0].wait_for(&self.root, &[503]);
    }

    /// The first node shows this certificate when this returns.
    pub fn present(&self, certificate: &Certificate) {
        install(certificate, &self.nodes[0].directory);
        kill_process(Pid::from_child(&self.nodes[0].process), Signal::HUP).unwrap();
        let (expected, began) = (fs::read_to_string(&certificate.certificate).unwrap(), Instant::now());
        while !self.nodes[0].shown().contains(expected.trim()) {
            assert!(began.elapsed() < PATIENCE, "it goes on with its old one:\n{}", self.nodes[0].log());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The first node answers nothing from now on, though connections to it are still taken.
    pub fn pause(&self) {
        kill_process(Pid::from_child(&self.nodes[0].process), Signal::STOP).unwrap();
    }

    pub fn resume(&self) {
        kill_process(Pid::from_child(&self.nodes[0].process), Signal::CONT).unwrap();
    }

    pub fn create_key(&self, name: &str) {
        self.root.wants("POST", &format!("{TRANSIT}/keys/{name}"), json!({}));
    }

    /// Makes a new version of the key, and returns its number.
    pub fn rotate(&self, name: &str) -> u64 {
        self.root.wants("POST", &format!("{TRANSIT}/keys/{name}/rotate"), json!({}));
        self.root.wants("GET", &format!("{TRANSIT}/keys/{name}"), Value::Null)["data"]["latest_version"]
            .as_u64()
            .unwrap()
    }

    /// A policy by which somebody can do with this key what a plugin must, and no more. It is named like the key.
    pub fn key_policy(&self, key: &str) {
        self.key_policy_of(key, ["update", "update", "read"]);
    }

    /// The same with these rights to encrypt, to decrypt and to read.
    pub fn key_policy_of(&self, key: &str, [encrypt, decrypt, read]: [&str; 3]) {
        let rules = format!(
            r#"path "{TRANSIT}/encrypt/{key}" {{ capabilities = ["{encrypt}"] }}
path "{TRANSIT}/decrypt/{key}" {{ capabilities = ["{decrypt}"] }}
path "{TRANSIT}/keys/{key}" {{ capabilities = ["{read}"] }}"#
        );
        self.root.wants("POST", &format!("sys/policies/acl/{key}"), json!({"policy": rules}));
    }

    pub fn create_namespace(&self, name: &str) {
        self.root.wants("POST", &format!("sys/namespaces/{name}"), json!({}));
    }

    /// No more requests to Transit than so many a second.
    pub fn limit(&self, rate: u32) {
        let path = format!("{TRANSIT}/");
        self.root.wants("POST", "sys/quotas/rate-limit/tests", json!({"path": path, "rate": rate}));
    }
}

impl Node {
    /// Starts it, not initialized yet.
    fn start(directory: PathBuf, certificate: &Certificate) -> Self {
        fs::create_dir_all(directory.join("data")).unwrap();
        // Both are held before one is let go, so that they differ.
        let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [port, cluster_port] = ports.map(|listener| listener.local_addr().unwrap().port());
        let configuration = format!(
            r#"
storage "raft" {{
  path = "{directory}/data"
  node_id = "{directory}"
  performance_multiplier = 1
}}
listener "tcp" {{
  address = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{cluster_port}"
  tls_cert_file = "{directory}/certificate.pem"
  tls_key_file = "{directory}/key.pem"
}}
api_addr = "https://127.0.0.1:{port}"
cluster_addr = "https://127.0.0.1:{cluster_port}"
"#,
            directory = directory.display(),
        );
        fs::write(directory.join("bao.hcl"), configuration).unwrap();
        install(certificate, &directory);
        Self { address: format!("https://127.0.0.1:{port}"), process: spawn(&directory), directory }
    }

    /// Waits until its health is one of these.
    fn wait_for(&self, client: &Client, health: &[u16]) {
        let began = Instant::now();
        while !client.try_to("GET", "sys/health", Value::Null).is_ok_and(|(status, _)| health.contains(&status)) {
            assert!(began.elapsed() < PATIENCE, "waited in vain until health is {health:?}:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its certificate, and what openssl says about that.
    fn shown(&self) -> String {
        let address = self.address.trim_start_matches("https://");
        let done = Command::new("openssl").args(["s_client", "-connect", address]).output().unwrap();
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap()
    }

    fn end(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
    }
}

/// Puts it where the node's configuration says.
fn install(certificate: &Certificate, directory: &Path) {
    fs::copy(&certificate.certificate, directory.join("certificate.pem")).unwrap();
    fs::copy(&certificate.key, directory.join("key.pem")).unwrap();
}

fn spawn(directory: &Path) -> Child {
    let log = File::options().append(true).create(true).open(directory.join("log")).unwrap();
    Command::new(program().unwrap())
        .args(["server", "-config"])
        .arg(directory.join("bao.hcl"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// Somebody who asks a server.
#[derive(Clone, Default)]
pub struct Client {
    pub address: String,
    pub token: Option<String>,
    ca_file: PathBuf,
    /// Arguments of curl.
    extra: Vec<String>,
}

impl Client {
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self.clone() }
    }

    pub fn without_token(&self) -> Self {
        Self { token: None, ..self.clone() }
    }

    pub fn trusting(&self, ca_file: &Path) -> Self {
        Self { ca_file: ca_file.to_owned(), ..self.clone() }
    }

    pub fn in_namespace(&self, name: &str) -> Self {
        self.with_header("X-Vault-Namespace", name)
    }

    pub fn with_header(&self, name: &str, value: &str) -> Self {
        self.with_arguments(["--header".to_owned(), format!("{name}: {value}")])
    }

    pub fn with_certificate(&self, certificate: &Certificate) -> Self {
        let Certificate { certificate, key } = certificate;
        self.with_arguments(
            ["--cert", &certificate.display().to_string(), "--key", &key.display().to_string()].map(String::from),
        )
    }

    pub fn with_timeout(&self, seconds: u32) -> Self {
        self.with_arguments(["--max-time".to_owned(), seconds.to_string()])
    }

    fn with_arguments<const N: usize>(&self, arguments: [String; N]) -> Self {
        let mut client = self.clone();
        client.extra.extend(arguments);
        client
    }

    /// The status of HTTP, and the answer.
    pub fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.call("POST", path, body)
    }

    pub fn get(&self, path: &str) -> (u16, Value) {
        self.call("GET", path, Value::Null)
    }

    pub fn delete(&self, path: &str) -> (u16, Value) {
        self.call("DELETE", path, Value::Null)
    }

    /// What must succeed, and its answer.
    pub fn wants(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.call(method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// What the server answers in words when it refuses.
    pub fn refusal(&self, path: &str, body: Value) -> (u16, String) {
        let (status, answer) = self.post(path, body);
        (status, answer["errors"][0].as_str().unwrap_or_default().to_owned())
    }

    fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        self.try_to(method, path, body).unwrap_or_else(|complaint| panic!("{method} {path}: {complaint}"))
    }

    /// Why nobody answers.
    pub fn complaint(&self) -> String {
        self.try_to("GET", "sys/health", Value::Null).unwrap_err()
    }

    /// Or why nobody answers.
    pub fn try_to(&self, method: &str, path: &str, body: Value) -> Result<(u16, Value), String> {
        let mut curl = Command::new("curl");
        curl.args([
            "--silent",
            "--show-error",
            "--max-time",
            "20",
            "--write-out",
            "\n%{http_code}",
            "--request",
            method,
        ]);
        curl.arg("--cacert").arg(&self.ca_file).args(&self.extra);
        if let Some(token) = &self.token {
            curl.args(["--header", &format!("X-Vault-Token: {token}")]);
        }
        if !body.is_null() {
            curl.args(["--data-binary", "@-"]);
        }
        curl.arg(format!("{}/v1/{path}", self.address));
        let mut curl = curl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("curl");
        // It does not read what it does not send.
        let _unread = curl.stdin.take().unwrap().write_all(body.to_string().as_bytes());
        let done = curl.wait_with_output().unwrap();
        if !done.status.success() {
            return Err(String::from_utf8(done.stderr).unwrap());
        }
        let text = String::from_utf8(done.stdout).unwrap();
        let (answer, status) = text.rsplit_once('\n').unwrap();
        Ok((status.parse().unwrap(), serde_json::from_str(answer).unwrap_or_default()))
    }
}
