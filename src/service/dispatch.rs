//! Which version of the service a request is for. tonic's own router boxes a request six times on its way.

use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

use super::connection::Announced;

/// Both versions, each chosen by the first part of the path (gRPC over HTTP/2: `/package.Service/Method`).
#[derive(Clone)]
pub(super) struct Dispatch<V2, V1> {
    /// Answers UNIMPLEMENTED to every path that it does not know.
    pub(super) v2: V2,
    pub(super) v1beta1: Option<V1>,
}

impl<V2, V1> Service<Request<Body>> for Dispatch<V2, V1>
where
    V2: Service<Request<Body>, Response = Response<Body>>,
    V1: Service<Request<Body>, Response = V2::Response, Error = V2::Error, Future = V2::Future> + NamedService,
{
    type Response = V2::Response;
    type Error = V2::Error;
    type Future = V2::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.v2.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Announced::note(&request);
        let service = request.uri().path().split('/').nth(1);
        match &mut self.v1beta1 {
            Some(v1beta1) if service == Some(V1::NAME) => v1beta1.call(request),
            _ => self.v2.call(request),
        }
    }
}
