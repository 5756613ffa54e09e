//! Family kv: every version of every key, newest first.
//!
//! Key: tenant, tag 1, escaped user key, `!main` (8 bytes), `!sub` (4 bytes), 1 if tombstone else 0. A seek to
//! `(user key, r)` so lands on the newest version at or below revision r.

use super::{Bounds, PREFIX_LEN, escape_to, prefix, prefix_end, unescape};
use crate::types::{KeyRange, Revision, TenantId};

const TAG: u8 = 1;
const SUFFIX_LEN: usize = 13;

/// The key of one version.
pub(crate) fn encode(tenant: TenantId, user_key: &[u8], at: Revision, tombstone: bool) -> Vec<u8> {
    let mut key = user_prefix(tenant, user_key);
    push_revision(&mut key, at);
    key.push(u8::from(tombstone));
    key
}

/// Everything before the revision: all versions of one key share it.
pub(crate) fn user_prefix(tenant: TenantId, user_key: &[u8]) -> Vec<u8> {
    let mut key = prefix(tenant, TAG, user_key.len() + 2 + SUFFIX_LEN);
    escape_to(&mut key, user_key);
    key
}

/// Where to seek for the newest version with `main <= at`, behind a [`user_prefix`].
pub(crate) fn push_newest_at(user_prefix: &mut Vec<u8>, at: i64) {
    push_revision(user_prefix, Revision { main: at, sub: u32::MAX });
}

fn push_revision(key: &mut Vec<u8>, at: Revision) {
    assert!(at.main >= 0, "a version has a revision: {}", at.main);
    key.extend_from_slice(&(!at.main.cast_unsigned()).to_be_bytes());
    key.extend_from_slice(&(!at.sub).to_be_bytes());
}

/// The first key behind all versions of the key with this prefix: `00 02` follows the terminator `00 01` and precedes
/// the escape `00 FF` of a longer key.
pub(crate) fn after_user_prefix(user_prefix: &[u8]) -> Vec<u8> {
    let mut key = user_prefix.to_vec();
    if let Some(last) = key.last_mut() {
        assert_eq!(*last, 1, "an escaped key ends in its terminator");
        *last = 2;
    }
    key
}

/// The bounds that hold exactly the versions of the keys in `range`.
pub(crate) fn bounds(tenant: TenantId, range: &KeyRange) -> Bounds {
    match range {
        KeyRange::Single(key) => {
            let lower = user_prefix(tenant, key);
            let upper = after_user_prefix(&lower);
            Bounds { lower, upper }
        }
        KeyRange::HalfOpen { start, end } => {
            Bounds { lower: user_prefix(tenant, start), upper: user_prefix(tenant, end) }
        }
        KeyRange::From(start) => Bounds { lower: user_prefix(tenant, start), upper: prefix_end(tenant, TAG) },
    }
}

/// A decoded version key that still borrows its user part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VersionKey<'a> {
    /// See [`user_prefix`].
    pub(crate) user_prefix: &'a [u8],
    pub(crate) at: Revision,
    pub(crate) tombstone: bool,
}

impl VersionKey<'_> {
    /// The user key; `None` if the escape is broken.
    pub(crate) fn user_key(&self) -> Option<Vec<u8>> {
        unescape(self.user_prefix.get(PREFIX_LEN..)?)
    }
}

/// Splits a key of this family; `None` if it is not one.
pub(crate) fn decode(key: &[u8]) -> Option<VersionKey<'_>> {
    let (user_prefix, suffix) = key.split_at_checked(key.len().checked_sub(SUFFIX_LEN)?)?;
    if user_prefix.len() < PREFIX_LEN + 2 {
        return None;
    }
    let main = !u64::from_be_bytes(suffix.get(..8)?.try_into().ok()?);
    let sub = !u32::from_be_bytes(suffix.get(8..12)?.try_into().ok()?);
    let tombstone = match suffix.get(12)? {
        0 => false,
        1 => true,
        _ => return None,
    };
    Some(VersionKey { user_prefix, at: Revision { main: i64::try_from(main).ok()?, sub }, tombstone })
}

#[doc(hidden)]
pub fn fuzz_decode(key: &[u8]) {
    if let Some(version) = decode(key)
        && let Some(user_key) = version.user_key()
        && let Some(tenant) = key.first_chunk::<4>()
        && key.get(4) == Some(&TAG)
    {
        let tenant = TenantId(u32::from_be_bytes(*tenant));
        assert_eq!(encode(tenant, &user_key, version.at, version.tombstone), key, "decode is the inverse of encode");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn short_key() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xff), any::<u8>()], 0..5)
    }

    proptest! {
        #[test]
        fn order_is_tenant_then_key_then_newest_first(
            a in (0u32..3, short_key(), 0i64..i64::MAX, any::<u32>()), b in (0u32..3, short_key(), 0i64..i64::MAX, any::<u32>()),
        ) {
            let row = |(tenant, key, main, sub): &(u32, Vec<u8>, i64, u32)|
                encode(TenantId(*tenant), key, Revision { main: *main, sub: *sub }, false);
            let logical = |(tenant, key, main, sub): &(u32, Vec<u8>, i64, u32)|
                (*tenant, key.clone(), std::cmp::Reverse((*main, *sub)));
            prop_assert_eq!(row(&a).cmp(&row(&b)), logical(&a).cmp(&logical(&b)));
        }

        #[test]
        fn bounds_hold_exactly_the_range(start in short_key(), end in short_key(), key in short_key(), main in 0i64..9) {
            let at = encode(TenantId(1), &key, Revision { main, sub: 0 }, true);
            for range in [
                KeyRange::Single(start.clone().into()),
                KeyRange::HalfOpen { start: start.clone().into(), end: end.clone().into() },
                KeyRange::From(start.clone().into()),
            ] {
                let bounds = bounds(TenantId(1), &range);
                prop_assert_eq!(range.contains(&key), bounds.lower <= at && at < bounds.upper, "{:?}", range);
            }
        }
    }
}
