//! A cell for tests of the services, with the tenants `default` and `other`.

use tonic::Request;

use crate::cell::{Cell, CellConfig, MemberNames, Tenant};
use crate::inflight::{Budget, InFlight, OpenRequests};
use crate::service::{Context, Limits};
use crate::tenant::ConnectionIdentity;

pub(crate) struct TestCell {
    cell: Cell,
    // Behind the cell, so that it is dropped after it.
    _dir: tempfile::TempDir,
}

impl TestCell {
    pub(crate) async fn open() -> TestCell {
        TestCell::with_quota(0).await
    }

    /// 0 = the default quota.
    pub(crate) async fn with_quota(quota_backend_bytes: i64) -> TestCell {
        let dir = tempfile::tempdir().unwrap();
        let names = MemberNames {
            name: "default".to_string(),
            peer_urls: vec!["http://localhost:2380".to_string()],
            client_urls: vec!["http://localhost:2379".to_string()],
            tenant_client_urls: [("other".to_string(), vec!["http://localhost:2401".to_string()])].into(),
        };
        let tenants = vec!["other".to_string()];
        let config = CellConfig { quota_backend_bytes, tenants, names, ..CellConfig::new(dir.path()) };
        TestCell { cell: Cell::open(config).await.unwrap(), _dir: dir }
    }

    pub(crate) fn tenant(&self, name: &str) -> Tenant {
        self.cell.tenant(name).unwrap()
    }

    pub(crate) fn context(&self) -> Context {
        Context {
            cell: self.cell.clone(),
            limits: Limits::default(),
            in_flight: InFlight::new(Budget::default(), OpenRequests::default()),
        }
    }
}

/// What a connection of this tenant carries.
pub(crate) fn identity(tenant: &str) -> ConnectionIdentity {
    ConnectionIdentity::for_tests(tenant)
}

/// A request as it comes in on a connection of this tenant.
pub(crate) fn request<T>(tenant: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(identity(tenant));
    request
}
