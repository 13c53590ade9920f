//! The image of `packaging/image.sh`, run as `packaging/static-pod/trousseau.yaml` would run it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use trousseau::service::client::Client;

use crate::machine::{PIN, configuration, image};
use crate::packages::{package, packages};

const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
const PATIENCE: Duration = Duration::from_secs(30);

/// An image of our own, which goes when this is dropped, with what runs of it.
struct Pod {
    image: String,
    container: String,
    host: TempDir,
}

impl Pod {
    fn docker(&self, arguments: &[&str]) -> Output {
        let mounts = ["etc/trousseau", "run/trousseau", "var/lib/trousseau", "tokens"].map(|place| {
            let access = if place.starts_with("etc") { ":ro" } else { "" };
            format!("--volume={}:/{place}{access}", self.host.path().join(place).display())
        });
        let mut command = Command::new("docker");
        command.args(["run", "--network=none", "--read-only", "--cap-drop=ALL", "--user=0:0"]);
        command.args(["--security-opt=no-new-privileges", "--env=SOFTHSM2_CONF=/etc/trousseau/softhsm2.conf"]);
        command.args(mounts).args(arguments).output().unwrap()
    }

    /// Runs a verb beside the one that serves.
    fn verb(&self, verb: &[&str]) -> Output {
        self.docker(&[&["--rm", &self.image], verb].concat())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        for arguments in [["rm", "--force", &self.container], ["rmi", "--force", &self.image]] {
            let done = Command::new("docker").args(arguments).output();
            if thread::panicking() {
                eprintln!("docker {arguments:?}: {done:?}");
            }
        }
    }
}

fn said(done: &Output) -> String {
    String::from_utf8_lossy(&[done.stdout.as_slice(), &done.stderr].concat()).into_owned()
}

#[test]
fn an_image_without_a_shell_serves() {
    let (Some(_), Some(packages)) = (image(), packages()) else { return };
    if !Path::new(MODULE).exists() {
        assert!(std::env::var_os("TROUSSEAU_TEST_REQUIRE").is_none(), "install libsofthsm2");
        eprintln!("skipped: {MODULE} is lacking, which Debian's package libsofthsm2 has");
        return;
    }
    let host = TempDir::new().unwrap();
    let etc = host.path().join("etc/trousseau");
    for place in ["etc/trousseau", "run/trousseau", "var/lib/trousseau", "tokens"] {
        fs::create_dir_all(host.path().join(place)).unwrap();
    }
    let tokens = host.path().join("tokens");
    let made = host.path().join("softhsm2.conf");
    fs::write(&made, format!("directories.tokendir = {}\n", tokens.display())).unwrap();
    let done = Command::new("softhsm2-util")
        .args(["--init-token", "--free", "--label", "trousseau", "--pin", PIN, "--so-pin", "12345678"])
        .env("SOFTHSM2_CONF", &made)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", said(&done));
    fs::write(etc.join("softhsm2.conf"), "directories.tokendir = /tokens\n").unwrap();
    let text = configuration("test").replace("credential:pin", "/etc/trousseau/pin");
    for (file, text) in [("trousseau.toml", text.as_str()), ("pin", PIN)] {
        fs::write(etc.join(file), text).unwrap();
        fs::set_permissions(etc.join(file), fs::Permissions::from_mode(0o600)).unwrap();
    }

    let name = format!("trousseau-pod-test:{}", std::process::id());
    let pod = Pod { image: name.clone(), container: name.replace(':', "-"), host };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/image.sh");
    let deb = package(&packages, 1, ".deb");
    let done = Command::new(script).args(["--library", MODULE]).arg(deb).arg(&name).output().unwrap();
    assert!(done.status.success(), "{}", said(&done));
    for shell in ["/bin/sh", "/bin/bash", "/usr/bin/sh"] {
        let done = pod.docker(&["--rm", "--entrypoint", shell, &name, "-c", "true"]);
        assert!(said(&done).contains("no such file"), "{}", said(&done));
    }

    let done = pod.verb(&["key", "generate", "--activate-in", "0s", "--unsynchronized-clock-ok"]);
    assert!(done.status.success(), "{}", said(&done));
    let done = pod.docker(&["--detach", "--name", &pod.container, &name]);
    assert!(done.status.success(), "{}", said(&done));
    let socket = pod.host.path().join("run/trousseau/kms.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let began = Instant::now();
    loop {
        let answer = runtime.block_on(async {
            let mut client = Client::connect(&socket, Duration::from_secs(5)).await?;
            client.status().await
        });
        match answer {
            Ok(_) => break,
            Err(error) if began.elapsed() > PATIENCE => {
                let log = Command::new("docker").args(["logs", &pod.container]).output().unwrap();
                panic!("{error}: {}", said(&log));
            }
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
    let done = pod.verb(&["probe"]);
    assert!(done.status.success(), "{}", said(&done));
}
