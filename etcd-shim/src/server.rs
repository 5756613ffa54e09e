//! The gRPC services put together, as the listeners serve them.

use std::time::Duration;

use tonic::codec::CompressionEncoding;
use tonic::service::Routes;

use crate::proto::etcdserverpb::auth_server::AuthServer;
use crate::proto::etcdserverpb::cluster_server::ClusterServer;
use crate::proto::etcdserverpb::kv_server::KvServer;
use crate::proto::etcdserverpb::lease_server::LeaseServer;
use crate::proto::etcdserverpb::maintenance_server::MaintenanceServer;
use crate::proto::etcdserverpb::watch_server::WatchServer;
use crate::proto::grpc::health::v1::health_server::HealthServer;
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

/// Every service there is. Requests must carry the identity of their connection, see [`crate::tenant`].
pub fn routes(context: &Context, progress_period: Duration) -> Routes {
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
    Routes::new(server!(KvServer, KvService::new(context.clone())))
        .add_service(server!(WatchServer, WatchService::new(context.clone(), progress_period)))
        .add_service(server!(LeaseServer, LeaseService::new(context.clone())))
        .add_service(server!(ClusterServer, ClusterService::new(context.clone())))
        .add_service(server!(MaintenanceServer, MaintenanceService::new(context.clone())))
        .add_service(server!(AuthServer, AuthService::new(context.clone())))
        .add_service(server!(HealthServer, HealthService))
}
