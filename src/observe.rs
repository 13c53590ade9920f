//! What others may watch: `/metrics` (OpenMetrics), `/livez` and `/readyz`, over plain HTTP/1.1 on an address of its
//! own, when the configuration names one.
//!
//! Nothing here asks a token, and nothing here is secret: names, identities and instants, as `key list` shows them.
//! Whoever can connect can read it all, and can do nothing else; how many may at a time is bounded.

mod metrics;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::keyring::Keyring;
use crate::service::requests::Requests;
use crate::systemd;

/// Peers at a time; the next ones wait.
const CONNECTIONS: usize = 16;
/// How long a peer may take for the head of a request, and how long accepting pauses after an error.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What Prometheus takes for OpenMetrics (version 1.0.0, section 4).
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves for ever. An address that cannot be had is told of and does not stop the daemon: a host must boot.
pub async fn serve(address: Option<SocketAddr>, requests: &Arc<Requests>) {
    let Some(address) = address else { return std::future::pending().await };
    let listener = match listen(address) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%address, %error, "observe.http cannot be listened on: nothing is served there");
            return std::future::pending().await;
        }
    };
    let address = listener.local_addr().unwrap_or(address);
    tracing::info!(%address, "metrics are served");
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { continue };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                let what = "a connection to observe.http could not be accepted";
                if requests.repeats().is_news(&format!("{what}: {error}"), Instant::now()) {
                    tracing::warn!(%error, "{what}");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let requests = Arc::clone(requests);
        tokio::spawn(async move {
            let service = service_fn(|request| std::future::ready(answer(&request, &requests)));
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).keep_alive(false);
            if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a connection to observe.http ended early");
            }
            drop(place);
        });
    }
}

/// The socket that systemd hands over, if it has this address: then the daemon needs no network. A new one otherwise.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let mut handed_over = systemd::handed_over();
    let inherited = (0..handed_over.len())
        .filter_map(|n| handed_over.take_tcp_listener(n).ok().flatten())
        .find(|socket| socket.local_addr().is_ok_and(|local| local == address));
    let socket = inherited.map_or_else(|| std::net::TcpListener::bind(address), Ok)?;
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket)
}

fn answer(request: &Request<Incoming>, requests: &Requests) -> Result<Response<Full<Bytes>>, Infallible> {
    let (now, keyring) = (Timestamp::now(), requests.keyring());
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    let (status, kind, body) = match (is_read, request.uri().path()) {
        (false, _) => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "GET or HEAD\n".to_owned()),
        (true, "/metrics") => (StatusCode::OK, OPEN_METRICS, metrics::text(&keyring, requests, now)),
        (true, "/livez") => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
        (true, "/readyz") => readiness(&keyring, requests, now),
        (true, _) => (StatusCode::NOT_FOUND, "text/plain", "/metrics, /livez, /readyz\n".to_owned()),
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    Ok(response)
}

/// Whether Encrypt and Decrypt would work, as Status says it; and what is amiss although they would.
fn readiness(keyring: &Keyring, requests: &Requests, now: Timestamp) -> (StatusCode, &'static str, String) {
    let (status, mut lines) = match requests.well(now) {
        Ok(key_set) => (StatusCode::OK, vec![format!("ok, key_id {key_set}")]),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, vec![why]),
    };
    lines.extend(keyring.gaps());
    lines.extend(keyring.concerns(now));
    (status, "text/plain; charset=utf-8", lines.join("\n") + "\n")
}
