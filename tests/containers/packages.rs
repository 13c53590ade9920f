//! The packages that `packaging/build.sh` and `packaging/build.sh --revision 2` have left in $TROUSSEAU_PACKAGES.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::load::Load;
use crate::machine::{Machine, PIN, configuration, image, skip};
use crate::units::DROP_INS;

/// How one family of hosts handles its packages.
struct Manager {
    /// What the package's file name ends in.
    ending: &'static str,
    install: &'static str,
    upgrade: &'static str,
    remove: &'static str,
}

const DPKG: Manager =
    Manager { ending: ".deb", install: "dpkg --install", upgrade: "dpkg --install", remove: "dpkg --remove trousseau" };
// Its database does not know that Debian's packages provide what this one requires.
const RPM: Manager = Manager {
    ending: ".rpm",
    install: "rpm --install --nodeps",
    upgrade: "rpm --upgrade --nodeps",
    remove: "rpm --erase trousseau",
};
/// What the deb has beside the common list: the rpm's header says the same.
const DEBIANS_OWN: [&str; 2] = ["usr/share/doc/trousseau/changelog.Debian.gz", "usr/share/lintian/overrides/trousseau"];

/// Where the packages are, or why the test is skipped; it says so.
pub fn packages() -> Option<PathBuf> {
    let packages = env::var_os("TROUSSEAU_PACKAGES").map(PathBuf::from);
    if packages.is_none() {
        skip("$TROUSSEAU_PACKAGES, a directory in which packaging/build.sh has built both revisions");
    }
    packages
}

pub fn package(directory: &Path, revision: u8, ending: &str) -> PathBuf {
    let is_wanted = |name: &str| {
        let (_, rest) = name.split_once(concat!(env!("CARGO_PKG_VERSION"), "-")).unwrap_or_default();
        rest.starts_with(&revision.to_string())
            && rest.ends_with(ending)
            && !rest.contains("arm64")
            && !rest.contains("aarch64")
    };
    let mut files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let found = files.find(|file| is_wanted(file.file_name().unwrap().to_str().unwrap()));
    found.unwrap_or_else(|| panic!("{} has no revision {revision} that ends in {ending}", directory.display()))
}

/// What packaging/files lists, by its place: the source, or none of a link.
fn carried() -> BTreeMap<PathBuf, Option<PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = fs::read_to_string(root.join("packaging/files")).unwrap();
    let mut carried = BTreeMap::new();
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [mode, place, source] = words[..] else { continue };
        if mode == "link" {
            carried.insert(PathBuf::from(place), None);
            continue;
        }
        let (directory, pattern) = source.rsplit_once('/').unwrap_or(("", source));
        let (begins, ends) = pattern.split_once('*').unwrap_or((pattern, ""));
        // What is made is not there yet.
        for entry in fs::read_dir(root.join(directory)).into_iter().flatten() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name == pattern || pattern.contains('*') && name.starts_with(begins) && name.ends_with(ends) {
                let place = if place.ends_with('/') { format!("{place}{name}") } else { place.to_owned() };
                carried.insert(PathBuf::from(place), Some(root.join(directory).join(name)));
            }
        }
    }
    carried
}

/// Every page, rule and dashboard that a packaged page links.
#[test]
fn a_link_of_a_packaged_page_leads_to_what_the_packages_carry() {
    let carried = carried();
    let is_meant = |target: &&str| {
        !target.contains("://") && [".md", ".yml", ".yaml", ".json"].iter().any(|ending| target.ends_with(ending))
    };
    let mut links = 0;
    for (place, source) in carried.iter().filter(|(place, _)| place.display().to_string().contains(".md")) {
        let text = fs::read_to_string(source.as_ref().unwrap()).unwrap();
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        for target in targets.filter(is_meant) {
            let above = target.matches("../").count();
            let there = place.ancestors().nth(1 + above).unwrap().join(target.trim_start_matches("../"));
            assert!(carried.contains_key(&there), "{}: {} is not carried", place.display(), there.display());
            links += 1;
        }
    }
    assert!(links > 20, "{links}");
}

#[test]
fn the_deb_is_installed_upgraded_under_load_and_removed() {
    let Some(machine) = live_through(&DPKG) else { return };

    // Whoever comes back to a configuration is served at once.
    machine.run("dpkg --install /packages/*-2_*.deb");
    machine.wait_until("the plugin is well", |machine| machine.status().is_ok());

    // What the plugin noted goes when the package is purged. What others put beside it stays, and is named.
    machine.run("touch /var/lib/trousseau/tpm2_pkcs11.sqlite3");
    let said = machine.run("dpkg --purge trousseau");
    assert!(said.contains("/var/lib/trousseau has files") && said.contains("/etc/trousseau has files"), "{said}");
    assert_eq!(machine.run("ls -A /var/lib/trousseau"), "tpm2_pkcs11.sqlite3");
    assert_eq!(machine.run("ls -A /etc/trousseau"), "pin\ntrousseau.toml");

    // Its enabled units are forgotten as well, and a new installation begins anew, but for what was left.
    machine.run("dpkg --install /packages/*-1_*.deb");
    assert_eq!(machine.run("systemctl is-enabled trousseau.socket trousseau.service || true"), "enabled\ndisabled");
    machine.wait_until("the plugin is well", |machine| machine.status().is_ok());

    // Without one there is nothing to name.
    machine.run("rm -r /etc/trousseau/* /var/lib/trousseau/tpm2_pkcs11.sqlite3");
    let said = machine.run("dpkg --purge trousseau");
    assert!(!said.contains("has files"), "{said}");
    machine.run("test ! -e /etc/trousseau && test ! -e /var/lib/trousseau && test ! -e /var/log/trousseau");
}

#[test]
fn the_rpm_is_installed_upgraded_under_load_and_removed() {
    live_through(&RPM);
}

/// Installs, configures, serves, upgrades, removes.
fn live_through(manager: &Manager) -> Option<Machine> {
    let (image, packages) = (image()?, packages()?);
    let there = |revision| {
        let package = package(&packages, revision, manager.ending);
        format!("/packages/{}", package.file_name().unwrap().to_str().unwrap())
    };
    let machine = Machine::boot_without_plugin(&image, &packages);
    machine.run(&format!("{} {}", manager.install, there(1)));
    let version = machine.run("trousseau --version");
    assert!(version.starts_with(concat!("trousseau ", env!("CARGO_PKG_VERSION"), " (")), "{version}");
    assert!(!version.contains("debug"), "{version}");
    // Debian enables sockets, be it by maintainer script or by preset; nothing serves without a configuration.
    let enabled = "systemctl is-enabled trousseau.socket trousseau.service || true";
    assert_eq!(machine.run(enabled), "enabled\ndisabled");
    machine.run("systemctl start trousseau.socket");
    let active = "systemctl is-active trousseau.socket trousseau.service || true";
    assert_eq!(machine.run(active), "inactive\ninactive");

    // As packaging/README.md says.
    let mine = format!(
        "{}[listen]\ngroup = \"trousseau-clients\"\n[observe]\nhttp = \"127.0.0.1:9990\" # This is mine.\n",
        configuration("test")
    );
    machine.run(&format!(
        "cat >/etc/trousseau/trousseau.toml <<'end'\n{mine}end
         (umask 077 && echo {PIN} >/etc/trousseau/pin)
         mkdir -p /etc/systemd/system/trousseau.service.d
         cp /usr/share/trousseau/drop-ins/softhsm.conf /usr/share/trousseau/drop-ins/metrics.conf \\
             /etc/systemd/system/trousseau.service.d
         systemctl daemon-reload
         systemctl enable --now trousseau.socket trousseau.service"
    ));
    machine.make_token();
    machine.wait_until("the plugin is well", |machine| machine.status().is_ok());

    // As root, who may read what the API server is told.
    let doctor = "systemd-run --pipe --wait -q -p LoadCredential=pin:/etc/trousseau/pin trousseau doctor";
    let findings = machine.run(doctor);
    assert!(!findings.contains("FAILURE") && findings.contains("answers: key_id"), "{findings}");
    let ready = "exec 3<>/dev/tcp/127.0.0.1/9990; printf 'GET /readyz HTTP/1.0\\r\\n\\r\\n' >&3; head -n 1 <&3";
    let ready = || machine.run(&format!("timeout 5 bash -c \"{ready}\""));
    assert!(ready().contains("200 OK"), "{}", ready());

    let load = Load::begin(machine.socket());
    let (pid, socket) = (machine.show("MainPID"), fs::metadata(machine.socket()).unwrap().ino());
    machine.run(&format!("{} {}", manager.upgrade, there(2)));
    machine.wait_until("the new version serves", |machine| {
        machine.show("MainPID") != pid && machine.show("ActiveState") == "active"
    });
    load.goes_on();
    assert_eq!(load.end(), []);
    assert_eq!(fs::metadata(machine.socket()).unwrap().ino(), socket, "the socket is another one");
    assert_eq!(machine.run("cat /etc/trousseau/trousseau.toml"), mine.trim());
    assert_eq!(machine.run(enabled), "enabled\nenabled");
    assert!(ready().contains("200 OK"), "{}", ready());

    machine.run(manager.remove);
    assert_eq!(machine.run(active), "inactive\ninactive");
    assert!(!machine.socket().exists(), "the socket is left");
    machine.run("test ! -e /usr/bin/trousseau && test ! -e /usr/share/trousseau");
    assert_eq!(machine.run("cat /etc/trousseau/trousseau.toml"), mine.trim());
    machine.run("test -e /var/lib/trousseau/active.json");
    Some(machine)
}

#[test]
fn both_packages_carry_the_same() {
    let Some(packages) = packages() else { return };
    let unpacked = |ending: &str, command: &str| {
        let directory = TempDir::new().unwrap();
        let done = Command::new("bash")
            .args(["-o", "pipefail", "-c", command, "bash"])
            .arg(package(&packages, 1, ending))
            .arg(directory.path())
            .output()
            .unwrap();
        assert!(done.status.success(), "{command}: {}", String::from_utf8_lossy(&done.stderr));
        let mut files = BTreeMap::new();
        list(directory.path(), directory.path(), &mut files);
        files
    };
    let mut deb = unpacked(".deb", r#"dpkg-deb --extract "$1" "$2""#);
    let rpm = unpacked(".rpm", r#"rpm2archive -n - <"$1" | tar -C "$2" -xp"#);
    for own in DEBIANS_OWN {
        assert!(deb.remove(own).is_some(), "the deb lacks {own}");
    }
    assert_eq!(deb.keys().collect::<Vec<_>>(), rpm.keys().collect::<Vec<_>>());
    for (name, of_deb) in &deb {
        assert!(rpm[name] == *of_deb, "{name} is not the same in both");
    }
    let documentation = |name: &str| uncompressed(&deb[&format!("usr/share/doc/trousseau/{name}.gz")].1);
    let bill: serde_json::Value = serde_json::from_str(&documentation("sbom.cdx.json")).unwrap();
    let crates = bill["components"].as_array().unwrap();
    assert!(crates.iter().any(|part| part["name"] == "cryptoki"), "{bill}");
    let licences = documentation("licences.txt");
    for part in crates {
        let name = format!("{} {}: ", part["name"].as_str().unwrap(), part["version"].as_str().unwrap());
        assert!(licences.contains(&name), "{name} has no licence");
    }
    let size: usize = deb.values().map(|(_, content)| content.len()).sum();
    assert!(size < 15_000_000, "{size} bytes are installed");
    // Everything that the list names has come in: no pattern of it was empty.
    let some =
        ["bin/trousseau", "share/man/man1/trousseau-key-generate.1.gz", "share/trousseau/hsm-profiles/luna.toml"];
    let drop_ins = DROP_INS.map(|(name, _)| format!("share/trousseau/drop-ins/{name}.conf"));
    for name in some.map(str::to_owned).into_iter().chain(drop_ins) {
        assert!(deb.contains_key(&format!("usr/{name}")), "{name} is missing");
    }
}

fn uncompressed(content: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), content).unwrap();
    String::from_utf8(Command::new("gzip").arg("-dc").stdin(file.reopen().unwrap()).output().unwrap().stdout).unwrap()
}

/// Each file and link below, with its mode and what is in it.
fn list(root: &Path, directory: &Path, files: &mut BTreeMap<String, (u32, Vec<u8>)>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            list(root, &path, files);
            continue;
        }
        let content = if meta.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
        } else {
            fs::read(&path).unwrap()
        };
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        files.insert(name, (meta.permissions().mode(), content));
    }
}
