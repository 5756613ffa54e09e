//! The gRPC services put together, as the listeners serve them.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tonic::codec::CompressionEncoding;
use tonic::codegen::{BoxFuture, Service as _, StdError};

use crate::proto::etcdserverpb::auth_server::{self, AuthServer};
use crate::proto::etcdserverpb::cluster_server::{self, ClusterServer};
use crate::proto::etcdserverpb::kv_server::{self, KvServer};
use crate::proto::etcdserverpb::lease_server::{self, LeaseServer};
use crate::proto::etcdserverpb::maintenance_server::{self, MaintenanceServer};
use crate::proto::etcdserverpb::watch_server::{self, WatchServer};
use crate::proto::grpc::health::v1::health_server::{self, HealthServer};
use crate::service::Context;
use crate::service::auth::AuthService;
use crate::service::cluster::ClusterService;
use crate::service::health::HealthService;
use crate::service::kv::KvService;
use crate::service::lease::LeaseService;
use crate::service::maintenance::MaintenanceService;
use crate::service::watch::WatchService;

/// What etcd receives over the largest request it takes: room for what surrounds the request in its message.
const RECEIVE_OVERHEAD_BYTES: usize = 512 << 10;

/// The name of every service there is, for telling an unknown method from an unknown service.
pub const SERVICES: [&str; 7] = [
    kv_server::SERVICE_NAME,
    watch_server::SERVICE_NAME,
    lease_server::SERVICE_NAME,
    cluster_server::SERVICE_NAME,
    maintenance_server::SERVICE_NAME,
    auth_server::SERVICE_NAME,
    health_server::SERVICE_NAME,
];

/// Every service there is. Cheap to clone.
///
/// A table of our own: seven names need no general router, and a body reaches its service as it came, without a box.
#[derive(Clone)]
pub struct Router(Arc<Servers>);

struct Servers {
    kv: KvServer<KvService>,
    watch: WatchServer<WatchService>,
    lease: LeaseServer<LeaseService>,
    cluster: ClusterServer<ClusterService>,
    maintenance: MaintenanceServer<MaintenanceService>,
    auth: AuthServer<AuthService>,
    health: HealthServer<HealthService>,
}

impl Router {
    pub fn new(context: &Context, progress_period: Duration) -> Self {
        let receive_bytes_max = context.limits.max_request_bytes.saturating_add(RECEIVE_OVERHEAD_BYTES);
        // The generated servers have these methods in common and no trait for them.
        macro_rules! server {
            ($server:ident, $service:expr) => {
                $server::new($service)
                    .max_decoding_message_size(receive_bytes_max)
                    .accept_compressed(CompressionEncoding::Gzip)
                    .send_compressed(CompressionEncoding::Gzip)
            };
        }
        Router(Arc::new(Servers {
            kv: server!(KvServer, KvService::new(context.clone())),
            watch: server!(WatchServer, WatchService::new(context.clone(), progress_period)),
            lease: server!(LeaseServer, LeaseService::new(context.clone())),
            cluster: server!(ClusterServer, ClusterService::new(context.clone())),
            maintenance: server!(MaintenanceServer, MaintenanceService::new(context.clone())),
            auth: server!(AuthServer, AuthService::new(context.clone())),
            health: server!(HealthServer, HealthService::new(context.clone())),
        }))
    }

    /// Answers a request, which must carry the identity of its connection, see [`crate::tenant`]. What is no service or no
    /// method of one is `Unimplemented` without a message.
    pub fn call<B>(&self, request: Request<B>) -> BoxFuture<Response<Body>, Infallible>
    where
        B: http_body::Body + Send + 'static,
        B::Error: Into<StdError> + Send + 'static,
    {
        let servers = &*self.0;
        let service =
            request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/')).map(|(name, _)| name);
        match service {
            Some(kv_server::SERVICE_NAME) => servers.kv.clone().call(request),
            Some(watch_server::SERVICE_NAME) => servers.watch.clone().call(request),
            Some(lease_server::SERVICE_NAME) => servers.lease.clone().call(request),
            Some(cluster_server::SERVICE_NAME) => servers.cluster.clone().call(request),
            Some(maintenance_server::SERVICE_NAME) => servers.maintenance.clone().call(request),
            Some(auth_server::SERVICE_NAME) => servers.auth.clone().call(request),
            Some(health_server::SERVICE_NAME) => servers.health.clone().call(request),
            Some(_) | None => Box::pin(std::future::ready(Ok(Status::unimplemented("").into_http()))),
        }
    }
}
