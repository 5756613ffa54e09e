//! The admin API of a cell, `tenure.admin.v1`: messages, the client's side and the server's, generated from
//! `proto/tenure/admin/v1/admin.proto`, which says what each call does.
//!
//! A crate of its own, because two crates speak it that have nothing else in common: the edge serves it (`tenure-etcd-shim`), the
//! provisioner and other control planes call it. It holds no logic. Beside the API it has what a certificate says, which both also agree on.

#![allow(clippy::all, clippy::wildcard_enum_match_arm, missing_docs, unreachable_pub)]

/// Version 1.
pub mod v1 {
    tonic::include_proto!("tenure.admin.v1");
}

/// What stands before the tenant's name in the URI SAN of a tenant's client certificate.
pub const TENANT_URI_PREFIX: &str = "tenure://tenant/";

/// The URI SAN of whoever operates the cell.
pub const ADMIN_URI: &str = "tenure://admin";
