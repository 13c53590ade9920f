//! What the plugin adds to Transit: `TROUSSEAU_BAO=$(tests/transit/openbao.sh) cargo bench --bench transit`.
//!
//! A throw-away OpenBao on loopback wraps and unwraps by turns for this process itself, over the plugin's own client, and
//! for a plugin that this process asks over its socket; so the ratio is of one run. Then the same with OpenBao alone on one
//! core, as if on a machine of its own; Decrypts while the first of two OpenBaos hangs; and what an idle plugin asks of
//! OpenBao, in so many minutes: `-- --minutes 11` (default 2). It needs taskset(1). `TROUSSEAU_BIN` names another binary
//! than the release's. Goals are printed, not enforced: a shared machine changes its speed.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::error::Error;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use trousseau::config::Config;
use trousseau::provider::transit::{Purpose, Transit};
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
        let _gone = kill_process(Pid::from_child(&self.0), Signal::CONT); // one that hangs hears nothing else
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

    fn millis(&mut self, percentile: usize) -> f64 {
        self.0.sort_unstable();
        self.0.get(self.0.len() * percentile / 100).copied().unwrap_or_default().as_secs_f64() * 1e3
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

/// Where processes run.
#[derive(Clone, Copy, PartialEq)]
enum Cores {
    /// All share all.
    Shared,
    /// OpenBao has the first, this process and the plugin have the second.
    Apart,
}

impl Cores {
    /// The program, on this core alone if cores are apart.
    fn command(self, core: usize, program: impl AsRef<OsStr>) -> Command {
        match self {
            Self::Shared => Command::new(program),
            Self::Apart => {
                let mut command = Command::new("taskset");
                command.args(["--cpu-list", &core.to_string()]).arg(program);
                command
            }
        }
    }
}

/// An OpenBao with a key of its own name.
struct Bao {
    name: &'static str,
    address: String,
    process: Process,
    directory: TempDir,
}

impl Bao {
    fn start(name: &'static str, cores: Cores) -> Result<Self> {
        let directory = TempDir::new()?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("bao.hcl"), "telemetry {\n prometheus_retention_time = \"24h\"\n disable_hostname = true\n}\n")?;
        let mut server = cores.command(0, program()?);
        if cores == Cores::Apart {
            server.env("GOMAXPROCS", "1");
        }
        server.args(["server", "-dev", "-dev-tls", "-dev-no-store-token", "-dev-root-token-id", TOKEN]);
        server.arg(format!("-dev-tls-cert-dir={}", directory.path().display()));
        server.arg(format!("-dev-listen-address=127.0.0.1:{port}")).arg("-config").arg(at("bao.hcl"));
        let log = fs::File::create(at("log"))?;
        let process = Process(server.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?);
        let bao = Self { name, address: format!("https://127.0.0.1:{port}"), process, directory };
        let began = Instant::now();
        while !bao.cli(&["secrets", "enable", "transit"])?.status.success() {
            if began.elapsed() > PATIENCE {
                return Err(fs::read_to_string(bao.directory.path().join("log"))?.into());
            }
        }
        bao.cli(&["write", "-f", &format!("transit/keys/{name}")])?;
        Ok(bao)
    }

    fn cli(&self, arguments: &[&str]) -> Result<Output> {
        let directory = self.directory.path();
        let mut command = Command::new(program()?);
        command.args(arguments).env("BAO_ADDR", &self.address).env("BAO_TOKEN", TOKEN).env("HOME", directory);
        Ok(command.env("BAO_CACERT", directory.join("vault-ca.pem")).stdin(Stdio::null()).output()?)
    }

    fn provider(&self) -> Result<String> {
        let Self { name, address, directory, .. } = self;
        let directory = directory.path().display();
        let token = self.directory.path().join("token");
        fs::write(&token, TOKEN)?;
        fs::set_permissions(&token, fs::Permissions::from_mode(0o600))?;
        Ok(format!(
            "[[provider]]\nname = \"{name}\"\ntype = \"transit\"\naddress = \"{address}\"\nkey = \"{name}\"\n\
             ca-file = \"{directory}/vault-ca.pem\"\nauth = {{ method = \"token\", token-file = \"{directory}/token\" }}\n"
        ))
    }

    /// Requests that it has seen, and logins.
    fn requests(&self) -> Result<u64> {
        let metrics =
            String::from_utf8(self.cli(&["read", "-format=raw", "sys/metrics", "format=prometheus"])?.stdout)?;
        let names = ["vault_core_handle_request_count ", "vault_core_handle_login_request_count "];
        let counts = metrics.lines().filter_map(|line| names.iter().find_map(|name| line.strip_prefix(name)));
        let counts = counts.map(str::parse).collect::<std::result::Result<Vec<u64>, _>>()?;
        if counts.is_empty() { Err("OpenBao's metrics count no requests".into()) } else { Ok(counts.iter().sum()) }
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.process.0), signal)?)
    }
}

fn program() -> Result<PathBuf> {
    let named = std::env::var_os("TROUSSEAU_BAO").map(PathBuf::from);
    Ok(named.ok_or("set TROUSSEAU_BAO to what tests/transit/openbao.sh prints")?)
}

/// A plugin that serves, a client to it, and what it has sealed.
struct Plugin {
    config: Config,
    client: Client,
    /// Identical Decrypts in flight would share a call.
    sealed: Vec<(Vec<u8>, String)>,
    turn: AtomicUsize,
    _process: Process,
    directory: TempDir,
}

impl Plugin {
    async fn start(baos: &[&Bao], cores: Cores) -> Result<Self> {
        let directory = TempDir::new()?;
        let (dir, file) = (directory.path().display(), directory.path().join("trousseau.toml"));
        let providers = baos.iter().map(|bao| bao.provider()).collect::<Result<String>>()?;
        let text = format!(
            "version = \"v1\"\n[listen]\nsocket = \"{dir}/kms.sock\"\n[keyring]\ncluster = \"bench\"\nstate = \"{dir}/state\"\n\
             {providers}"
        );
        fs::write(&file, text)?;
        let binary = std::env::var_os("TROUSSEAU_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_trousseau").into());
        let mut plugin = cores.command(1, binary);
        plugin.arg("serve").arg("--config").arg(&file).env_remove("STATE_DIRECTORY");
        let log = fs::File::create(directory.path().join("log"))?;
        let process = Process(plugin.stdin(Stdio::null()).stderr(log).spawn()?);
        let config = Config::load(&file)?;
        let began = Instant::now();
        while !config.listen.socket.exists() && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut client = Client::connect(&config.listen.socket, PATIENCE).await?;
        while client.status().await.is_err() && began.elapsed() < PATIENCE {}
        let mut sealed = Vec::new();
        for _ in 0..256 {
            sealed.push(client.encrypt(vec![7; 32]).await?);
        }
        Ok(Self { config, client, sealed, turn: AtomicUsize::new(0), _process: process, directory })
    }

    async fn encrypt(&self) -> Result<()> {
        self.client.clone().encrypt(vec![7; 32]).await?;
        Ok(())
    }

    async fn decrypt(&self) -> Result<()> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.sealed.len();
        let (sealed, key_id) = self.sealed.get(turn).cloned().unwrap_or_default();
        self.client.clone().decrypt(sealed, key_id).await?;
        Ok(())
    }

    /// Waits until its log says this once more than `before`.
    async fn says(&self, words: &str, before: usize) -> Result<()> {
        let began = Instant::now();
        while self.said(words)? <= before {
            if began.elapsed() > PATIENCE {
                return Err(format!("it does not say: {words}").into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn said(&self, words: &str) -> Result<usize> {
        Ok(fs::read_to_string(self.directory.path().join("log"))?.matches(words).count())
    }
}

/// What this plugin's own client gets from Transit, and what the plugin gets, by turns.
async fn throughput(plugin: &Plugin, cores: Cores, in_flights: &[usize]) -> Result<()> {
    let state = Arc::new(State::open(&plugin.directory.path().join("bench-state"))?);
    let transit = Transit::new(plugin.config.transit().next().ok_or("no transit")?, &state, Purpose::Look);
    transit.settled().await;
    let kek = transit.look(Instant::now() + PATIENCE).await?.keks.pop().ok_or("no KEK")?;
    let wrapped = kek.wrap_dek(Arc::new(Dek::generate()?), Instant::now() + PATIENCE).await?;
    for in_flight in in_flights.iter().copied() {
        for encrypts in [true, false] {
            let (mut plain, mut through) = (Tally::default(), Tally::default());
            for _ in 0..ROUNDS {
                plain.0.extend(round(in_flight, || of_kek(kek.as_ref(), &wrapped, encrypts)).await?.0);
                through.0.extend(match encrypts {
                    true => round(in_flight, || plugin.encrypt()).await?.0,
                    false => round(in_flight, || plugin.decrypt()).await?.0,
                });
            }
            let (plain_rate, rate) = (plain.per_second(in_flight), through.per_second(in_flight));
            println!(
                "{}  {in_flight:>9}  {}  {plain_rate:>9.0}  {rate:>8.0}  {:>5.2}  {:>18.2}",
                if cores == Cores::Shared { "shared by all three    " } else { "one OpenBao's, one ours" },
                if encrypts { "Encrypt" } else { "Decrypt" },
                rate / plain_rate,
                through.millis(50) - plain.millis(50),
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

/// Decrypts with both of two providers well, and with the first one hung and its breaker open, by turns.
async fn with_one_hung(plugin: &Plugin, first: &Bao) -> Result<()> {
    println!("\nDECRYPT with the first of two hung, once its breaker is open (goal: p99 2x)");
    println!("IN FLIGHT  BOTH WELL p50 ms  p99 ms  ONE HUNG p50 ms  p99 ms  RATIO of p99");
    for in_flight in [1, 16] {
        let (mut well, mut hung) = (Tally::default(), Tally::default());
        for _ in 0..ROUNDS {
            well.0.extend(round(in_flight, || plugin.decrypt()).await?.0);
            let (lost, back) = (plugin.said("Vault is out of reach")?, plugin.said("Vault is back")?);
            first.signal(Signal::STOP)?;
            plugin.decrypt().await?;
            plugin.says("Vault is out of reach", lost).await?;
            hung.0.extend(round(in_flight, || plugin.decrypt()).await?.0);
            first.signal(Signal::CONT)?;
            plugin.says("Vault is back", back).await?;
        }
        let [(p50, p99), (hung_p50, hung_p99)] =
            [&mut well, &mut hung].map(|tally| (tally.millis(50), tally.millis(99)));
        let ratio = hung_p99 / p99;
        println!("{in_flight:>9}  {p50:>16.2}  {p99:>6.2}  {hung_p50:>15.2}  {hung_p99:>6.2}  {ratio:>12.2}");
    }
    Ok(())
}

/// What a plugin asks of OpenBao while nobody asks anything of it.
async fn idle(bao: &Bao, minutes: u64) -> Result<()> {
    let before = bao.requests()?;
    let began = bao.requests()?; // to count costs something itself
    tokio::time::sleep(Duration::from_secs(60 * minutes)).await;
    let seen = bao.requests()? - began - (began - before);
    println!("\nIDLE for {minutes} min: OpenBao saw {seen} requests, {} a day (goal 3,000)", seen * 24 * 60 / minutes);
    println!("(a look each minute, and two requests more each five minutes: 10 min or a multiple tell the truth)");
    Ok(())
}

/// What stands behind `--minutes`; cargo has arguments of its own.
fn minutes() -> Result<u64> {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--minutes");
    match arguments.nth(1) {
        Some(minutes) => Ok(minutes.parse()?),
        None => Ok(2),
    }
}

async fn measure() -> Result<()> {
    let minutes = minutes()?;
    let bao = Bao::start("bench", Cores::Shared)?;
    let plugin = Plugin::start(&[&bao], Cores::Shared).await?;
    println!(
        "CORES                   IN FLIGHT  CALL     TRANSIT/s  PLUGIN/s  RATIO  P50 ADDED ms (goals: 0.9 at 16, 0.3 ms at 1)"
    );
    throughput(&plugin, Cores::Shared, &[1, 16]).await?;
    {
        let all = affinity(None)?;
        affinity(Some("1"))?;
        let bao = Bao::start("bench", Cores::Apart)?;
        let plugin = Plugin::start(&[&bao], Cores::Apart).await?;
        throughput(&plugin, Cores::Apart, &[16]).await?;
        affinity(Some(&all))?;
    }
    idle(&bao, minutes).await?;
    drop(plugin);
    let second = Bao::start("second", Cores::Shared)?;
    let plugin = Plugin::start(&[&bao, &second], Cores::Shared).await?;
    with_one_hung(&plugin, &bao).await
}

/// Sets the cores of this process, and returns those that it has.
fn affinity(cores: Option<&str>) -> Result<String> {
    let mut taskset = Command::new("taskset");
    taskset.args(["--all-tasks", "--cpu-list", "--pid"]).args(cores).arg(std::process::id().to_string());
    let done = taskset.output()?;
    let said = String::from_utf8(done.stdout)?;
    if !done.status.success() {
        return Err(String::from_utf8(done.stderr)?.into());
    }
    Ok(said.lines().last().and_then(|line| line.rsplit(' ').next()).unwrap_or_default().to_owned())
}

fn main() -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(measure())
}
