//! The machine: its clock, its limits, SELinux, and the order in which systemd starts things.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::Findings;
use crate::cli::key::clock_is_synchronized;
use crate::config::DEFAULT_PATH;

const HOST: &str = "host";

/// What starts an API server, and so must start after us.
const AFTER_US: [&str; 3] = ["kubelet.service", "k3s.service", "rke2-server.service"];

/// Every DEK of the moment lies in memory of its own that is locked, a page at most.
const MEMLOCK: u64 = 1 << 20;

pub(super) fn examine(config: &Path, findings: &mut Findings) {
    judge_clock(clock_is_synchronized(), findings);
    // The limits are those of the process that serves, if it can be seen, else of this one.
    let plugin = plugin(config);
    let process = plugin.as_ref().map_or("/proc/self", |plugin| plugin.path.as_str());
    let limits = fs::read_to_string(format!("{process}/limits")).unwrap_or_default();
    judge_limits(&limits, plugin.as_ref().map(|plugin| plugin.pid.as_str()), findings);
}

fn judge_clock(is_synchronized: Option<bool>, findings: &mut Findings) {
    match is_synchronized {
        Some(true) => findings.good(HOST, "the clock is synchronized"),
        // Nothing is wrong with that, and nothing can be done about it here.
        None => findings
            .good(HOST, "whether the clock is synchronized cannot be seen here: `timedatectl` on the host tells"),
        Some(false) => findings.warning(
            HOST,
            "the clock is not synchronized: a new KEK would become active here at another moment than elsewhere",
            "start chrony or systemd-timesyncd",
        ),
    }
}

/// `limits` are those of the plugin with this pid, or of this process.
fn judge_limits(limits: &str, plugin: Option<&str>, findings: &mut Findings) {
    let of = plugin.map_or_else(|| "this process".to_owned(), |pid| format!("the serving plugin (pid {pid})"));
    if let Some(limit) = soft_limit(limits, "Max locked memory") {
        match limit < MEMLOCK {
            true => findings.warning(
                HOST,
                format!("{of} may lock {limit} bytes of memory: data keys may reach swap"),
                "set LimitMEMLOCK=8M in the unit, or swap nothing",
            ),
            false => findings.good(HOST, format!("{of} may lock enough memory for its data keys")),
        }
    }
    match soft_limit(limits, "Max core file size").filter(|_| plugin.is_some()) {
        Some(0) => findings.good(HOST, format!("{of} leaves no core file")),
        Some(_) => findings.failure(
            HOST,
            format!("{of} may leave a core file, with the PIN and data keys in it"),
            "set LimitCORE=0 in the unit",
        ),
        None => (),
    }
}

/// The process that serves by this configuration, if it can be seen.
pub(super) fn plugin(config: &Path) -> Option<Process> {
    processes("trousseau").into_iter().find(|process| serves(&arguments(&process.path), config))
}

/// The user as whom a process works (proc_pid_status(5)): its directory belongs to root, since none of its user's may
/// look into it.
pub(super) fn user(process: &Process) -> Option<u32> {
    let status = fs::read_to_string(format!("{}/status", process.path)).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

/// A process, by its directory under /proc.
pub(super) struct Process {
    /// As comm(5) cuts it.
    pub(super) name: String,
    pub(super) pid: String,
    pub(super) path: String,
}

/// The processes of this name, as comm(5) cuts it.
pub(super) fn processes(name: &str) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let named =
        |entry: &fs::DirEntry| fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name);
    let process = |entry: fs::DirEntry| {
        let pid = entry.file_name().into_string().ok()?;
        let (name, path) = (name.to_owned(), format!("/proc/{pid}"));
        pid.bytes().all(|digit| digit.is_ascii_digit()).then_some(Process { name, pid, path })
    };
    entries.filter(named).filter_map(process).collect()
}

/// The arguments of a process.
pub(super) fn arguments(process: &str) -> Vec<String> {
    let line = fs::read(Path::new(process).join("cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).map(|argument| String::from_utf8_lossy(argument).into_owned()).collect()
}

/// Whether these are the arguments of a plugin that serves by this configuration.
fn serves(arguments: &[String], config: &Path) -> bool {
    let named = arguments.iter().zip(1..).find_map(|(argument, next)| match argument.strip_prefix("--config") {
        Some("") => arguments.get(next).map(String::as_str),
        Some(joined) => joined.strip_prefix('='),
        None => None,
    });
    let named = named.unwrap_or(DEFAULT_PATH);
    arguments.get(1).is_some_and(|verb| verb == "serve") && Path::new(named) == config
}

/// A soft limit of proc_pid_limits(5).
fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    let soft = limits.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?;
    if soft == "unlimited" { Some(u64::MAX) } else { soft.parse().ok() }
}

/// Under systemd, the unit must be ordered before what starts the API server.
pub(super) fn examine_unit(findings: &mut Findings) {
    let properties = ["show", "trousseau.service", "--property=LoadState,Before"];
    let Ok(answer) = Command::new("systemctl").args(properties).output() else { return };
    judge_unit(&String::from_utf8_lossy(&answer.stdout), findings);
}

/// By what `systemctl show` says of it.
fn judge_unit(shown: &str, findings: &mut Findings) {
    if !shown.contains("LoadState=loaded") {
        return; // not run by systemd, or not by this one
    }
    let before: BTreeSet<&str> =
        shown.lines().filter_map(|line| line.strip_prefix("Before=")).flat_map(str::split_whitespace).collect();
    match AFTER_US.iter().find(|unit| !before.contains(*unit)) {
        None => findings.good("unit", "trousseau.service starts before kubelet, k3s and rke2-server"),
        Some(unit) => {
            let what = format!("trousseau.service is not ordered before {unit}: a boot may wait for what waits for it");
            findings.failure("unit", what, format!("add Before={unit} to the unit and `systemctl daemon-reload`"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Finding;
    use crate::cli::doctor::Severity::{self, Failure, Good, Warning};

    /// That these are the findings: of each its severity, and words of it or of its remedy.
    fn assert_found(case: &str, judge: impl FnOnce(&mut Findings), expected: &[(Severity, &str)]) {
        let mut findings = Findings::default();
        judge(&mut findings);
        let is_as = |(finding, (severity, words)): (&Finding, &(Severity, &str))| {
            finding.severity == *severity && format!("{} -> {}", finding.what, finding.remedy).contains(words)
        };
        let Findings(found) = findings;
        assert!(found.len() == expected.len() && found.iter().zip(expected).all(is_as), "{case}: {found:#?}");
    }

    #[test]
    fn a_clock_that_is_not_synchronized_is_a_warning_and_one_that_cannot_be_seen_none() {
        for (is_synchronized, severity, words) in [
            (Some(true), Good, "the clock is synchronized"),
            (None, Good, "cannot be seen here"),
            (Some(false), Warning, "start chrony"),
        ] {
            let judge = |findings: &mut Findings| judge_clock(is_synchronized, findings);
            assert_found(&format!("{is_synchronized:?}"), judge, &[(severity, words)]);
        }
    }

    #[test]
    fn limits_that_let_secrets_reach_a_disk_are_told_of_whoever_has_them() {
        let locks = |bytes| format!("Max locked memory         {bytes}  {bytes}  bytes\n");
        let core = |bytes| format!("Max core file size        {bytes}  unlimited  bytes\n");
        let enough = (Good, "may lock enough memory");
        for (limits, plugin, expected) in [
            (locks("8388608") + &core("0"), Some("7"), &[enough, (Good, "(pid 7) leaves no core file")][..]),
            (locks("unlimited") + &core("unlimited"), Some("7"), &[enough, (Failure, "set LimitCORE=0")]),
            (locks("1048576") + &core("1"), Some("7"), &[enough, (Failure, "with the PIN and data keys in it")]),
            (locks("1048575"), Some("7"), &[(Warning, "(pid 7) may lock 1048575 bytes of memory")]),
            // It is not this process that keeps a PIN for long.
            (locks("65536") + &core("1"), None, &[(Warning, "this process may lock 65536")]),
            (String::new(), Some("7"), &[]),
        ] {
            assert_found(&limits, |findings| judge_limits(&limits, plugin, findings), expected);
        }
    }

    #[test]
    fn a_unit_that_starts_after_what_waits_for_it_is_a_failure() {
        let good = (Good, "starts before kubelet, k3s and rke2-server");
        for (shown, expected) in [
            ("LoadState=loaded\nBefore=kubelet.service k3s.service shutdown.target rke2-server.service", &[good][..]),
            ("Before=rke2-server.service kubelet.service k3s.service\nLoadState=loaded", &[good]),
            ("LoadState=loaded\nBefore=kubelet.service k3s.service", &[(Failure, "add Before=rke2-server.service")]),
            (
                "LoadState=loaded\nBefore=kubelet.service.d k3s.service rke2-server.service",
                &[(Failure, "add Before=kubelet.service")],
            ),
            ("LoadState=loaded\nBefore=", &[(Failure, "add Before=kubelet.service")]),
            ("LoadState=not-found\nBefore=", &[]),
            ("", &[]),
        ] {
            assert_found(shown, |findings| judge_unit(shown, findings), expected);
        }
    }

    #[test]
    fn a_plugin_is_known_by_its_configuration() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        for (arguments, config, is_it) in [
            ("trousseau serve", DEFAULT_PATH, true),
            ("trousseau serve --config /a.toml", "/a.toml", true),
            ("trousseau serve --config /a.toml", DEFAULT_PATH, false),
            ("trousseau serve --config=/a.toml", "/a.toml", true),
            ("trousseau serve --config=/a.toml", DEFAULT_PATH, false),
            ("trousseau doctor --config /a.toml", "/a.toml", false),
            ("trousseau serve --config", "/a.toml", false),
        ] {
            assert_eq!(serves(&words(arguments), Path::new(config)), is_it, "{arguments}");
        }
    }

    #[test]
    fn limits_are_read_as_the_kernel_writes_them() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max core file size        0                    unlimited            bytes     \n\
                      Max locked memory         8388608              8388608              bytes     \n\
                      Max file locks            unlimited            unlimited            locks     \n";
        for (name, limit) in [
            ("Max core file size", Some(0)),
            ("Max locked memory", Some(8_388_608)),
            ("Max file locks", Some(u64::MAX)),
            ("Max nonsense", None),
        ] {
            assert_eq!(soft_limit(limits, name), limit, "{name}");
        }
        let own = fs::read_to_string("/proc/self/limits").unwrap_or_default();
        assert!(soft_limit(&own, "Max locked memory").is_some(), "{own}");
    }
}
