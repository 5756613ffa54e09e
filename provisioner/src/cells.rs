//! The cells that this user operates, and which one a tenant belongs to.
//!
//! They are kept in one file, JSON: for each its name, the endpoints of its members' admin API and the files of an
//! administrator's certificate. A cell named on the command line by its endpoints needs no file. Of several endpoints the first that
//! answers is used.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tenure_admin_api::v1 as api;
use tenure_admin_api::v1::admin_client::AdminClient;
use tonic::Code;
use tonic::transport::Channel;

use crate::advice;
use crate::connect::{ConnectError, TlsFiles, connect};
use crate::files::{self, Mode};

/// Where `tenured` with no flags, started in this directory, is administrated.
pub const ENDPOINT_DEFAULT: &str = "unix:./default.tenure/admin.sock";

/// One cell and how it is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    pub name: String,
    pub endpoints: Vec<String>,
    pub tls: TlsFiles,
}

/// What goes wrong, and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum CellsError {
    #[error("read {path}: {error}")]
    Read { path: String, error: std::io::Error },
    #[error("write {path}: {error}")]
    Write { path: String, error: std::io::Error },
    #[error("{path} is no list of cells: {what}; remove it and add them again with tenurectl cell add")]
    Format { path: String, what: String },
    #[error("there is no cell {0:?}: tenurectl cell list shows those there are, cell add adds one")]
    NoCell(String),
    #[error("a cell {0:?} with other endpoints or files is there already: tenurectl cell remove {0} removes it")]
    Exists(String),
    #[error("no member of cell {cell:?} is reached: {error}")]
    Unreachable { cell: String, error: ConnectError },
    #[error("cell {cell:?}: {}", advice::told(.status))]
    Call { cell: String, status: tonic::Status },
    #[error("no cell has a tenant {0:?}: tenurectl tenant list shows those there are")]
    NoTenant(String),
    #[error("tenant {tenant:?} is in cell {cell:?} already: tenants of one fleet have different names")]
    TenantElsewhere { tenant: String, cell: String },
    #[error("tenant {tenant:?} is in each of the cells {cells}: say which with --cell")]
    TenantInSeveral { tenant: String, cells: String },
    #[error(
        "whether tenant {tenant:?} is in cell {cell:?} is not known: {error}; start it, or say --cell NAME for another one"
    )]
    NotAsked { tenant: String, cell: String, error: Box<CellsError> },
    #[error("every cell is full or not reached: tenurectl cell list says why, cell add adds one")]
    NoRoom,
}

/// The file of all cells.
#[derive(Clone, Debug)]
pub struct Cells {
    path: PathBuf,
    pub cells: Vec<Cell>,
}

impl Cells {
    /// Reads the file; one that is not there lists no cells.
    ///
    /// # Errors
    /// [`CellsError::Read`], [`CellsError::Format`].
    pub fn read(path: &Path) -> Result<Self, CellsError> {
        let name = path.display().to_string();
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Cells { path: path.to_path_buf(), cells: Vec::new() });
            }
            Err(error) => return Err(CellsError::Read { path: name, error }),
        };
        let format = |what: String| CellsError::Format { path: name.clone(), what };
        let value: Value = serde_json::from_slice(&text).map_err(|error| format(error.to_string()))?;
        let list =
            value.get("cells").and_then(Value::as_array).ok_or_else(|| format("no \"cells\" in it".to_string()))?;
        let cells = list.iter().map(cell_of).collect::<Option<_>>();
        let cells = cells.ok_or_else(|| format("a cell without name or endpoints".to_string()))?;
        Ok(Cells { path: path.to_path_buf(), cells })
    }

    /// # Errors
    /// [`CellsError::NoCell`].
    pub fn named(&self, name: &str) -> Result<&Cell, CellsError> {
        self.cells.iter().find(|cell| cell.name == name).ok_or_else(|| CellsError::NoCell(name.to_string()))
    }

    /// Adds a cell and writes the file. One that is there as it is given stays: a script may say it again.
    ///
    /// # Errors
    /// [`CellsError::Exists`], [`CellsError::Write`].
    pub fn add(&mut self, cell: Cell) -> Result<(), CellsError> {
        match self.named(&cell.name) {
            Ok(known) if *known == cell => Ok(()),
            Ok(_) => Err(CellsError::Exists(cell.name)),
            Err(_) => {
                self.cells.push(cell);
                self.write()
            }
        }
    }

    /// Takes a cell out and writes the file. The cell goes on.
    ///
    /// # Errors
    /// [`CellsError::NoCell`], [`CellsError::Write`].
    pub fn remove(&mut self, name: &str) -> Result<(), CellsError> {
        self.named(name)?;
        self.cells.retain(|cell| cell.name != name);
        self.write()
    }

    fn write(&self) -> Result<(), CellsError> {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let cells = self.cells.iter().map(|cell| {
            json!({
                "name": cell.name,
                "endpoints": cell.endpoints,
                "cacert": path(&cell.tls.cacert),
                "cert": path(&cell.tls.cert),
                "key": path(&cell.tls.key),
            })
        });
        let text = format!("{:#}\n", json!({ "cells": cells.collect::<Vec<_>>() }));
        let written = self.path.parent().map_or(Ok(()), files::make_dir);
        let written = written.and_then(|()| files::write(&self.path, text.as_bytes(), Mode::Private));
        written.map_err(|error| CellsError::Write { path: self.path.display().to_string(), error })
    }
}

fn cell_of(value: &Value) -> Option<Cell> {
    let file = |name: &str| value.get(name).and_then(Value::as_str).map(PathBuf::from);
    let endpoints = value.get("endpoints")?.as_array()?.iter();
    let endpoints: Vec<String> = endpoints.map(|of| of.as_str().map(str::to_string)).collect::<Option<_>>()?;
    (!endpoints.is_empty()).then_some(())?;
    let tls = TlsFiles { cacert: file("cacert"), cert: file("cert"), key: file("key") };
    Some(Cell { name: value.get("name")?.as_str()?.to_string(), endpoints, tls })
}

/// A cell that answers.
#[derive(Clone)]
pub struct Reached {
    pub cell: Cell,
    pub client: AdminClient<Channel>,
    pub status: api::GetCellResponse,
}

impl Cell {
    /// Connects to the first member that answers.
    ///
    /// # Errors
    /// [`CellsError::Unreachable`] with what the last one said, [`CellsError::Call`].
    pub async fn reach(&self) -> Result<Reached, CellsError> {
        let mut last = None;
        for endpoint in &self.endpoints {
            let mut client = match connect(endpoint, &self.tls).await {
                Ok(client) => client,
                Err(error) => {
                    last = Some(CellsError::Unreachable { cell: self.name.clone(), error });
                    continue;
                }
            };
            match client.get_cell(api::GetCellRequest {}).await {
                Ok(status) => return Ok(Reached { cell: self.clone(), client, status: status.into_inner() }),
                Err(status) => last = Some(self.call_error(status)),
            }
        }
        let none = || ConnectError::Endpoint(String::new());
        Err(last.unwrap_or_else(|| CellsError::Unreachable { cell: self.name.clone(), error: none() }))
    }

    /// A call to this cell that failed.
    pub fn call_error(&self, status: tonic::Status) -> CellsError {
        CellsError::Call { cell: self.name.clone(), status }
    }
}

/// How full a cell is; the least is taken first.
fn load(status: &api::GetCellResponse) -> (u64, u64) {
    (status.stored_bytes, status.tenants)
}

/// The least loaded of these cells that has room.
///
/// # Errors
/// [`CellsError::NoRoom`].
pub fn place(reached: Vec<Reached>) -> Result<Reached, CellsError> {
    let has_room = |cell: &Reached| cell.status.tenants < cell.status.tenants_max;
    reached.into_iter().filter(has_room).min_by_key(|cell| load(&cell.status)).ok_or(CellsError::NoRoom)
}

/// The tenant of that name, and the cell it is in, of these.
///
/// # Errors
/// [`CellsError::NoTenant`], [`CellsError::TenantInSeveral`]; [`CellsError::Call`] if a cell answers something else.
pub async fn find(reached: Vec<Reached>, tenant: &str) -> Result<(Reached, api::Tenant), CellsError> {
    let mut found = Vec::new();
    for mut cell in reached {
        match cell.client.get_tenant(api::GetTenantRequest { name: tenant.to_string() }).await {
            Ok(answer) => found.push((cell, answer.into_inner().tenant.unwrap_or_default())),
            Err(status) if status.code() == Code::NotFound => {}
            Err(status) => return Err(cell.cell.call_error(status)),
        }
    }
    if found.len() > 1 {
        let cells = found.iter().map(|(cell, _)| cell.cell.name.as_str()).collect::<Vec<_>>().join(", ");
        return Err(CellsError::TenantInSeveral { tenant: tenant.to_string(), cells });
    }
    found.pop().ok_or_else(|| CellsError::NoTenant(tenant.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(name: &str) -> Cell {
        let tls = TlsFiles { cacert: Some("ca.crt".into()), cert: Some("a.crt".into()), key: Some("a.key".into()) };
        Cell { name: name.to_string(), endpoints: vec!["https://10.0.0.1:2382".to_string()], tls }
    }

    #[test]
    fn cells_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tenure/cells.json");
        let mut cells = Cells::read(&path).unwrap();
        cells.add(cell("east")).unwrap();
        cells.add(Cell { tls: TlsFiles::default(), ..cell("west") }).unwrap();
        cells.add(cell("east")).unwrap();
        assert_eq!(cells.cells.len(), 2, "said again");
        let elsewhere = Cell { endpoints: vec!["https://10.0.0.2:2382".to_string()], ..cell("east") };
        assert!(matches!(cells.add(elsewhere), Err(CellsError::Exists(_))));
        let again = Cells::read(&path).unwrap();
        assert_eq!(again.cells, cells.cells);
        cells.remove("east").unwrap();
        assert!(matches!(cells.remove("east"), Err(CellsError::NoCell(_))));
        assert_eq!(Cells::read(&path).unwrap().cells.len(), 1);
        for nonsense in ["", "[]", "{\"cells\": [{}]}", "{\"cells\": [{\"name\": \"a\", \"endpoints\": []}]}"] {
            std::fs::write(&path, nonsense).unwrap();
            assert!(matches!(Cells::read(&path), Err(CellsError::Format { .. })), "{nonsense}");
        }
    }
}
