//! HashKV: a hash over history that two members, or a member and a real etcd, can compare (contract 6.4).

use std::ops::ControlFlow;

use bytes::Bytes;

use super::read;
use crate::engine::{Cursor, Family, Reader};
use crate::error::Fault;
use crate::key::rev;
use crate::key_value;
use crate::types::{KeyRange, Revision, TenantId};

/// CRC-32C over the versions at or below `hash_revision`, in the order they happened, in etcd's own record format.
///
/// Left out, as in etcd: what the compaction at `compact_revision` makes unreachable (whether it is reclaimed yet or not)
/// and tombstones exactly at it.
pub(crate) fn hash<R: Reader>(
    reader: &R,
    tenant: TenantId,
    hash_revision: i64,
    compact_revision: i64,
) -> Result<u32, Fault> {
    if hash_revision < 0 {
        return Ok(crc32c::crc32c(b"key"));
    }
    let keeps_anything = exists_any(reader, tenant, hash_revision)?;
    let mut hash = crc32c::crc32c(b"key");
    let bounds = rev::bounds_from(tenant, Revision { main: 0, sub: 0 });
    let mut cursor = reader.cursor(Family::Rev, &bounds.lower, &bounds.upper)?;
    while let Some((key, value)) = cursor.entry() {
        let at = rev::decode_key(key)?;
        if at.main > hash_revision {
            break;
        }
        let change = rev::Row::decode(Bytes::copy_from_slice(value))?;
        if is_hashed(reader, tenant, at, &change, hash_revision, compact_revision, keeps_anything)? {
            hash = crc32c::crc32c_append(hash, &record_key(at, change.tombstone));
            let record = match change.tombstone {
                true => key_value::encode_tombstone_record(&change.user_key),
                false => read::stored(reader, tenant, &change.user_key, at)?,
            };
            hash = crc32c::crc32c_append(hash, &record);
        }
        cursor.advance()?;
    }
    Ok(hash)
}

fn is_hashed<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: Revision,
    change: &rev::Row,
    hash_revision: i64,
    compact_revision: i64,
    keeps_anything: bool,
) -> Result<bool, Fault> {
    if change.tombstone && at.main == compact_revision {
        return Ok(false);
    }
    if at.main > compact_revision || !keeps_anything {
        return Ok(true);
    }
    if change.tombstone {
        return Ok(false);
    }
    Ok(read::newest_at(reader, tenant, &change.user_key, hash_revision)? == Some(at))
}

fn exists_any<R: Reader>(reader: &R, tenant: TenantId, at: i64) -> Result<bool, Fault> {
    let mut found = false;
    read::visit(reader, tenant, at, &KeyRange::From(Bytes::new()), &mut |_: &[u8]| {
        found = true;
        ControlFlow::Break(())
    })?;
    Ok(found)
}

/// etcd's record key: main, `_`, sub (both 8 bytes), `t` for a tombstone.
fn record_key(at: Revision, tombstone: bool) -> Vec<u8> {
    let mut key = Vec::with_capacity(18);
    key.extend_from_slice(&at.main.to_be_bytes());
    key.push(b'_');
    key.extend_from_slice(&u64::from(at.sub).to_be_bytes());
    if tombstone {
        key.push(b't');
    }
    key
}
