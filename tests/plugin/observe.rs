//! What others may watch, over HTTP.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use crate::plugin::{Host, Plugin};

fn observed() -> Host {
    let mut host = Host::new();
    host.extra = "[observe]\nhttp = \"127.0.0.1:0\"".into();
    host
}

/// What the plugin answers, head and body.
fn ask(plugin: &mut Plugin, request: &str) -> String {
    plugin.wait_until("it serves metrics", |plugin| plugin.log().contains("metrics are served"));
    let log = plugin.log();
    let line = log.lines().find(|line| line.contains("metrics are served")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    let mut stream = TcpStream::connect(line["address"].as_str().unwrap()).unwrap();
    stream.write_all(format!("{request} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    crate::secrets::assert_shows_none(&answer);
    answer
}

#[test]
fn metrics_and_readiness_say_what_status_says() {
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
    for words in ["application/openmetrics-text", "\ntrousseau_ready 1\n", &of_kek] {
        assert!(metrics.contains(words), "{words}: {metrics}");
    }
    assert!(metrics.ends_with("# EOF\n") && !metrics.contains("trousseau_kek_lacking{"), "{metrics}");
    for (request, code) in [("GET /", "404"), ("POST /metrics", "405"), ("nonsense", "400")] {
        assert!(ask(&mut plugin, request).contains(code), "{request}");
    }
}

#[test]
fn a_replica_that_lacks_the_kek_is_named_in_the_metrics_before_it_is_needed() {
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
