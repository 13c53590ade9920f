//! What others may watch, over HTTP.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tonic::Code;

use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::plugin::{Host, Plugin};
use crate::v1beta1;

/// `/livez`, whatever the token does.
const PROMPT: Duration = Duration::from_secs(1);

/// At a port that is free.
pub const OBSERVED: &str = "[observe]\nhttp = \"127.0.0.1:0\"\n";

fn observed() -> Host {
    let mut host = Host::new();
    host.extra = OBSERVED.into();
    host
}

/// Where it serves them.
pub fn address(plugin: &mut Plugin) -> String {
    plugin.wait_until("it serves metrics", |plugin| plugin.log().contains("metrics are served"));
    let log = plugin.log();
    let line = log.lines().find(|line| line.contains("metrics are served")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    line["address"].as_str().unwrap().to_owned()
}

/// What the plugin answers, head and body.
pub fn ask(plugin: &mut Plugin, request: &str) -> String {
    ask_at(&address(plugin), request)
}

pub fn ask_at(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(format!("{request} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    crate::secrets::assert_shows_none(&answer);
    answer
}

/// A sample's value in these metrics, by its name with all its labels.
pub fn sample(metrics: &str, name: &str) -> Option<f64> {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
    metrics.lines().find_map(value)
}

/// Waits until each of these samples has this value, and says which one does not get there.
pub fn wait_for_samples(plugin: &mut Plugin, samples: &[(impl AsRef<str>, f64)]) {
    let address = address(plugin);
    for (name, expected) in samples {
        let is_so = |_: &Plugin| sample(&ask_at(&address, "GET /metrics"), name.as_ref()) == Some(*expected);
        plugin.wait_until(&format!("{} is {expected}", name.as_ref()), is_so);
    }
    // No counter goes on from there; a gauge may, for the moment of a look.
    let metrics = ask_at(&address, "GET /metrics");
    let counts = |name: &str| ["_total", "_count", "_bucket", "_sum"].iter().any(|end| name.contains(end));
    for (name, expected) in samples.iter().filter(|(name, _)| counts(name.as_ref())) {
        assert_eq!(sample(&metrics, name.as_ref()), Some(*expected), "{}", name.as_ref());
    }
}

/// A sample of the one token's.
fn of_token(name: &str, more: &str) -> String {
    format!("{name}{{provider=\"hsm\",token=\"pkcs11:token=trousseau\"{more}}}")
}

#[test]
fn metrics_and_readiness_say_what_status_says() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    let host = observed();
    let mut plugin = host.serve();
    assert!(ask(&mut plugin, "GET /livez").contains("200 OK"));
    plugin.wait_until("it has looked", |plugin| plugin.status().is_err_and(|why| why.message.contains("generate")));
    let unready = ask(&mut plugin, "GET /readyz");
    assert!(unready.contains("503") && unready.contains("trousseau key generate"), "{unready}");
    assert!(ask(&mut plugin, "GET /metrics").contains("\ntrousseau_ready 0\n"));

    let kek = host.generate("0s");
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    let key_id = plugin.status().unwrap().key_id;
    assert!(ask(&mut plugin, "GET /readyz").contains(&format!("ok, key_id {key_id}")));
    let metrics = ask(&mut plugin, "GET /metrics");
    let of_kek = format!("kek=\"{}\",state=\"active\"}}", kek["identity"].as_str().unwrap());
    let build = concat!("{version=\"", env!("CARGO_PKG_VERSION"), "\",commit=\"", env!("TROUSSEAU_BUILD"), "\"} 1\n");
    for words in ["application/openmetrics-text", "\ntrousseau_ready 1\n", &of_kek, build] {
        assert!(metrics.contains(words), "{words}: {metrics}");
    }
    assert!(metrics.ends_with("# EOF\n") && !metrics.contains("trousseau_kek_lacking{"), "{metrics}");
    for (request, code) in [("GET /", "404"), ("POST /metrics", "405"), ("nonsense", "400")] {
        assert!(ask(&mut plugin, request).contains(code), "{request}");
    }
}

#[test]
fn a_replica_that_lacks_the_kek_is_named_in_the_metrics_before_it_is_needed() {
    if Family::chosen().stands_one_token_alone() {
        return;
    }
    let host = observed().with_a_replica();
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    plugin.wait_until("the second was looked at", |plugin| plugin.log().contains("second of provider hsm lacks"));
    let metrics = ask(&mut plugin, "GET /metrics");
    let lacking = metrics.lines().find(|line| line.starts_with("trousseau_kek_lacking{")).unwrap_or(&metrics);
    assert!(lacking.ends_with("token=\"pkcs11:token=second\"} 1"), "{lacking}");
    assert!(metrics.contains("\ntrousseau_gaps 1\n"), "{metrics}");
    assert!(ask(&mut plugin, "GET /readyz").contains("pkcs11:token=second"));
}

#[test]
fn an_address_that_cannot_be_had_does_not_keep_a_host_from_booting() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut host = Host::new();
    host.extra = format!("[observe]\nhttp = \"{}\"", taken.local_addr().unwrap());
    host.generate("0s");
    let plugin = host.serve_healthy();
    plugin.round_trip();
    assert!(plugin.log().contains("observe.http cannot be listened on"), "{}", plugin.log());
}

#[test]
fn what_was_done_is_counted() {
    let host = observed();
    let kek = host.generate("0s");
    let seconds = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64().floor();
    let started = seconds();
    let mut plugin = host.serve();
    let address = address(&mut plugin);
    // Not by Status, which is counted too.
    plugin.wait_until("it is ready", |_| ask_at(&address, "GET /readyz").contains("200 OK"));
    let before = ask_at(&address, "GET /metrics");
    let (sealed, key_id) = plugin.encrypt(b"seed").unwrap();
    plugin.encrypt(b"seed").unwrap();
    plugin.decrypt(&sealed, &key_id).unwrap();
    assert_eq!(plugin.decrypt(b"no envelope", &key_id).unwrap_err().code, Code::InvalidArgument);
    v1beta1::encrypt(&plugin, b"seed").unwrap();
    assert_eq!(plugin.status().unwrap().key_id, key_id);

    let mut samples: Vec<(String, f64)> = Vec::new();
    for (method, version, code, count) in [
        ("status", "v2", "OK", 1.0),
        ("encrypt", "v2", "OK", 2.0),
        ("decrypt", "v2", "OK", 1.0),
        ("decrypt", "v2", "INVALID_ARGUMENT", 1.0),
        ("encrypt", "v1beta1", "OK", 1.0),
        ("decrypt", "v1beta1", "OK", 0.0),
    ] {
        let labels = format!("method=\"{method}\",version=\"{version}\",code=\"{code}\"");
        samples.push((format!("trousseau_requests_total{{{labels}}}"), count));
    }
    for (method, version, count) in [
        ("status", "v2", 1.0),
        ("encrypt", "v2", 2.0),
        ("decrypt", "v2", 2.0),
        ("encrypt", "v1beta1", 1.0),
        ("decrypt", "v1beta1", 0.0),
    ] {
        let labels = format!("method=\"{method}\",version=\"{version}\"");
        samples.push((format!("trousseau_request_duration_seconds_count{{{labels}}}"), count));
        samples.push((format!("trousseau_request_duration_seconds_bucket{{{labels},le=\"+Inf\"}}"), count));
    }
    for (name, more, value) in [
        ("trousseau_token_up", "", 1.0),
        ("trousseau_login_refused", "", 0.0),
        ("trousseau_connections_total", "", 1.0),
        ("trousseau_queue_length", "", 0.0),
        ("trousseau_sessions", ",state=\"busy\"", 0.0),
        ("trousseau_sessions", ",state=\"stuck\"", 0.0),
    ] {
        samples.push((of_token(name, more), value));
    }
    let hash = base16ct::lower::encode_string(&Sha256::digest(&key_id));
    samples.push((format!("trousseau_key_id_info{{key_id_hash=\"sha256:{hash}\"}}"), 1.0));
    wait_for_samples(&mut plugin, &samples);

    let metrics = ask_at(&address, "GET /metrics");
    for name in ["trousseau_queue_duration_seconds_count", "trousseau_call_duration_seconds_count"] {
        let [then, now] = [&before, &metrics].map(|metrics| sample(metrics, &of_token(name, "")).unwrap());
        // The keyring's own round trips are among them.
        assert!(now >= then + 4.0, "{name}: {then}, then {now}");
    }
    let idle = sample(&metrics, &of_token("trousseau_sessions", ",state=\"idle\"")).unwrap();
    assert!(idle >= 1.0 && idle <= host.sessions as f64 + 1.0, "{idle} are idle");
    let kek = kek["identity"].as_str().unwrap();
    let proved = sample(&metrics, &format!("trousseau_kek_proved_timestamp_seconds{{kek=\"{kek}\"}}")).unwrap();
    assert!((started..=seconds()).contains(&proved), "proved at {proved}, started at {started}");
    assert!(!metrics.contains("\ntrousseau_losses_total{"), "{metrics}");
}

/// Another one is asked for no proof any more, and must not look as if it had stopped to give any.
#[test]
fn only_the_active_kek_has_an_instant_of_its_last_proof() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    const PROVED: &str = "trousseau_kek_proved_timestamp_seconds{";
    let host = observed();
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    let kek = host.generate("0s");
    let kek = kek["identity"].as_str().unwrap();
    assert!(host.run(&["key", "list", "--expect", kek]).status.success());
    let address = address(&mut plugin);
    let of_kek = format!("{PROVED}kek=\"{kek}\"}}");
    plugin.wait_until("it has proved itself", |_| sample(&ask_at(&address, "GET /metrics"), &of_kek).is_some());
    let metrics = ask_at(&address, "GET /metrics");
    assert_eq!(metrics.lines().filter(|line| line.starts_with(PROVED)).count(), 1, "{metrics}");
}

#[test]
fn a_login_that_is_refused_is_counted_and_not_tried_again() {
    let host = observed();
    host.generate("0s");
    host.write_secret("pin", "wrong-00");
    let mut plugin = host.serve();
    let of_token = |name| of_token(name, "");
    wait_for_samples(
        &mut plugin,
        &[
            (of_token("trousseau_login_refused"), 1.0),
            (of_token("trousseau_token_up"), 0.0),
            (of_token("trousseau_connections_total"), 0.0),
            ("trousseau_ready".to_owned(), 0.0),
        ],
    );
}

#[test]
fn a_token_that_is_lost_and_comes_back_is_counted_by_its_class() {
    if Family::chosen().ends_with_its_token() {
        return;
    }
    let Some(library) = library() else { return };
    let host = observed();
    host.generate("0s");
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.serve_healthy();
    faults.set("* return CKR_DEVICE_REMOVED");
    plugin.encrypt(b"seed").unwrap_err();
    let loss = of_token("trousseau_losses_total", ",class=\"token\"");
    let states = |up: f64, connections: f64| {
        let [is_up, connected] = ["trousseau_token_up", "trousseau_connections_total"].map(|name| of_token(name, ""));
        [(is_up, up), (connected, connections), (loss.clone(), 1.0), ("trousseau_ready".to_owned(), up)]
    };
    wait_for_samples(&mut plugin, &states(0.0, 1.0));
    faults.set("");
    wait_for_samples(&mut plugin, &states(1.0, 2.0));
    plugin.round_trip();
}

#[test]
fn while_the_token_hangs_it_lives_and_tells_who_waits() {
    const WAITING: usize = 6;
    if Family::chosen().is_slower_than(100) {
        return;
    }
    let Some(library) = library() else { return };
    let host = observed();
    host.generate("0s");
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.serve_healthy();
    let address = address(&mut plugin);
    faults.set("C_Encrypt hang\nC_Decrypt hang\nC_WrapKey hang\nC_UnwrapKey hang");
    let value = |name: &str, more: &str| sample(&ask_at(&address, "GET /metrics"), &of_token(name, more)).unwrap();
    let wait = |what: &str, condition: &dyn Fn() -> bool| {
        let began = Instant::now();
        while !condition() {
            assert!(began.elapsed() < Duration::from_secs(10), "waited in vain until {what}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    let answers = thread::scope(|scope| {
        let waits = scope.spawn(|| plugin.encrypt_at_once(WAITING));
        wait("sessions are busy", &|| value("trousseau_sessions", ",state=\"busy\"") >= host.sessions as f64);
        wait("others wait", &|| value("trousseau_queue_length", "") >= 1.0);
        let asked = Instant::now();
        assert!(ask_at(&address, "GET /livez").contains("200 OK"));
        assert!(asked.elapsed() < PROMPT, "/livez after {:?}", asked.elapsed());
        wait("they are stuck", &|| value("trousseau_sessions", ",state=\"stuck\"") >= 1.0);
        assert!(ask_at(&address, "GET /livez").contains("200 OK"));
        faults.set("");
        waits.join().unwrap()
    });
    let failed = answers.iter().filter(|answer| answer.is_err()).count();
    assert_eq!(failed, WAITING, "{answers:?}");
    plugin.wait_until("it is healthy again", |plugin| plugin.encrypt(b"seed").is_ok());
    let none_waits = [("trousseau_queue_length", ""), ("trousseau_sessions", ",state=\"stuck\"")];
    wait_for_samples(&mut plugin, &none_waits.map(|(name, more)| (of_token(name, more), 0.0)));
}
