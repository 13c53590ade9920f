//! Tokens of OpenBao that end, or are revoked, while the plugin is under load.

use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::transit::{KEY, Site, assert_all_succeeded, under_load};

fn site_with_approle(ttl: &serde_json::Value) -> Option<Site> {
    let mut site = Site::new()?;
    let approle = site.bao.approle(KEY, ttl);
    site.host.write_secret("role-id", &approle.role_id);
    site.host.write_secret("secret-id", &approle.secret_id);
    let auth = site.with_files(r#"{ method = "approle", role-id-file = "%/role-id", secret-id-file = "%/secret-id" }"#);
    site.set("auth", auth);
    Some(site)
}

/// In this time a token of the shortest kind is renewed, reaches its greatest age, and is replaced, more than once.
#[test]
fn tokens_are_renewed_and_replaced_before_they_end() {
    let Some(site) = site_with_approle(&json!({"token_ttl": "2s", "token_max_ttl": "6s"})) else { return };
    let plugin = site.host.serve_healthy();
    let (requests, ()) = under_load(&plugin, |_| thread::sleep(Duration::from_secs(14)));
    assert_all_succeeded(&requests, "tokens ended");
}

#[test]
fn tokens_that_are_revoked_are_replaced_within_the_requests() {
    let Some(site) = site_with_approle(&json!({"token_ttl": "1m"})) else { return };
    let plugin = site.host.serve_healthy();
    let (requests, ()) = under_load(&plugin, |load| {
        // A young one is thought to be unknown to a standby at first.
        for age in [2500, 300, 0] {
            thread::sleep(Duration::from_millis(age));
            site.bao.revoke_logins("approle");
            load.goes_on(20);
        }
    });
    assert_all_succeeded(&requests, "tokens were revoked");
}

#[test]
fn a_token_file_is_replaced_in_time_or_its_requests_fail_until_it_is() {
    let Some(site) = Site::new() else { return };
    let mut plugin = site.host.serve_healthy();
    let revoke_after = |load: &crate::caller::Load<'_>, replace: bool| {
        let old = std::fs::read_to_string(site.host.path("vault-token")).unwrap();
        if replace {
            site.host.write_secret("vault-token", &site.bao.token(KEY, "10m"));
        }
        site.bao.revoke(&old);
        load.goes_on(20);
    };
    thread::sleep(Duration::from_millis(2500));
    let (requests, ()) = under_load(&plugin, |load| revoke_after(load, true));
    assert_all_succeeded(&requests, "the token's file had another one already");
    thread::sleep(Duration::from_millis(2500));
    let (requests, ()) = under_load(&plugin, |load| revoke_after(load, false));
    let failed = requests.iter().filter_map(|request| request.outcome.as_ref().err());
    let codes: Vec<_> = failed.map(|error| error.code()).collect();
    assert!(!codes.is_empty() && codes.iter().all(|code| *code == Some(tonic::Code::Unauthenticated)), "{codes:?}");
    site.host.write_secret("vault-token", &site.bao.token(KEY, "10m"));
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.round_trip();
}
