//! Bytes as they might lie on disk: keys of rows and stored versions. Nothing panics, what decodes encodes back to the
//! same bytes, and encoding keeps order.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tenure_storage::fuzz::{decode_version_key, escape, unescape};
use tenure_storage::key_value::KeyValue;

/// Two keys of whatever length, and what follows each of them in a row's key.
#[derive(Debug, arbitrary::Arbitrary)]
struct Input<'a> {
    bytes: &'a [u8],
    a: (&'a [u8], [u8; 4]),
    b: (&'a [u8], [u8; 4]),
    numbers: [i64; 4],
}

fuzz_target!(|input: Input<'_>| {
    let Input { bytes, a, b, numbers } = input;
    decode_version_key(bytes);
    if let Some(key) = unescape(bytes) {
        assert_eq!(escape(&key), bytes, "one escaped form per key");
    }
    if let Ok(kv) = KeyValue::decode(bytes) {
        let again = kv.encode();
        assert_eq!(KeyValue::decode(&again).ok(), Some(kv));
    }

    let row = |(key, tail): (&[u8], [u8; 4])| [&escape(key)[..], &tail].concat();
    assert_eq!(unescape(&escape(a.0)).as_deref(), Some(a.0));
    if a.0 == b.0 {
        assert_eq!(row(a).cmp(&row(b)), a.1.cmp(&b.1), "what follows decides among rows of one key");
    } else {
        assert_eq!(row(a).cmp(&row(b)), a.0.cmp(b.0), "the key decides, whatever follows");
    }

    let [create_revision, mod_revision, version, lease] = numbers;
    let kv = KeyValue { key: a.0, create_revision, mod_revision, version, value: b.0, lease };
    let stored = kv.encode();
    assert_eq!(stored.len(), kv.encoded_len());
    assert_eq!(KeyValue::decode(&stored).ok(), Some(kv));
});
