//! A container that is set up by hand as the units' comments say, or bare, and booted.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use testcontainers::core::{AccessMode, ExecCommand, Mount};
use testcontainers::runners::SyncRunner;
use testcontainers::{Container, GenericImage, ImageExt};
use trousseau::service::client::{Client, ClientError, PluginStatus};

use crate::load::SEED;

/// No wait for a condition lasts longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// The token's PIN, until a test changes it.
pub const PIN: &str = "k7Q2x9Wd";
/// What one of them changes it to.
pub const NEW_PIN: &str = "v5T8m3Rz";
/// Becomes systemd.
const BOOT: &str = "
    set -e
    # systemd needs shared mounts, else LoadCredential= gives an empty directory, and a control group to write to.
    mount --make-rshared /
    for cgroup in /sys/fs/cgroup /sys/fs/cgroup/systemd; do
        if test -e $cgroup/cgroup.procs; then mount -o remount,bind,rw $cgroup; fi
    done
    chgrp softhsm /var/lib/softhsm/tokens
    chmod 2770 /var/lib/softhsm/tokens
    exec /sbin/init";
/// Before that, what is installed by hand.
const ENABLE: &str = "
    systemd-sysusers
    systemctl enable trousseau.socket trousseau.service kubelet.service k3s.service rke2-server.service";
/// What starts the API server, of which a host has one.
pub const STARTERS: [&str; 3] = ["kubelet.service", "k3s.service", "rke2-server.service"];

/// The image, or why the test is skipped; it says so.
pub fn image() -> Option<String> {
    let image = env::var("TROUSSEAU_CONTAINER_IMAGE").ok();
    if image.is_none() {
        skip("$TROUSSEAU_CONTAINER_IMAGE, which tests/containers/run.sh sets");
    }
    image
}

/// Says that a test is skipped, and for want of what. Where everything is meant to be there it fails instead; but whoever
/// has found that no container can run here, or runs them apart, has put that into $TROUSSEAU_CONTAINERS_LACK.
pub fn skip(lack: &str) {
    let known = env::var("TROUSSEAU_CONTAINERS_LACK").ok();
    assert!(known.is_some() || env::var_os("TROUSSEAU_TEST_REQUIRE").is_none(), "lacking: {lack}");
    eprintln!("skipped: containers lack {}", known.as_deref().unwrap_or(lack));
}

/// A booted host. It is ended when this is dropped, and its journal is shown if the test has failed.
pub struct Machine {
    container: Container<GenericImage>,
    directory: TempDir,
    /// Its /run/trousseau.
    run: TempDir,
    tokens: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Machine {
    /// Boots with no token.
    pub fn boot(image: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let tokens = directory.path().join("tokens");
        fs::create_dir(&tokens).unwrap();
        Self::boot_in(directory, tokens, image)
    }

    /// Boots with the same tokens, and nothing else in common.
    pub fn boot_beside(&self, image: &str) -> Self {
        Self::boot_in(TempDir::new().unwrap(), self.tokens.clone(), image)
    }

    /// Boots, makes a token with a KEK, and waits until the plugin is well.
    pub fn boot_with_token(image: &str) -> Self {
        let machine = Self::boot(image);
        machine.make_token();
        machine.wait_until("the plugin is well", |machine| machine.status().is_ok());
        machine
    }

    fn boot_in(directory: TempDir, tokens: PathBuf, image: &str) -> Self {
        let path = directory.path();
        for name in ["etc", "drop-ins"] {
            fs::create_dir(path.join(name)).unwrap();
            fs::set_permissions(path.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
        let packaged = repository.join("packaging/systemd");
        fs::copy(packaged.join("drop-ins/softhsm.conf"), path.join("drop-ins/softhsm.conf")).unwrap();
        write(&path.join("etc/pin"), PIN, 0o600);
        write(&path.join("etc/trousseau.toml"), &configuration("test"), 0o644);
        let system = "/etc/systemd/system";
        let mut mounts = vec![
            (path.join("etc"), "/etc/trousseau".to_owned()),
            (path.join("drop-ins"), format!("{system}/trousseau.service.d")),
            (env!("CARGO_BIN_EXE_trousseau").into(), "/usr/bin/trousseau".to_owned()),
            (packaged.join("trousseau.service"), format!("{system}/trousseau.service")),
            (packaged.join("trousseau.socket"), format!("{system}/trousseau.socket")),
            (packaged.join("sysusers.d/trousseau.conf"), "/etc/sysusers.d/trousseau.conf".to_owned()),
        ];
        let stand_in = repository.join("tests/containers/stand-in.service");
        mounts.extend(STARTERS.map(|unit| (stand_in.clone(), format!("{system}/{unit}"))));
        Self::start(directory, tokens, image, &format!("{ENABLE}{BOOT}"), mounts)
    }

    /// Boots a host without the plugin, where the packages lie in /packages.
    pub fn boot_without_plugin(image: &str, packages: &Path) -> Self {
        let directory = TempDir::new().unwrap();
        let tokens = directory.path().join("tokens");
        fs::create_dir(&tokens).unwrap();
        Self::start(directory, tokens, image, BOOT, vec![(packages.to_owned(), "/packages".to_owned())])
    }

    fn start(
        directory: TempDir,
        tokens: PathBuf,
        image: &str,
        script: &str,
        mut mounts: Vec<(PathBuf, String)>,
    ) -> Self {
        // In memory as it is on a host, and as the socket unit would make it.
        let run = TempDir::new_in("/dev/shm").unwrap();
        fs::set_permissions(run.path(), fs::Permissions::from_mode(0o755)).unwrap();
        mounts.push((run.path().to_owned(), "/run/trousseau".to_owned()));
        mounts.push((tokens.clone(), "/var/lib/softhsm/tokens".to_owned()));
        let (name, tag) = image.split_once(':').unwrap();
        let mut request = GenericImage::new(name, tag)
            .with_cmd(["sh", "-c", script])
            .with_env_var("container", "docker") // systemd then leaves alone what is the host's
            .with_network("none")
            .with_cap_add("SYS_ADMIN")
            .with_cap_add("NET_ADMIN")
            .with_security_opt("seccomp=unconfined")
            .with_security_opt("apparmor=unconfined");
        for place in ["/run", "/run/lock", "/tmp"] {
            request = request.with_mount(Mount::tmpfs_mount(place).with_mode(0o755));
        }
        for (here, there) in mounts {
            // Nothing in a container may change the repository.
            let mode = if here.is_dir() { AccessMode::ReadWrite } else { AccessMode::ReadOnly };
            request = request.with_mount(Mount::bind_mount(here.display().to_string(), there).with_access_mode(mode));
        }
        let container = request.start().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let machine = Self { container, directory, run, tokens, runtime };
        machine.wait_until("systemd is up", Self::is_up);
        machine
    }

    /// Makes a token, and in it a KEK that is active at once.
    pub fn make_token(&self) {
        self.run_as_service(&format!(
            "softhsm2-util --init-token --free --label trousseau --pin {PIN} --so-pin 12345678"
        ));
        // SoftHSM fails now and then when two processes meet a new token at the same time.
        self.wait_until("the service has found the token", |machine| {
            machine.status().is_err_and(|why| why.to_string().contains("has no KEK"))
        });
        self.run_as_service("trousseau key generate --activate-in 0s --unsynchronized-clock-ok");
    }

    /// Runs a command beside the service, in the way that the unit's comments give.
    pub fn run_as_service(&self, command: &str) -> String {
        self.run(&format!(
            "systemd-run --pipe --wait --quiet -p User=trousseau -p StateDirectory=trousseau \
             -p LoadCredential=pin:/etc/trousseau/pin -p SupplementaryGroups=softhsm {command}"
        ))
    }

    /// Has all of its processes stand still, while its clocks go on.
    pub fn freeze(&self) {
        self.docker("pause");
    }

    pub fn thaw(&self) {
        self.docker("unpause");
    }

    /// Ends all of its processes at once, as if its power failed.
    pub fn cut_power(&self) {
        self.docker("kill");
    }

    /// Boots it again, with the disk that it had.
    pub fn boot_again(&self) {
        self.docker("start");
        self.wait_until("systemd is up", Self::is_up);
    }

    fn is_up(&self) -> bool {
        self.try_run("systemctl is-system-running").is_ok()
    }

    fn docker(&self, verb: &str) {
        let done = Command::new("docker").args([verb, self.container.id()]).output().unwrap();
        assert!(done.status.success(), "docker {verb}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// Takes the tokens away, or brings them back.
    pub fn move_tokens(&self, away: bool) {
        let mut places = [self.tokens.clone(), self.directory.path().join("away")];
        if !away {
            places.reverse();
        }
        fs::create_dir_all(&places[1]).unwrap();
        for token in fs::read_dir(&places[0]).unwrap() {
            let token = token.unwrap();
            fs::rename(token.path(), places[1].join(token.file_name())).unwrap();
        }
    }

    /// What the script printed, both streams.
    pub fn run(&self, script: &str) -> String {
        self.try_run(script).unwrap_or_else(|said| panic!("{script}: {said}"))
    }

    /// What the script printed, as an error if it failed.
    pub fn try_run(&self, script: &str) -> Result<String, String> {
        let command = ["timeout", "60", "sh", "-c", &format!("exec 2>&1; {script}")];
        let mut running = self.container.exec(ExecCommand::new(command)).map_err(|error| error.to_string())?;
        let said = String::from_utf8(running.stdout_to_vec().unwrap()).unwrap().trim().to_owned();
        let ended = Instant::now();
        while ended.elapsed() < PATIENCE {
            match running.exit_code().unwrap() {
                Some(0) => return Ok(said),
                Some(_) => return Err(said),
                None => thread::sleep(Duration::from_millis(1)), // Docker takes note a little later
            }
        }
        Err(format!("Docker knows of no end of it; it said: {said}"))
    }

    /// A property of the service.
    pub fn show(&self, property: &str) -> String {
        self.run(&format!("systemctl show -P {property} trousseau.service"))
    }

    pub fn journal(&self) -> String {
        self.run("journalctl --no-pager -o cat -u trousseau.service")
    }

    pub fn wait_until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let began = Instant::now();
        while !condition(self) {
            assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// A file of /etc/trousseau.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.directory.path().join("etc").join(name);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        write(&path, text, mode);
    }

    pub fn socket(&self) -> PathBuf {
        self.run.path().join("kms.sock")
    }

    pub fn status(&self) -> Result<PluginStatus, ClientError> {
        self.call(async |client| client.status().await)
    }

    pub fn encrypt(&self, plaintext: &[u8]) -> (Vec<u8>, String) {
        self.call(async |client| client.encrypt(plaintext.to_vec()).await).unwrap()
    }

    pub fn decrypt(&self, ciphertext: &[u8], key_id: &str) -> Vec<u8> {
        self.call(async |client| client.decrypt(ciphertext.to_vec(), key_id.to_owned()).await).unwrap()
    }

    fn call<T>(&self, call: impl AsyncFnOnce(&mut Client) -> Result<T, ClientError>) -> Result<T, ClientError> {
        self.runtime.block_on(async {
            let mut client = Client::connect(&self.socket(), Duration::from_secs(10)).await?;
            call(&mut client).await
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() {
            let script =
                "systemctl status --no-pager -n 0 'trousseau.*'; journalctl --no-pager -n 300 -u 'trousseau.*'";
            eprintln!("{}", self.try_run(script).unwrap_or_else(|said| said));
            return;
        }
        // Of a machine that is no more there is nothing to read.
        let said = self.try_run("journalctl --no-pager -o cat -u 'trousseau.*'").unwrap_or_default();
        for secret in [PIN.as_bytes(), NEW_PIN.as_bytes(), SEED] {
            let shown = String::from_utf8_lossy(secret);
            assert!(!said.contains(&*shown), "the journal shows {shown}:\n{said}");
        }
    }
}

/// A configuration that serves this cluster.
pub fn configuration(cluster: &str) -> String {
    format!(
        r#"version = "v1"
[keyring]
cluster = "{cluster}"
[[provider]]
name = "hsm"
type = "pkcs11"
profile = "softhsm"
tokens = ["pkcs11:token=trousseau"]
label = "trousseau-test"
pin-file = "credential:pin"
"#
    )
}

fn write(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}
