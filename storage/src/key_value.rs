//! The stored form of a version, which is also its wire form.
//!
//! A version is kept exactly as clients will receive it: etcd's KeyValue in canonical protobuf encoding (fields in
//! ascending order, zero values left out, shortest varints). So a read copies bytes and never re-encodes, and a hash
//! over stored bytes equals etcd's (contract 6.4). Only this file knows the encoding.
//!
//! | field | number | type |
//! |---|---|---|
//! | key | 1 | bytes |
//! | create_revision | 2 | varint |
//! | mod_revision | 3 | varint |
//! | version | 4 | varint |
//! | value | 5 | bytes |
//! | lease | 6 | varint |

use bytes::{BufMut, Bytes, BytesMut};

use crate::error::Fault;

const TAG_KEY: u8 = 1 << 3 | 2;
const TAG_CREATE: u8 = 2 << 3;
const TAG_MOD: u8 = 3 << 3;
const TAG_VERSION: u8 = 4 << 3;
const TAG_VALUE: u8 = 5 << 3 | 2;
const TAG_LEASE: u8 = 6 << 3;

/// A version's fields, borrowed from its stored bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyValue<'a> {
    pub key: &'a [u8],
    pub create_revision: i64,
    pub mod_revision: i64,
    pub version: i64,
    pub value: &'a [u8],
    pub lease: i64,
}

impl<'a> KeyValue<'a> {
    /// Length of [`KeyValue::encode`]'s result in bytes.
    pub fn encoded_len(&self) -> usize {
        let number = |n: i64| if n == 0 { 0 } else { 1 + varint_len(n.cast_unsigned()) };
        let string = |s: &[u8]| if s.is_empty() { 0 } else { 1 + varint_len(s.len() as u64) + s.len() };
        string(self.key)
            + number(self.create_revision)
            + number(self.mod_revision)
            + number(self.version)
            + string(self.value)
            + number(self.lease)
    }

    /// The stored form, appended to `out`.
    pub fn encode_to(&self, out: &mut BytesMut) {
        put_string(out, TAG_KEY, self.key);
        put_number(out, TAG_CREATE, self.create_revision);
        put_number(out, TAG_MOD, self.mod_revision);
        put_number(out, TAG_VERSION, self.version);
        put_string(out, TAG_VALUE, self.value);
        put_number(out, TAG_LEASE, self.lease);
    }

    /// The stored form.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.encoded_len());
        self.encode_to(&mut out);
        out.freeze()
    }

    /// Reads the stored form. Accepts only what [`KeyValue::encode`] writes.
    ///
    /// # Errors
    /// [`Fault::Corrupt`]: these bytes came from our own disk.
    pub fn decode(stored: &'a [u8]) -> Result<KeyValue<'a>, Fault> {
        parse(stored)
            .ok_or_else(|| Fault::Corrupt { what: "stored version", key: stored[..stored.len().min(64)].to_vec() })
    }
}

/// What a DELETE event shows: the key and the revision of the deletion.
pub fn encode_tombstone_event(key: &[u8], mod_revision: i64) -> Bytes {
    KeyValue { key, mod_revision, ..KeyValue::default() }.encode()
}

/// What etcd keeps on disk for a tombstone: the key alone. Hashes are computed over this.
pub(crate) fn encode_tombstone_record(key: &[u8]) -> Bytes {
    KeyValue { key, ..KeyValue::default() }.encode()
}

fn parse(mut rest: &[u8]) -> Option<KeyValue<'_>> {
    let mut kv = KeyValue::default();
    let mut last_tag = 0;
    while let Some((&tag, after)) = rest.split_first() {
        if tag <= last_tag {
            return None;
        }
        last_tag = tag;
        let (number, after) = take_varint(after)?;
        rest = after;
        match tag {
            TAG_KEY => (kv.key, rest) = take(rest, number)?,
            TAG_CREATE => kv.create_revision = number.cast_signed(),
            TAG_MOD => kv.mod_revision = number.cast_signed(),
            TAG_VERSION => kv.version = number.cast_signed(),
            TAG_VALUE => (kv.value, rest) = take(rest, number)?,
            TAG_LEASE => kv.lease = number.cast_signed(),
            _ => return None,
        }
    }
    Some(kv)
}

fn take(rest: &[u8], length: u64) -> Option<(&[u8], &[u8])> {
    rest.split_at_checked(usize::try_from(length).ok()?)
}

fn take_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    for (position, byte) in bytes.iter().enumerate().take(10) {
        if position == 9 && *byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << (7 * position);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[position + 1..]));
        }
    }
    None
}

fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8((value & 0x7f) as u8);
}

fn put_number(out: &mut BytesMut, tag: u8, value: i64) {
    if value != 0 {
        out.put_u8(tag);
        put_varint(out, value.cast_unsigned());
    }
}

fn put_string(out: &mut BytesMut, tag: u8, value: &[u8]) {
    if !value.is_empty() {
        out.put_u8(tag);
        put_varint(out, value.len() as u64);
        out.put_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn decode_reads_what_encode_wrote(
            key in prop::collection::vec(any::<u8>(), 0..300), value in prop::collection::vec(any::<u8>(), 0..300),
            numbers in any::<[i64; 4]>(),
        ) {
            let [create_revision, mod_revision, version, lease] = numbers;
            let kv = KeyValue { key: &key, create_revision, mod_revision, version, value: &value, lease };
            let stored = kv.encode();
            prop_assert_eq!(stored.len(), kv.encoded_len());
            prop_assert_eq!(KeyValue::decode(&stored).unwrap(), kv);
        }

        #[test]
        fn decode_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = KeyValue::decode(&bytes);
        }
    }
}
