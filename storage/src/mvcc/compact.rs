//! Giving back what no read can reach any more, a bounded slice at a time.
//!
//! `Compact(C)` only moves the compact revision. Each reclaim step then walks `rev` from where the last one stopped:
//!
//! - the row of a change at or below C says which version it replaced: that one goes (rows in three families);
//! - a tombstone below C goes itself, and with it the head if the key has not come back. A tombstone exactly at C
//!   stays, because a watch may still start there; the next compaction begins at C again and takes it.
//!
//! So the newest version at or below C of every key that existed at C stays, with its row in `rev`. Walking a row twice
//! does nothing the second time. The steps are commands, so counters stay equal on all members.

use crate::engine::{Cursor, Family, Reader};
use crate::error::Fault;
use crate::key::head::Head;
use crate::key::meta::TenantRow;
use crate::key::{head, rev, version};
use crate::mvcc::overlay::Overlay;
use crate::types::{Revision, TenantId};

/// Runs one step; answers whether rows are left.
pub(crate) fn reclaim<R: Reader>(
    overlay: &mut Overlay<R>,
    tenant: TenantId,
    row: &mut TenantRow,
    rows_max: u32,
) -> Result<bool, Fault> {
    if row.reclaimed_revision == row.compact_revision {
        return Ok(false);
    }
    let rows = read_rows(overlay, tenant, row, rows_max as usize)?;
    let more = rows.len() == rows_max as usize && rows_max > 0;
    for (at, change) in &rows {
        if let Some(previous) = change.previous {
            remove_version(overlay, tenant, row, previous)?;
        }
        if change.tombstone && at.main < row.compact_revision {
            remove_version(overlay, tenant, row, *at)?;
        }
        row.reclaim_cursor = Revision { main: at.main, sub: at.sub + 1 };
    }
    if !more {
        row.reclaimed_revision = row.compact_revision;
        row.reclaim_cursor = Revision { main: row.compact_revision.max(0), sub: 0 };
    }
    Ok(more)
}

fn read_rows<R: Reader>(
    overlay: &Overlay<R>,
    tenant: TenantId,
    row: &TenantRow,
    rows_max: usize,
) -> Result<Vec<(Revision, rev::Row)>, Fault> {
    let bounds = rev::bounds_from(tenant, row.reclaim_cursor);
    let mut cursor = overlay.cursor(Family::Rev, &bounds.lower, &bounds.upper)?;
    let mut rows = Vec::new();
    while let Some((key, value)) = cursor.entry() {
        let at = rev::decode_key(key)?;
        if at.main > row.compact_revision || rows.len() == rows_max {
            break;
        }
        rows.push((at, rev::Row::decode(bytes::Bytes::copy_from_slice(value))?));
        cursor.advance()?;
    }
    Ok(rows)
}

/// Removes the rows of one version, if it is still there.
fn remove_version<R: Reader>(
    overlay: &mut Overlay<R>,
    tenant: TenantId,
    row: &mut TenantRow,
    at: Revision,
) -> Result<(), Fault> {
    assert!(at.main <= row.compact_revision, "only compacted history is reclaimed");
    let rev_key = rev::encode_key(tenant, at);
    let Some(stored) = overlay.get(Family::Rev, &rev_key)? else { return Ok(()) };
    let change = rev::Row::decode(stored)?;
    overlay.delete(Family::Rev, rev_key);
    overlay.delete(Family::Kv, version::encode(tenant, &change.user_key, at, change.tombstone));
    row.usage.versions -= 1;
    row.usage.total_bytes -= change.size_bytes;

    let head_key = head::encode_key(tenant, &change.user_key);
    if change.tombstone
        && let Some(newest) = overlay.get(Family::Head, &head_key)?
        && Head::decode(newest)?.at == at
    {
        overlay.delete(Family::Head, head_key);
    }
    Ok(())
}
