//! HTTP to one Vault or OpenBao: HTTP/2 or 1.1 over TLS, connections that are kept, answers of a bounded size. It follows
//! no redirect and knows no proxy: a token goes to the address of the configuration and nowhere else.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::fault::Fault;
use super::index::Index;
use crate::config::{Credential, Method as AuthMethod, TransitConfig};
use crate::disk;
use crate::sync::lock;

/// An answer of more bytes than this is not one of Transit's: a key of thousands of versions has fewer.
const LONGEST_ANSWER: usize = 256 * 1024;
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(2);
/// A connection on which requests wait is asked so often whether it is alive, and has as long to say so.
const PING: Duration = Duration::from_secs(2);
/// A call that was given at least so long and had no answer says something about its connection.
const LONG: Duration = Duration::from_millis(500);
/// See [`super::index`].
const INDEX: HeaderName = HeaderName::from_static("x-vault-index");

type Http = legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Calls to one address.
pub(super) struct Client {
    address: Uri,
    ca_file: Option<PathBuf>,
    certificate: Option<(PathBuf, Credential)>,
    /// Made when it is first needed, and anew when it hangs.
    http: Mutex<Option<Http>>,
    /// The newest that an answer told.
    index: Mutex<Option<Index>>,
}

/// One call. A path begins behind `/v1/`.
pub(super) struct Call<'c> {
    pub(super) method: Method,
    pub(super) path: &'c str,
    pub(super) namespace: Option<&'c str>,
    pub(super) token: Option<&'c SecretString>,
    /// To a standby that did not know what others do: one that has not come as far as the newest answer so far is to ask
    /// the active node.
    pub(super) is_for_the_newest: bool,
    /// JSON; it may hold a data key.
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// What came back.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    /// It may hold a data key.
    pub(super) body: Zeroizing<Vec<u8>>,
}

impl Client {
    pub(super) fn new(config: &TransitConfig) -> Self {
        let certificate = match &config.auth.method {
            AuthMethod::Cert { cert, key, .. } => Some((cert.clone(), key.clone())),
            _ => None,
        };
        Self {
            address: config.address.clone(),
            ca_file: config.ca_file.clone(),
            certificate,
            http: Mutex::default(),
            index: Mutex::default(),
        }
    }

    /// Has the next call make a new connection, with certificates that are read anew.
    pub(super) fn reconnect(&self) {
        *lock(&self.http) = None;
    }

    /// Makes a call.
    ///
    /// # Errors
    /// No answer came, or none of Vault's size; what an answer means is [`super::fault`]'s.
    pub(super) async fn call(&self, call: Call<'_>, deadline: Instant) -> Result<Answer, Fault> {
        let began = Instant::now();
        let request = self.request(call)?;
        let http = self.http()?;
        let answer = async {
            let response = http.request(request).await.map_err(|error| {
                if error.is_connect() {
                    self.reconnect(); // a CA may have been exchanged
                }
                Fault::Unreachable(why(&error))
            })?;
            let status = response.status();
            self.learn(status, response.headers().get(INDEX));
            if status.is_redirection() {
                let to = response.headers().get(http::header::LOCATION).and_then(|to| to.to_str().ok());
                return Err(Fault::Redirect(to.unwrap_or("nowhere").chars().take(200).collect()));
            }
            let mut body = Zeroizing::new(Vec::with_capacity(2048));
            let mut stream = Limited::new(response.into_body(), LONGEST_ANSWER);
            while let Some(frame) = stream.frame().await {
                let frame = frame.map_err(|error| match error.is::<LengthLimitError>() {
                    true => Fault::Broken("its answer is longer than any of Vault's".into()),
                    false => Fault::Unreachable(chain(error.as_ref())),
                })?;
                if let Some(data) = frame.data_ref() {
                    extend(&mut body, data);
                }
            }
            Ok(Answer { status, body })
        };
        let answer = tokio::time::timeout_at(deadline.into(), answer).await.unwrap_or(Err(Fault::Late));
        if matches!(answer, Err(Fault::Late)) && began.elapsed() >= LONG {
            self.reconnect();
        }
        answer
    }

    fn request(&self, call: Call<'_>) -> Result<Request<Full<Bytes>>, Fault> {
        let internal = |error: &dyn Error| Fault::Other(format!("a request could not be made: {error}"));
        let authority = self.address.authority().map(http::uri::Authority::as_str).unwrap_or_default();
        let mut request = Request::builder()
            .method(call.method)
            .uri(format!("https://{authority}/v1/{}", call.path))
            .header("x-vault-request", "true");
        if let Some(namespace) = call.namespace {
            request = request.header("x-vault-namespace", namespace);
        }
        if call.is_for_the_newest {
            request = request.header("x-vault-inconsistent", "forward-active-node");
            if let Some(index) = &*lock(&self.index) {
                request = request.header(INDEX, index.header());
            }
        }
        if let Some(token) = call.token {
            let mut token = HeaderValue::from_str(token.expose_secret()).map_err(|_| Fault::TokenRefused)?;
            token.set_sensitive(true); // h2 keeps it out of its table, and Debug does not show it
            request = request.header("x-vault-token", token);
        }
        request.body(Full::new(Bytes::from_owner(call.body))).map_err(|error| internal(&error))
    }

    /// Keeps the newest index, unless a node says that it has not come so far: if it was restored, none ever will.
    fn learn(&self, status: StatusCode, told: Option<&HeaderValue>) {
        let mut index = lock(&self.index);
        if status == StatusCode::PRECONDITION_FAILED {
            *index = None;
            return;
        }
        // Most answers tell what is known: nothing was written since.
        let news = told.filter(|told| index.as_ref().is_none_or(|known| known.header() != *told));
        if let Some(told) = news.and_then(Index::of) {
            *index = Some(match index.take() {
                Some(before) => before.or_later(told),
                None => told,
            });
        }
    }

    fn http(&self) -> Result<Http, Fault> {
        let mut http = lock(&self.http);
        match &*http {
            Some(http) => Ok(http.clone()),
            None => Ok(http.insert(self.connector().map_err(Fault::Unreachable)?).clone()),
        }
    }

    fn connector(&self) -> Result<Http, String> {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT));
        http.set_keepalive(Some(Duration::from_secs(30)));
        let https = HttpsConnectorBuilder::new().with_tls_config(self.tls()?).https_only();
        let https = https.enable_http1().enable_http2().wrap_connector(http);
        Ok(legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(90))
            .pool_max_idle_per_host(16)
            .http2_keep_alive_interval(PING)
            .http2_keep_alive_timeout(PING)
            .build(https))
    }

    fn tls(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| error.to_string())?.with_root_certificates(self.roots()?);
        let Some((cert, key)) = &self.certificate else { return Ok(builder.with_no_client_auth()) };
        let chain = certificates(cert)?;
        let pem = key.read_file().map_err(|error| format!("{error}: {}", error.remedy()))?;
        let key_of = |error| format!("{key}: no private key in PEM: {error}");
        let key = PrivateKeyDer::from_pem_slice(pem.expose_secret().as_bytes()).map_err(key_of)?;
        builder.with_client_auth_cert(chain, key).map_err(|error| format!("{}: {error}", cert.display()))
    }

    fn roots(&self) -> Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        match &self.ca_file {
            Some(file) => {
                for certificate in certificates(file)? {
                    roots.add(certificate).map_err(|error| format!("{}: {error}", file.display()))?;
                }
            }
            None => {
                let found = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(found.certs);
                if roots.is_empty() {
                    return Err("this host trusts no CA: install ca-certificates, or set ca-file".into());
                }
            }
        }
        Ok(roots)
    }
}

/// Adds bytes. A vector that grew by itself would leave what it held in its old place.
fn extend(body: &mut Zeroizing<Vec<u8>>, data: &[u8]) {
    let length = body.len() + data.len();
    if length > body.capacity() {
        let mut larger = Zeroizing::new(Vec::with_capacity(2 * length));
        larger.extend_from_slice(body);
        *body = larger; // and the old one is wiped
    }
    body.extend_from_slice(data);
}

/// Who vouches for the server, or for us: nobody else may decide that.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
    let (mut from, mut pem) = (File::open(file).map_err(|error| wrong(&error))?, Vec::new());
    let metadata = from.metadata().map_err(|error| wrong(&error))?;
    disk::refuse_if_changeable_by_others(file, &metadata)
        .map_err(|(what, remedy)| wrong(&format!("{what}: {remedy}")))?;
    from.read_to_end(&mut pem).map_err(|error| wrong(&error))?;
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|error| wrong(&error))?;
    if found.is_empty() { Err(wrong(&"no certificate in PEM")) } else { Ok(found) }
}

/// Why there is no connection, and what to do where that is clear.
fn why(error: &legacy::Error) -> String {
    let said = chain(error);
    let said = said.trim_start_matches("client error (Connect): ");
    if said.contains("InvalidContentType") {
        return format!("it does not speak TLS ({said}): see the port in address");
    }
    let about_its_certificate = said.contains("invalid peer certificate");
    format!("{said}{}", if about_its_certificate { ": see ca-file, and the host in address" } else { "" })
}

/// An error and what caused it: the innermost cause is the one that people need.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_what_came_however_it_grew() {
        let mut body = Zeroizing::new(Vec::with_capacity(3));
        let frames: [&[u8]; 5] = [b"", b"ab", b"cdefghijkl", b"m", &[b'x'; 5000]];
        frames.iter().for_each(|frame| extend(&mut body, frame));
        assert_eq!(*body, frames.concat());
    }
}
