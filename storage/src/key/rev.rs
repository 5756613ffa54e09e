//! Family rev: one row per kept version, in the order things happened. Watches replay it, compaction walks it, hashes
//! follow it.
//!
//! Key: tenant, tag 1, main (8 bytes), sub (4 bytes).

use bytes::Bytes;

use super::{Bounds, PREFIX_LEN, prefix, prefix_end};
use crate::codec::{Reader, Writer};
use crate::error::Fault;
use crate::types::{Revision, TenantId};

const TAG: u8 = 1;

/// What happened at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) tombstone: bool,
    /// The version this one replaced, tombstones included; `None` if there was none.
    pub(crate) previous: Option<Revision>,
    /// What this version counts in `Usage::total_bytes`.
    pub(crate) size_bytes: u64,
    pub(crate) user_key: Bytes,
}

pub(crate) fn encode_key(tenant: TenantId, at: Revision) -> Vec<u8> {
    assert!(at.main >= 0, "history starts at 0");
    let mut key = prefix(tenant, TAG, 12);
    key.extend_from_slice(&at.main.to_be_bytes());
    key.extend_from_slice(&at.sub.to_be_bytes());
    key
}

pub(crate) fn decode_key(key: &[u8]) -> Result<Revision, Fault> {
    let parse = || {
        let (main, sub) = key.get(PREFIX_LEN..)?.split_at_checked(8)?;
        Some(Revision {
            main: i64::from_be_bytes(main.try_into().ok()?),
            sub: u32::from_be_bytes(sub.try_into().ok()?),
        })
    };
    parse().ok_or_else(|| Fault::Corrupt { what: "rev key", key: key.to_vec() })
}

/// Rows from `from` on, to the end of the tenant's history.
pub(crate) fn bounds_from(tenant: TenantId, from: Revision) -> Bounds {
    Bounds { lower: encode_key(tenant, from), upper: prefix_end(tenant, TAG) }
}

impl Row {
    pub(crate) fn encode(&self) -> Bytes {
        let mut w = Writer::with_capacity(self.user_key.len() + 24);
        w.u8(u8::from(self.tombstone) | u8::from(self.previous.is_some()) << 1);
        if let Some(previous) = self.previous {
            w.i64(previous.main);
            w.varint(u64::from(previous.sub));
        }
        w.varint(self.size_bytes);
        w.tail(&self.user_key);
        w.finish()
    }

    pub(crate) fn decode(stored: Bytes) -> Result<Row, Fault> {
        let mut r = Reader::new(stored, "rev row");
        let flags = r.u8()?;
        if flags > 3 {
            return Err(r.corrupt("rev row flags"));
        }
        let previous = if flags & 2 != 0 { Some(Revision { main: r.i64()?, sub: r.varint_u32()? }) } else { None };
        Ok(Row { tombstone: flags & 1 != 0, previous, size_bytes: r.varint()?, user_key: r.tail() })
    }
}
