//! A client of KMS v1beta1, which the command line does not have.

use std::path::Path;
use std::time::Duration;

use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::Endpoint;
use tonic::{IntoRequest, Request};
use tonic_prost::ProstCodec;

use crate::plugin::{Answer, Plugin, answer_of};

/// A request to encrypt or to decrypt.
#[derive(Clone, PartialEq, prost::Message)]
struct Asked {
    #[prost(string, tag = "1")]
    version: String,
    #[prost(bytes = "vec", tag = "2")]
    bytes: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Answered {
    #[prost(bytes = "vec", tag = "1")]
    bytes: Vec<u8>,
}

pub fn encrypt(plugin: &Plugin, plaintext: &[u8]) -> Result<Vec<u8>, Answer> {
    ask(plugin, "Encrypt", plaintext)
}

pub fn decrypt(plugin: &Plugin, ciphertext: &[u8]) -> Result<Vec<u8>, Answer> {
    ask(plugin, "Decrypt", ciphertext)
}

/// With this time to answer it.
pub fn encrypt_within(socket: &Path, plaintext: &[u8], timeout: Duration) -> Result<Vec<u8>, Answer> {
    let mut request = Request::new(Asked { version: "v1beta1".into(), bytes: plaintext.to_vec() });
    request.set_timeout(timeout);
    call::<Asked, _>(socket, "Encrypt", request).map(|Answered { bytes }| bytes)
}

fn ask(plugin: &Plugin, method: &str, bytes: &[u8]) -> Result<Vec<u8>, Answer> {
    let asked = Asked { version: "v1beta1".into(), bytes: bytes.to_vec() };
    call::<Asked, _>(&plugin.socket, method, asked).map(|Answered { bytes }| bytes)
}

/// One call on a connection of its own.
pub fn call<Q, A>(socket: &Path, method: &str, request: impl IntoRequest<Q>) -> Result<A, Answer>
where
    Q: prost::Message + 'static,
    A: prost::Message + Default + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let path: PathAndQuery = format!("/v1beta1.KeyManagementService/{method}").parse().unwrap();
    let socket = socket.to_owned();
    runtime.block_on(async {
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap();
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.unwrap();
        let answer = client.unary(request.into_request(), path, ProstCodec::<Q, A>::default()).await;
        answer.map(tonic::Response::into_inner).map_err(|status| answer_of(&status))
    })
}
