//! How soon the plugin answers, how much memory it takes, and how large it is: `cargo bench --bench start`.
//!
//! It makes a throw-away SoftHSM token with a KEK in gcm mode. `TROUSSEAU_BIN` names another binary than the release's.
//! Goals are printed, not enforced: a shared machine changes its speed.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod host;

use std::env;
use std::fs;
use std::iter::repeat_with;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::session::UserType;
use futures_util::future::try_join_all;
use host::{Host, PATIENCE, Result};
use tokio::runtime::Runtime;
use trousseau::config::Config;
use trousseau::service::client::{Client, ClientError};

const STARTS: usize = 20;
const ASK_AGAIN: Duration = Duration::from_millis(1);
const REQUESTS: usize = 50_000;
const IN_FLIGHT: usize = 16;

/// Names the configuration to the process that logs in and does nothing else.
const ALONE: &str = "TROUSSEAU_BENCH_ALONE";

struct Bench(Host);

impl Bench {
    /// From exec to the answer to the first Status, in milliseconds.
    fn first_status(&self, runtime: &Runtime) -> Result<f64> {
        let began = Instant::now();
        let _serving = self.0.serve()?;
        let socket = self.0.connect()?;
        runtime.block_on(async { Client::connect(&socket, PATIENCE).await?.status().await })?;
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }

    /// From exec to the answer to the first Encrypt that is served, in milliseconds. Until the token is logged in to and the
    /// KEK has proved itself, it is refused.
    fn first_encrypt(&self, runtime: &Runtime) -> Result<f64> {
        let began = Instant::now();
        let _serving = self.0.serve()?;
        let socket = self.0.connect()?;
        runtime.block_on(async {
            let mut client = Client::connect(&socket, PATIENCE).await?;
            while let Err(refused) = client.encrypt(vec![7; 32]).await {
                if began.elapsed() > PATIENCE {
                    return Err(refused);
                }
                tokio::time::sleep(ASK_AGAIN).await;
            }
            Ok(())
        })?;
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }

    /// What the library alone takes, in milliseconds: a process loads it, initializes it, logs in and ends.
    fn library_alone(&self) -> Result<f64> {
        let began = Instant::now();
        let mut alone = Command::new(env::current_exe()?);
        alone.env("SOFTHSM2_CONF", self.0.path("softhsm2.conf")).env(ALONE, self.0.path("trousseau.toml"));
        let done = alone.status()?;
        if done.success() { Ok(began.elapsed().as_secs_f64() * 1e3) } else { Err(format!("the login: {done}").into()) }
    }

    /// Resident memory after many requests, and its peak, in MiB.
    fn memory(&self, runtime: &Runtime) -> Result<(f64, f64)> {
        let serving = self.0.serve()?;
        runtime.block_on(load(&self.0.connect()?))?;
        let status = fs::read_to_string(format!("/proc/{}/status", serving.0.id()))?;
        let mib = |name: &str| -> Option<f64> {
            let kib: f64 =
                status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok())?;
            Some(kib / 1024.0)
        };
        mib("VmRSS:").zip(mib("VmHWM:")).ok_or_else(|| "proc_pid_status(5) has no VmRSS".into())
    }
}

/// Builds what is packaged. What `cargo bench` has put at the same place unwinds where that aborts, and is larger.
fn release() -> Result<PathBuf> {
    let built = Command::new(env!("CARGO")).args(["build", "--release", "--locked"]).status()?;
    if built.success() { Ok(env!("CARGO_BIN_EXE_trousseau").into()) } else { Err(format!("cargo: {built}").into()) }
}

/// So many Encrypts and so many Decrypts over one connection, a fixed number of them under way at a time.
async fn load(socket: &Path) -> std::result::Result<(), ClientError> {
    let client = Client::connect(socket, PATIENCE).await?;
    let lanes = (0..IN_FLIGHT).map(|_| {
        let mut client = client.clone();
        async move {
            for _ in 0..REQUESTS / IN_FLIGHT {
                let (ciphertext, key_id) = client.encrypt(vec![7; 32]).await?;
                client.decrypt(ciphertext, key_id).await?;
            }
            Ok(())
        }
    });
    try_join_all(lanes).await.map(drop)
}

/// The least, the median and the most of so many starts.
fn starts(start: impl FnMut() -> Result<f64>) -> Result<String> {
    let mut took = repeat_with(start).take(STARTS).collect::<Result<Vec<_>>>()?;
    took.sort_by(f64::total_cmp);
    let at = |index: usize| took.get(index).copied().unwrap_or_default();
    Ok(format!("{:.1} / {:.1} / {:.1} ms", at(0), at(STARTS / 2), at(STARTS - 1)))
}

/// What [`Bench::library_alone`] starts.
fn log_in_alone(configuration: &Path) -> Result<()> {
    let config = Config::load(configuration)?;
    let token = config.pkcs11().next().ok_or("no token is configured")?;
    let library = Pkcs11::new(&token.module)?;
    library.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
    let slot = *library.get_slots_with_token()?.first().ok_or("no slot")?;
    library.open_ro_session(slot)?.login(UserType::User, Some(&token.pin.read()?))?;
    Ok(())
}

fn main() -> Result<()> {
    if let Some(configuration) = env::var_os(ALONE) {
        return log_in_alone(configuration.as_ref());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let bench = Bench(Host::new(release)?);
    let alone = starts(|| bench.library_alone())?;
    let status = starts(|| bench.first_status(&runtime))?;
    let encrypt = starts(|| bench.first_encrypt(&runtime))?;
    let (resident, peak) = bench.memory(&runtime)?;
    let size = fs::metadata(&bench.0.binary)?.len() as f64 / 1e6;
    println!("{}", bench.0.binary.display());
    println!("{:<25} {alone}", "the token's library alone");
    for (what, figure, goal) in [
        ("first Status after exec", status, "10 ms"),
        ("first Encrypt after exec", encrypt, "50 ms"),
        ("memory after the load", format!("{resident:.1} MiB, at most {peak:.1} MiB"), "15 MiB"),
        ("size of the binary", format!("{size:.1} MB"), "10 MB"),
    ] {
        println!("{what:<25} {figure:<32} goal {goal}");
    }
    println!(
        "first answers: least / median / most of {STARTS} starts. The load: {REQUESTS} Encrypts and as many Decrypts,"
    );
    println!("{IN_FLIGHT} under way at a time.");
    Ok(())
}
