//! The floor: a gRPC server on the same libraries as tenured that does nothing. No server built on them answers a Put for less
//! CPU, so what tenured takes beyond it is its own.
//!
//! With a delay it is also a server that is known to be slow: the harness must see it (`tests/planted_delay.rs`).

use std::net::SocketAddr;
use std::time::Duration;

use tenure_etcd_shim::proto::etcdserverpb::kv_server::{Kv, KvServer};
use tenure_etcd_shim::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, TxnRequest, TxnResponse,
};
use tenure_etcd_shim::wire;
use tonic::{Request, Response, Status};

/// Answers every put with nothing, after a delay.
#[derive(Clone, Copy, Debug)]
pub struct Floor {
    pub delay: Duration,
}

impl Floor {
    /// Serves until the future is dropped.
    ///
    /// # Errors
    /// If the socket fails.
    pub async fn serve(self, socket: tokio::net::TcpListener) -> anyhow::Result<()> {
        let incoming = tonic::transport::server::TcpIncoming::from(socket).with_nodelay(Some(true));
        tonic::transport::Server::builder().add_service(KvServer::new(self)).serve_with_incoming(incoming).await?;
        Ok(())
    }

    /// As [`Floor::serve`], on an address.
    ///
    /// # Errors
    /// If the address cannot be had.
    pub async fn serve_at(self, address: SocketAddr) -> anyhow::Result<()> {
        self.serve(tokio::net::TcpListener::bind(address).await?).await
    }
}

#[tonic::async_trait]
impl Kv for Floor {
    async fn put(&self, _: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        Ok(Response::new(PutResponse::default()))
    }

    async fn range(&self, _: Request<RangeRequest>) -> Result<Response<wire::RangeResponse>, Status> {
        Err(nothing_else())
    }

    type RangeStreamStream =
        tonic::codegen::tokio_stream::Empty<Result<tenure_etcd_shim::proto::etcdserverpb::RangeStreamResponse, Status>>;

    async fn range_stream(&self, _: Request<RangeRequest>) -> Result<Response<Self::RangeStreamStream>, Status> {
        Err(nothing_else())
    }

    async fn delete_range(&self, _: Request<DeleteRangeRequest>) -> Result<Response<DeleteRangeResponse>, Status> {
        Err(nothing_else())
    }

    async fn txn(&self, _: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        Err(nothing_else())
    }

    async fn compact(&self, _: Request<CompactionRequest>) -> Result<Response<CompactionResponse>, Status> {
        Err(nothing_else())
    }
}

fn nothing_else() -> Status {
    Status::unimplemented("the floor answers Put alone")
}
