//! What the plugin adds to Transit: `TROUSSEAU_BAO=$(tests/transit/openbao.sh) cargo bench --bench transit`.
//!
//! A throw-away OpenBao on loopback wraps and unwraps by turns for this process itself, over the plugin's own client, and
//! for a plugin that this process asks over its socket; so the ratio is of one run. `TROUSSEAU_BIN` names another binary
//! than the release's. Goals are printed, not enforced: a shared machine changes its speed.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use trousseau::config::Config;
use trousseau::provider::transit::Transit;
use trousseau::provider::{Kek, Provider};
use trousseau::secret::Dek;
use trousseau::service::client::Client;
use trousseau::state::State;

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(20);
const TOKEN: &str = "bench-root-token";

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A process of ours. It is asked to end, and waited for, when this is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _gone = self.0.wait();
    }
}

/// How often, and how long each took.
#[derive(Default)]
struct Tally(Vec<Duration>);

impl Tally {
    fn per_second(&self, in_flight: usize) -> f64 {
        let busy: Duration = self.0.iter().sum();
        self.0.len() as f64 * in_flight as f64 / busy.as_secs_f64()
    }

    fn median_millis(&mut self) -> f64 {
        self.0.sort_unstable();
        self.0.get(self.0.len() / 2).copied().unwrap_or_default().as_secs_f64() * 1e3
    }
}

/// Calls `request` so many at a time until the round is over.
async fn round<F: Future<Output = Result<()>>>(in_flight: usize, request: impl Fn() -> F) -> Result<Tally> {
    let end = Instant::now() + ROUND;
    let lanes = (0..in_flight).map(|_| async {
        let mut took = Vec::new();
        while Instant::now() < end {
            let began = Instant::now();
            request().await?;
            took.push(began.elapsed());
        }
        Ok::<_, Box<dyn Error>>(took)
    });
    Ok(Tally(try_join_all(lanes).await?.concat()))
}

/// A server with the key `bench`, and a configuration for it.
fn start(directory: &TempDir) -> Result<(Process, PathBuf)> {
    let bao = std::env::var_os("TROUSSEAU_BAO").ok_or("set TROUSSEAU_BAO to what tests/transit/openbao.sh prints")?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let at = |name: &str| directory.path().join(name);
    let mut server = Command::new(&bao);
    server.args(["server", "-dev", "-dev-tls", "-dev-no-store-token", "-dev-root-token-id", TOKEN]);
    server.arg(format!("-dev-tls-cert-dir={}", directory.path().display()));
    server.arg(format!("-dev-listen-address=127.0.0.1:{port}"));
    let log = fs::File::create(at("bao.log"))?;
    let server = Process(server.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?);
    let address = format!("https://127.0.0.1:{port}");
    let cli = |arguments: &[&str]| {
        let mut command = Command::new(&bao);
        command.args(arguments).env("BAO_ADDR", &address).env("BAO_TOKEN", TOKEN).env("HOME", directory.path());
        command.env("BAO_CACERT", at("vault-ca.pem")).stdout(Stdio::null()).stderr(Stdio::null()).status()
    };
    let began = Instant::now();
    while !cli(&["secrets", "enable", "transit"])?.success() {
        if began.elapsed() > PATIENCE {
            return Err(fs::read_to_string(at("bao.log"))?.into());
        }
    }
    cli(&["write", "-f", "transit/keys/bench"])?;
    fs::write(at("token"), TOKEN)?;
    fs::set_permissions(at("token"), fs::Permissions::from_mode(0o600))?;
    let dir = directory.path().display();
    let configuration = format!(
        "version = \"v1\"\n[listen]\nsocket = \"{dir}/kms.sock\"\n[keyring]\ncluster = \"bench\"\nstate = \"{dir}/state\"\n\
         [[provider]]\nname = \"vault\"\ntype = \"transit\"\naddress = \"{address}\"\nkey = \"bench\"\n\
         ca-file = \"{dir}/vault-ca.pem\"\nauth = {{ method = \"token\", token-file = \"{dir}/token\" }}\n"
    );
    fs::write(at("trousseau.toml"), configuration)?;
    Ok((server, at("trousseau.toml")))
}

async fn measure(file: PathBuf, directory: &TempDir) -> Result<()> {
    let config = Config::load(&file)?;
    let state = Arc::new(State::open(&directory.path().join("bench-state"))?);
    let transit = Transit::new(config.transit().next().ok_or("no transit")?, &state);
    transit.settled().await;
    let kek = transit.look(Instant::now() + PATIENCE).await?.keks.pop().ok_or("no KEK")?;
    let client = Client::connect(&config.listen.socket, PATIENCE).await?;
    let (mut ready, began) = (client.clone(), Instant::now());
    while ready.status().await.is_err() && began.elapsed() < PATIENCE {}
    // Identical Decrypts in flight would share a call.
    let mut sealed = Vec::new();
    for _ in 0..256 {
        sealed.push(ready.encrypt(vec![7; 32]).await?);
    }
    let turn = AtomicUsize::new(0);
    let next = || sealed.get(turn.fetch_add(1, Ordering::Relaxed) % sealed.len()).cloned().unwrap_or_default();
    let wrapped = kek.wrap_dek(Arc::new(Dek::generate()?), Instant::now() + PATIENCE).await?;
    println!("IN FLIGHT  CALL     TRANSIT/s  PLUGIN/s  RATIO  (goal 0.9 at 16)  P50 ADDED ms (goal 0.3 at 1)");
    for in_flight in [1, 16] {
        for encrypts in [true, false] {
            let (mut plain, mut through) = (Tally::default(), Tally::default());
            for _ in 0..ROUNDS {
                plain.0.extend(round(in_flight, || of_kek(kek.as_ref(), &wrapped, encrypts)).await?.0);
                through.0.extend(round(in_flight, || of_plugin(client.clone(), next(), encrypts)).await?.0);
            }
            let (plain_rate, rate) = (plain.per_second(in_flight), through.per_second(in_flight));
            println!(
                "{in_flight:>9}  {}  {plain_rate:>9.0}  {rate:>8.0}  {:>5.2}  {:>18.2}",
                if encrypts { "Encrypt" } else { "Decrypt" },
                rate / plain_rate,
                through.median_millis() - plain.median_millis(),
            );
        }
    }
    Ok(())
}

async fn of_kek(kek: &dyn Kek, wrapped: &[u8], encrypts: bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    if encrypts {
        kek.wrap_dek(Arc::new(Dek::generate()?), deadline).await?;
    } else {
        kek.unwrap_dek(wrapped, deadline).await?;
    }
    Ok(())
}

async fn of_plugin(mut client: Client, (sealed, key_id): (Vec<u8>, String), encrypts: bool) -> Result<()> {
    if encrypts {
        client.encrypt(vec![7; 32]).await?;
    } else {
        client.decrypt(sealed, key_id).await?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let directory = TempDir::new()?;
    let (_server, file) = start(&directory)?;
    let binary = std::env::var_os("TROUSSEAU_BIN").map(PathBuf::from);
    let binary = binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_trousseau").into());
    let log = fs::File::create(directory.path().join("log"))?;
    let mut plugin = Command::new(binary);
    plugin.arg("serve").arg("--config").arg(&file).env_remove("STATE_DIRECTORY");
    let _plugin = Process(plugin.stdin(Stdio::null()).stderr(log).spawn()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let began = Instant::now();
        while !directory.path().join("kms.sock").exists() && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        measure(file, &directory).await
    })
}
