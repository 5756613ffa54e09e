//! Family head: the newest version of every key without its value. Compares, existence checks and counts read only this.
//!
//! Key: tenant, tag 1, user key. A deleted key keeps its head (as a tombstone) until the tombstone is reclaimed, because a
//! read at an older revision must still find that the key once existed.

use bytes::Bytes;

use super::{Bounds, PREFIX_LEN, prefix, raw_bounds};
use crate::codec::{Reader, Writer};
use crate::error::Fault;
use crate::types::{KeyRange, LeaseId, Revision, TenantId};

const TAG: u8 = 1;

/// The newest version of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) at: Revision,
    /// True when the key does not exist now; the other fields are then zero.
    pub(crate) tombstone: bool,
    pub(crate) create_revision: i64,
    /// Puts since creation, from 1.
    pub(crate) version: i64,
    pub(crate) lease: LeaseId,
    /// What this version counts in `Usage::total_bytes`.
    pub(crate) size_bytes: u64,
}

pub(crate) fn encode_key(tenant: TenantId, user_key: &[u8]) -> Vec<u8> {
    let mut key = prefix(tenant, TAG, user_key.len());
    key.extend_from_slice(user_key);
    key
}

/// The user key of a key of this family.
pub(crate) fn user_key(key: &[u8]) -> &[u8] {
    key.get(PREFIX_LEN..).unwrap_or_default()
}

pub(crate) fn bounds(tenant: TenantId, range: &KeyRange) -> Bounds {
    raw_bounds(tenant, TAG, range)
}

impl Head {
    pub(crate) fn encode(&self) -> Bytes {
        let mut w = Writer::with_capacity(32);
        w.u8(u8::from(self.tombstone));
        w.i64(self.at.main);
        w.varint(u64::from(self.at.sub));
        w.varint(self.size_bytes);
        if !self.tombstone {
            w.i64(self.create_revision);
            w.i64(self.version);
            w.i64(self.lease.0);
        }
        w.finish()
    }

    pub(crate) fn decode(stored: Bytes) -> Result<Head, Fault> {
        let mut r = Reader::new(stored, "head");
        let tombstone = r.bool()?;
        let at = Revision { main: r.i64()?, sub: r.varint_u32()? };
        let size_bytes = r.varint()?;
        let mut head = Head { at, tombstone, create_revision: 0, version: 0, lease: LeaseId::NONE, size_bytes };
        if !tombstone {
            head.create_revision = r.i64()?;
            head.version = r.i64()?;
            head.lease = LeaseId(r.i64()?);
            if head.create_revision > at.main || head.version < 1 {
                return Err(r.corrupt("head"));
            }
        }
        r.end()?;
        Ok(head)
    }
}
