//! OpenBao beside a token: an envelope has a recipient of each, and either may be away.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tonic::Code;
use trousseau::envelope::Envelope;
use trousseau::service::client::Client;

use crate::fault_module::{Faults, library};
use crate::observe::{OBSERVED, ask};
use crate::plugin::{Host, Plugin};
use crate::transit::{Site, assert_all_succeeded, under_load};

const GONE: &str = "* return CKR_TOKEN_NOT_PRESENT";

fn recipients(sealed: &[u8]) -> usize {
    Envelope::parse(sealed).unwrap().recipients.len()
}

/// Encrypts until an envelope has so many recipients.
pub fn wait_for_recipients(plugin: &Plugin, count: usize) -> (Vec<u8>, String) {
    let began = Instant::now();
    loop {
        let (sealed, key_id) = plugin.round_trip();
        if recipients(&sealed) == count {
            return (sealed, key_id);
        }
        assert!(began.elapsed() < Duration::from_secs(10), "envelopes do not have {count} recipients");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn either_may_be_away_and_no_request_fails() {
    let (Some(site), Some(library)) = (Site::beside_token(), library()) else { return };
    let faults = Faults { host: &site.host, library: &library };
    faults.set("");
    let plugin = faults.serve_healthy();
    let (both, key_id) = wait_for_recipients(&plugin, 2);
    let (requests, ()) = under_load(&plugin, |load| {
        let serves_with = |count: usize| {
            let (sealed, same) = wait_for_recipients(&plugin, count);
            assert_eq!(same, key_id);
            plugin.decrypt(&both, &key_id).unwrap();
            plugin.decrypt(&sealed, &key_id).unwrap();
            plugin.status().unwrap();
            load.goes_on(20);
        };
        faults.set(GONE);
        serves_with(1);
        faults.set("");
        serves_with(2);
        site.bao.seal();
        serves_with(1);
        site.bao.unseal();
        serves_with(2);
    });
    assert_all_succeeded(&requests, "the token, and then OpenBao, were away");

    // A plugin that starts meanwhile knows what is away by this host's mark.
    drop(plugin);
    let starts = |case: &str| {
        let plugin = faults.serve_healthy();
        let (alone, same) = plugin.round_trip();
        assert_eq!((recipients(&alone), same), (1, key_id.clone()), "{case}");
        plugin.decrypt(&both, &key_id).unwrap();
        plugin
    };
    faults.set(GONE);
    drop(starts("without the token"));
    faults.set("");
    site.bao.seal();
    let plugin = starts("without OpenBao");
    site.bao.unseal();
    wait_for_recipients(&plugin, 2);
}

/// Each alone on its host.
#[test]
fn the_text_blames_the_provider_and_names_it_whatever_its_type() {
    let (Some(mut site), Some(library)) = (Site::beside_token(), library()) else { return };
    let vault = site.provider();
    let cases: [(&str, Option<String>); 2] = [("provider hsm", None), ("provider vault", Some(vault))];
    for (named, provider) in cases {
        site.host.provider = provider;
        site.host.extra = String::new();
        let faults = Faults { host: &site.host, library: &library };
        faults.set("");
        let mut plugin = faults.serve_healthy();
        let (sealed, key_id) = plugin.round_trip();
        faults.set(GONE);
        site.bao.seal();
        // Who asks nothing hears of Vault's seal with the next look.
        plugin.wait_until("Status says so", |plugin| plugin.encrypt(b"seed").is_err() && plugin.status().is_err());
        let answers = [
            ("Status", plugin.status().map(drop)),
            ("Encrypt", plugin.encrypt(b"seed").map(drop)),
            ("Decrypt", plugin.decrypt(&sealed, &key_id).map(drop)),
        ];
        for (call, answer) in answers {
            let said = answer.unwrap_err();
            let blames = said.message.starts_with("the provider is at fault, the object is intact: ");
            let names = said.message.contains(named);
            assert_eq!((said.code, blames, names), (Code::Unavailable, true, true), "{call}, {named}: {said:?}");
        }
        site.bao.unseal();
    }
}

#[test]
fn where_all_must_seal_an_outage_stops_writes_and_no_reads() {
    let Some(site) = Site::beside_token() else { return };
    let configuration = site.host.configuration().replace("[keyring]", "[keyring]\nseal-under = \"all\"");
    let mut plugin = site.host.serve_with(&configuration);
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    let (both, key_id) = plugin.round_trip();
    assert_eq!(recipients(&both), 2);
    site.bao.seal();
    for said in [plugin.encrypt(b"seed").unwrap_err(), plugin.status().unwrap_err()] {
        assert_eq!((said.code, said.message.contains("is sealed: unseal it")), (Code::Unavailable, true), "{said:?}");
    }
    plugin.decrypt(&both, &key_id).unwrap();
    site.bao.unseal();
    plugin.wait_until("it is healthy again", |plugin| plugin.status().is_ok());
    assert_eq!(recipients(&plugin.round_trip().0), 2);
}

/// Whoever has the rights can make Vault's key unfit, and for ever. No write needs it while the token is well.
#[test]
fn a_key_that_is_not_used_any_more_stops_no_write_beside_a_token() {
    let Some(mut site) = Site::beside_token() else { return };
    site.host.extra += OBSERVED;
    let mut plugin = site.host.serve_healthy();
    let (both, key_id) = wait_for_recipients(&plugin, 2);
    site.bao.root.wants("POST", "transit/keys/kek/config", json!({"exportable": true}));
    let serves = |plugin: &Plugin| {
        plugin.decrypt(&both, &key_id).unwrap();
        assert_eq!(wait_for_recipients(plugin, 1).1, key_id);
        assert_eq!(plugin.status().unwrap().key_id, key_id);
    };
    plugin.reload();
    plugin.wait_until("the key is refused", |plugin| plugin.log().contains("key is not used"));
    plugin.wait_until("the new one serves", |plugin| plugin.log().contains("configuration read again"));
    serves(&plugin);
    let readiness = ask(&mut plugin, "GET /readyz");
    for words in ["200 OK", "whoever may read transit/export gets the key itself", "lack KEK"] {
        assert!(readiness.contains(words), "{words}: {readiness}");
    }
    drop(plugin);
    serves(&site.host.serve_healthy());

    let of_all = site.host.configuration().replace("[keyring]", "[keyring]\nseal-under = \"all\"");
    let mut plugin = site.host.serve_with(&of_all);
    plugin
        .wait_until("Status says so", |plugin| plugin.status().is_err_and(|said| said.message.contains("is not used")));
    assert_eq!(plugin.encrypt(b"seed").unwrap_err().code, Code::Unavailable);
    plugin.decrypt(&both, &key_id).unwrap();
}

/// The first in order, so that each Decrypt would go there.
#[test]
fn one_that_hangs_is_waited_for_once() {
    let Some(mut site) = Site::beside_token() else { return };
    site.host.provider = Some(site.provider());
    site.host.extra = site.host.provider_of_token();
    let plugin = site.host.serve_healthy();
    let (both, key_id) = wait_for_recipients(&plugin, 2);
    let decrypts = || {
        let began = Instant::now();
        for _ in 0..200 {
            plugin.decrypt(&both, &key_id).unwrap();
        }
        began.elapsed()
    };
    let healthy = decrypts();
    let (requests, hung) = under_load(&plugin, |load| {
        site.bao.pause();
        plugin.decrypt(&both, &key_id).unwrap(); // it opens the breaker, if the load has not
        load.goes_on(20);
        decrypts()
    });
    site.bao.resume();
    assert_all_succeeded(&requests, "OpenBao hung");
    eprintln!("200 Decrypts took {healthy:?}, and {hung:?} while the first provider hung");
    // One alone that waited would take more than a second.
    assert!(hung < Duration::from_secs(10), "{hung:?}");
    let slow = requests.iter().filter(|request| request.took > Duration::from_millis(1000)).count();
    assert!(slow <= 6, "{slow} requests waited"); // three callers, an Encrypt or a Decrypt each
    wait_for_recipients(&plugin, 2);
}

/// The one that hangs is the first in order, so that each Decrypt would go there.
#[test]
fn a_start_while_one_hangs_serves_what_the_other_can() {
    let (Some(mut site), Some(library)) = (Site::beside_token(), library()) else { return };
    site.host.extra = site.host.provider_of_token();
    site.host.provider = Some(site.provider());
    let faults = Faults { host: &site.host, library: &library };
    faults.set("");
    let mut plugin = faults.serve_healthy();
    let (both, key_id) = wait_for_recipients(&plugin, 2);
    faults.set(GONE);
    plugin.wait_until("OpenBao seals alone", |plugin| recipients(&plugin.round_trip().0) == 1);
    let (only_vault, _) = plugin.round_trip();
    drop(plugin);
    faults.set("");

    let restarts = || {
        let plugin = faults.host.start(faults.command());
        // It is connected to within a moment.
        plugin.decrypt(&both, &key_id).unwrap();
        plugin
    };
    site.bao.pause();
    let plugin = restarts();
    let began = Instant::now();
    plugin.decrypt(&both, &key_id).unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "a Decrypt waited for {:?}", began.elapsed());
    let (alone, same) = plugin.encrypt(b"seed").unwrap();
    assert_eq!((recipients(&alone), same), (1, key_id.clone()));
    // A connection that was told of the set while one hung seals under both as soon as it is back.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut client = runtime.block_on(Client::connect(&plugin.socket, Duration::from_secs(5))).unwrap();
    assert_eq!(runtime.block_on(client.status()).unwrap().key_id, key_id);
    site.bao.resume();
    wait_for_recipients(&plugin, 2);
    assert_eq!(recipients(&runtime.block_on(client.encrypt(b"seed".to_vec())).unwrap().0), 2);
    drop(plugin);

    // Who needs the one that hangs waits for it, and so does who writes, half of its time.
    for needs_it in
        [&|plugin: &Plugin| assert_eq!(recipients(&plugin.encrypt(b"seed").unwrap().0), 2), &|plugin: &Plugin| {
            drop(plugin.decrypt(&only_vault, &key_id).unwrap())
        }] as [&dyn Fn(&Plugin); 2]
    {
        site.bao.pause();
        let plugin = restarts();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(300));
                site.bao.resume();
            });
            needs_it(&plugin);
        });
    }
}

/// On one running plugin, in the steps that an administrator takes.
#[test]
fn a_move_from_the_token_to_openbao_loses_nothing_at_any_step() {
    let Some(mut site) = Site::beside_token() else { return };
    let vault = site.provider();
    let reload = |plugin: &mut Plugin, host: &Host, was: &str| {
        host.write_configuration();
        plugin.reload();
        plugin.wait_until("the new one serves", |plugin| plugin.status().is_ok_and(|status| status.key_id != was));
        plugin.round_trip()
    };
    site.host.extra = String::new();
    let mut plugin = site.host.serve_healthy();
    let (first, under_token) = plugin.round_trip();

    site.host.extra = vault;
    let (second, under_both) = reload(&mut plugin, &site.host, &under_token);
    assert_eq!((recipients(&first), recipients(&second)), (1, 2));
    let seed = plugin.decrypt(&first, &under_token).unwrap();
    let (rewritten, key_id) = plugin.encrypt(&seed).unwrap();
    assert_eq!(key_id, under_both);

    let token = site.host.provider_of_token();
    site.host.provider = Some(token.replace("type =", "seal = false\ntype ="));
    let (third, under_vault) = reload(&mut plugin, &site.host, &under_both);
    assert_eq!(recipients(&third), 1);
    for (sealed, key_id) in [(&first, &under_token), (&second, &under_both), (&rewritten, &under_both)] {
        plugin.decrypt(sealed, key_id).unwrap();
    }

    site.host.provider = Some(String::new());
    let before = plugin.log().len();
    site.host.write_configuration();
    plugin.reload();
    plugin.wait_until("the new one serves", |plugin| plugin.log()[before..].contains("configuration"));
    plugin.wait_until("the token is not used", |plugin| plugin.decrypt(&first, &under_token).is_err());
    for (sealed, key_id) in [(&second, &under_both), (&rewritten, &under_both), (&third, &under_vault)] {
        plugin.decrypt(sealed, key_id).unwrap();
    }
    assert_eq!(plugin.decrypt(&first, &under_token).unwrap_err().code, Code::FailedPrecondition);
    plugin.round_trip();
}
