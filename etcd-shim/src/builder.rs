//! Putting a member together: what `tenured` does, as a library call.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use tenure_etcd_shim::Tenure;
//!
//! let tenure = Tenure::builder().data_dir("/var/lib/acme/store").tenant("acme").start().await?;
//! let client = tenure.client("acme").ok_or("just made")?;
//! client.put("greeting", "hello").await?;
//! tenure.stop().await;
//! # Ok(())
//! # }
//! ```

use std::path::PathBuf;
use std::time::Duration;

use crate::cell::{Cell, CellConfig, OpenError};
use crate::client::Client;

/// What [`Tenure::builder`] collects.
#[derive(Clone, Debug)]
pub struct Builder {
    cell: CellConfig,
}

/// A running member: the store, and whatever it listens on.
pub struct Tenure {
    cell: Cell,
}

impl Tenure {
    pub fn builder() -> Builder {
        Builder { cell: CellConfig::new("default.tenure") }
    }

    /// The in-process client of a tenant; `None` if there is no such tenant.
    pub fn client(&self, tenant: &str) -> Option<Client> {
        self.cell.tenant(tenant).map(Client::new)
    }

    /// The store itself: its tenants, its state, and whether it has failed.
    pub fn cell(&self) -> &Cell {
        &self.cell
    }

    /// Stops: writes on their way are answered, everything applied is flushed. The data directory is free again when all
    /// clients and watchers are dropped too.
    pub async fn stop(self) {
        self.cell.stop().await;
    }
}

impl Builder {
    /// Where everything is kept; made if it does not exist. Default `default.tenure` in the working directory.
    pub fn data_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.cell.data_dir = path.into();
        self
    }

    /// A tenant that is to exist, beside `default`.
    pub fn tenant(mut self, name: impl Into<String>) -> Self {
        self.cell.tenants.push(name.into());
        self
    }

    /// Bytes each tenant may hold; 0 is 2 GiB, negative is no limit.
    pub fn quota_backend_bytes(mut self, bytes: i64) -> Self {
        self.cell.quota_backend_bytes = bytes;
        self
    }

    /// Longest time without a leader before an election; also decides the shortest lease.
    pub fn election_timeout(mut self, timeout: Duration) -> Self {
        self.cell.election_timeout = timeout;
        self
    }

    /// Opens the store and begins to serve. Must be called in a tokio runtime with more than one thread or with nothing
    /// that blocks it.
    ///
    /// # Errors
    /// [`OpenError`]; nothing runs then.
    pub async fn start(self) -> Result<Tenure, OpenError> {
        Ok(Tenure { cell: Cell::open(self.cell).await? })
    }
}
