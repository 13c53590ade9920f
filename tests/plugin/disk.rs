//! File systems that take nothing, full ones and read-only ones: each is mounted for one plugin alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::family::Family;
use crate::plugin::{Host, Plugin};

/// Whether this process cannot mount anything. It says so.
pub fn lacks_mounts() -> bool {
    match Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]).output() {
        Ok(done) if done.status.success() => return false,
        Ok(done) => eprintln!("skipped: no file system can be mounted: {}", String::from_utf8_lossy(&done.stderr)),
        Err(error) => eprintln!("skipped: unshare(1) of util-linux: {error}"),
    }
    true
}

/// `serve` in a mount namespace of its own, with an empty file system over this directory.
pub fn serve_over(host: &Host, directory: &Path, options: &str) -> Command {
    fs::create_dir_all(directory).unwrap();
    host.shell(&format!(
        "exec unshare -m sh -c 'mount -t tmpfs -o mode=0700,{options} tmpfs {} && exec {} serve --config {}'",
        directory.display(),
        env!("CARGO_BIN_EXE_trousseau"),
        host.path("trousseau.toml").display(),
    ))
}

/// Changes the file system over this directory of a plugin that serves.
pub fn remount(plugin: &Plugin, directory: &Path, options: &str) {
    let (pid, options) = (plugin.pid().to_string(), format!("remount,{options}"));
    let done = Command::new("nsenter").args(["-m", "-t", &pid, "mount", "-o", &options]).arg(directory).output();
    assert!(done.as_ref().is_ok_and(|done| done.status.success()), "{options}: {done:?}");
}

/// Where a plugin's own file systems can be seen from here.
pub fn inside(plugin: &Plugin, directory: &Path) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{}", plugin.pid(), directory.display()))
}

/// A verb in a mount namespace of its own, whose state directory has what it has and takes nothing.
pub fn over_read_only_state(host: &Host, verb: &str) -> Command {
    let (state, config) = (host.path("state").display().to_string(), host.path("trousseau.toml").display().to_string());
    let read_only = format!("mount --bind {state} {state} && mount -o remount,bind,ro {state}");
    let plugin = env!("CARGO_BIN_EXE_trousseau");
    host.shell(&format!("exec unshare -m sh -c '{read_only} && exec {plugin} {verb} --config {config}'"))
}

#[test]
fn a_start_that_the_file_system_forbids_says_where_and_what_to_do() {
    const FULL: &str = "df -i";
    const READ_ONLY: &str = "mounted for writing";
    if lacks_mounts() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let configuration = host.configuration().replace("/kms.sock", "/door/kms.sock");
    host.write_secret("trousseau.toml", &configuration);
    for (directory, options, code, place, remedy) in [
        ("door", "nr_inodes=1", 1, "door/kms.sock.lock: cannot be opened", FULL),
        ("door", "nr_inodes=2", 1, "door/kms.sock: cannot be bound", FULL),
        ("door", "ro", 1, "door/kms.sock.lock: cannot be opened", READ_ONLY),
    ] {
        let done = serve_over(&host, &host.path(directory), options).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{directory} {options}: {said}");
        let place = host.path(place).display().to_string();
        assert!(said.contains(&place) && said.contains(remedy), "{directory} {options}: {said}");
    }
}

#[test]
fn a_state_directory_that_takes_nothing_does_not_keep_a_host_from_booting() {
    if lacks_mounts() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    host.write_configuration();
    let (sealed, key_id) = host.serve_healthy().round_trip();
    let mut plugin = host.start(over_read_only_state(&host, "serve"));
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.decrypt(&sealed, &key_id).unwrap();
    plugin.round_trip();
    plugin.wait_until("the log says so", |plugin| plugin.log().contains("it is kept in memory"));
    let doctor = over_read_only_state(&host, "doctor").output().unwrap();
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.status.code() == Some(1) && said.contains("mounted for writing"), "{said}");
    plugin.stop();

    // Where even the note that a PIN worked is out of reach, none is tried: the socket is served, and says so.
    let mut plugin = host.start(serve_over(&host, &host.path("state"), "ro"));
    let told = |plugin: &Plugin| plugin.status().is_err_and(|answer| answer.message.contains("no PIN is tried"));
    plugin.wait_until("it says what it lacks", told);
}

fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn what_a_full_or_read_only_disk_does_not_take_is_kept_in_memory_and_nothing_is_lost() {
    if Family::chosen().sees_no_new_keys() || lacks_mounts() {
        return;
    }
    for read_only in [false, true] {
        let host = Host::new();
        host.generate("0s");
        host.write_configuration();
        let state = host.path("state");
        let mut plugin = host.start(serve_over(&host, &state, "nr_inodes=100"));
        plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
        let (old, old_key_id) = plugin.round_trip();
        let inside = inside(&plugin, &state);
        plugin.wait_until("its mark is on the disk", |_| inside.join("active.json").exists());
        let kept = files(&inside);
        // The directory itself has an inode too.
        let options = if read_only { "ro".into() } else { format!("nr_inodes={}", kept.len() + 1) };
        remount(&plugin, &state, &options);

        let other = host.other_host();
        other.generate("0s");
        let (new, new_key_id) = other.serve_healthy().round_trip();
        plugin.wait_until("it has learnt the KEK", |plugin| plugin.decrypt(&new, &new_key_id).is_ok());
        plugin.wait_until("it is active", |plugin| plugin.round_trip().1 == new_key_id);
        plugin.decrypt(&old, &old_key_id).unwrap();
        plugin.wait_until("the log says so", |plugin| plugin.log().contains("it is kept in memory"));
        assert_eq!(files(&inside), kept, "{options}");
        assert_eq!(plugin.stop().code(), Some(0));
    }
}
