//! Family lease: granted leases (tag 1) and the keys attached to them (tag 2).
//!
//! Ids are ordered as unsigned numbers, so that negative ones follow positive ones; nothing depends on that order.

use bytes::Bytes;

use super::{Bounds, PREFIX_LEN, prefix, prefix_end};
use crate::codec::{Reader, Writer};
use crate::error::Fault;
use crate::types::{LeaseId, TenantId};

const TAG_GRANT: u8 = 1;
const TAG_KEY: u8 = 2;

pub(crate) fn grant_key(tenant: TenantId, id: LeaseId) -> Vec<u8> {
    let mut key = prefix(tenant, TAG_GRANT, 8);
    key.extend_from_slice(&id.0.to_be_bytes());
    key
}

pub(crate) fn grant_bounds(tenant: TenantId) -> Bounds {
    Bounds { lower: prefix(tenant, TAG_GRANT, 0), upper: prefix_end(tenant, TAG_GRANT) }
}

pub(crate) fn decode_grant_key(key: &[u8]) -> Result<LeaseId, Fault> {
    let id = key.get(PREFIX_LEN..).and_then(|rest| <[u8; 8]>::try_from(rest).ok());
    id.map(|id| LeaseId(i64::from_be_bytes(id))).ok_or_else(|| Fault::Corrupt { what: "lease key", key: key.to_vec() })
}

/// What is kept of a granted lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) ttl_seconds: i64,
    /// How many keys are attached; `None`: nobody has counted them. Kept where [`Rules::lease_keys_max`](crate::Rules) bounds them.
    pub(crate) keys: Option<u64>,
}

impl Grant {
    pub(crate) fn encode(self) -> Bytes {
        let mut w = Writer::with_capacity(13);
        w.i64(self.ttl_seconds);
        if let Some(keys) = self.keys {
            w.varint(keys);
        }
        w.finish()
    }

    pub(crate) fn decode(stored: Bytes) -> Result<Grant, Fault> {
        let mut r = Reader::new(stored, "lease");
        let ttl_seconds = r.i64()?;
        let keys = if r.is_empty() { None } else { Some(r.varint()?) };
        r.end()?;
        Ok(Grant { ttl_seconds, keys })
    }
}

pub(crate) fn attached_key(tenant: TenantId, id: LeaseId, user_key: &[u8]) -> Vec<u8> {
    let mut key = prefix(tenant, TAG_KEY, 8 + user_key.len());
    key.extend_from_slice(&id.0.to_be_bytes());
    key.extend_from_slice(user_key);
    key
}

/// The rows of all keys attached to one lease, in key order.
pub(crate) fn attached_bounds(tenant: TenantId, id: LeaseId) -> Bounds {
    let lower = attached_key(tenant, id, b"");
    let upper = match id.0.cast_unsigned().checked_add(1) {
        Some(next) => attached_key(tenant, LeaseId(next.cast_signed()), b""),
        None => prefix_end(tenant, TAG_KEY),
    };
    Bounds { lower, upper }
}

/// The user key of a row inside [`attached_bounds`].
pub(crate) fn attached_user_key(key: &[u8]) -> &[u8] {
    key.get(PREFIX_LEN + 8..).unwrap_or_default()
}
