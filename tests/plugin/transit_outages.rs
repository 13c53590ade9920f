//! OpenBao sealed, stopped, silent and back: what the plugin says meanwhile, and how soon it is well again.

use std::time::{Duration, Instant};

use tonic::Code;

use crate::caller::Request;
use crate::observe::{OBSERVED, wait_for_samples};
use crate::plugin::Plugin;
use crate::transit::{KEY, Site, under_load};

/// The deadline that the plugin gives a request, and something for a busy machine.
const DEADLINE: Duration = Duration::from_millis(3800);
/// From OpenBao's return to the plugin's.
const HEALS: Duration = Duration::from_secs(3);

/// How long it takes until the plugin is well.
fn heals(plugin: &mut Plugin, case: &str) {
    let began = Instant::now();
    plugin.wait_until(&format!("it is healthy: {case}"), |plugin| plugin.status().is_ok());
    plugin.round_trip();
    eprintln!("{case}: healed after {:?}", began.elapsed());
    assert!(began.elapsed() < HEALS, "{case}: {:?}", began.elapsed());
}

/// Requests failed, all in time and by these codes.
fn assert_failed_in_order(requests: &[Request], codes: &[Code], case: &str) {
    let failed: Vec<&Request> = requests.iter().filter(|request| request.outcome.is_err()).collect();
    eprintln!("{case}: {} of {} failed", failed.len(), requests.len());
    assert!(!failed.is_empty(), "{case}: none failed");
    for request in failed {
        let error = request.outcome.as_ref().unwrap_err();
        assert!(error.code().is_some_and(|code| codes.contains(&code)), "{case}: {error}");
        assert!(request.took < DEADLINE, "{case}: {:?}: {error}", request.took);
    }
}

#[test]
fn sealed_at_the_start_is_said_and_unsealed_is_noticed() {
    let Some(site) = Site::new() else { return };
    site.bao.seal();
    let mut plugin = site.host.serve();
    plugin.wait_until("Status names the seal", |plugin| {
        plugin
            .status()
            .is_err_and(|answer| answer.code == Code::Unavailable && answer.message.contains("is sealed: unseal it"))
    });
    let said = plugin.encrypt(b"seed").unwrap_err();
    assert_eq!((said.code, said.message.contains("the object is intact")), (Code::Unavailable, true), "{said:?}");
    site.bao.unseal();
    heals(&mut plugin, "sealed at the start");
}

#[test]
fn sealed_stopped_and_silent_under_load_it_fails_in_time_and_heals() {
    let Some(mut site) = Site::new() else { return };
    let mut plugin = site.host.serve_healthy();

    let (requests, ()) = under_load(&plugin, |load| {
        site.bao.seal();
        load.goes_on(100);
        site.bao.unseal();
        wait_for_success(load);
    });
    assert_failed_in_order(&requests, &[Code::Unavailable], "sealed");
    heals(&mut plugin, "sealed");

    let (requests, ()) = under_load(&plugin, |load| {
        site.bao.stop();
        std::thread::sleep(Duration::from_secs(5)); // by now it is tried as seldom as ever
        site.bao.start_again();
        load.goes_on(100);
        site.bao.unseal();
        wait_for_success(load);
    });
    assert_failed_in_order(&requests, &[Code::Unavailable], "stopped");
    heals(&mut plugin, "stopped");

    let (requests, ()) = under_load(&plugin, |load| {
        site.bao.pause();
        load.goes_on(100);
        site.bao.resume();
        wait_for_success(load);
    });
    assert_failed_in_order(&requests, &[Code::Unavailable, Code::DeadlineExceeded], "silent");
    heals(&mut plugin, "silent");
}

/// Until requests succeed again.
fn wait_for_success(load: &crate::caller::Load<'_>) {
    let began = Instant::now();
    while !load.last_succeeded() {
        assert!(began.elapsed() < 2 * HEALS, "it does not heal");
        std::thread::sleep(Duration::from_millis(5));
    }
    eprintln!("requests succeed after {:?}", began.elapsed());
}

#[test]
fn each_loss_is_counted_once_by_its_class() {
    type Change = fn(&mut Site);
    let cases: [(&str, &str, Change, Change); 4] = [
        ("sealed", "sealed", |site| site.bao.seal(), |site| site.bao.unseal()),
        (
            "stopped",
            "unreachable",
            |site| site.bao.stop(),
            |site| {
                site.bao.start_again();
                site.bao.unseal();
            },
        ),
        ("silent", "late", |site| site.bao.pause(), |site| site.bao.resume()),
        (
            "revoked",
            "login",
            |site| site.bao.revoke(&std::fs::read_to_string(site.host.path("vault-token")).unwrap()),
            |site| site.host.write_secret("vault-token", &site.bao.token(KEY, "10m")),
        ),
    ];
    let Some(mut site) = Site::new() else { return };
    site.host.extra = OBSERVED.into();
    let mut plugin = site.host.serve_healthy();
    let labels = format!("provider=\"vault\",token=\"{}\"", site.bao.root.address);
    let mut losses: Vec<(String, f64)> = Vec::new();
    for (case, class, breaks, mends) in cases {
        breaks(&mut site);
        plugin.wait_until(case, |plugin| plugin.status().is_err() || plugin.encrypt(b"seed").is_err());
        plugin.wait_until(case, |plugin| plugin.status().is_err());
        losses.push((format!("trousseau_losses_total{{{labels},class=\"{class}\"}}"), 1.0));
        let is_up = (format!("trousseau_token_up{{{labels}}}"), 0.0);
        wait_for_samples(&mut plugin, &[&losses[..], &[is_up]].concat());
        mends(&mut site);
        plugin.wait_until(case, |plugin| plugin.status().is_ok() && plugin.encrypt(b"seed").is_ok());
    }
    wait_for_samples(&mut plugin, &losses);
}
