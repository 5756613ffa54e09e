//! Looking at protobuf messages where they lie: the few fields a load generator wants of an answer, without decoding the rest.
//! A message that makes no sense reads as if it ended there; the generator counts what it then misses as an error.

/// One field's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    /// Four or eight bytes, of no interest here.
    Fixed,
}

/// The fields of a message, in the order they were written.
pub fn fields(message: &[u8]) -> impl Iterator<Item = (u64, Value<'_>)> {
    let mut rest = message;
    std::iter::from_fn(move || {
        let key = varint(&mut rest)?;
        let value = match key & 7 {
            0 => Value::Varint(varint(&mut rest)?),
            1 => take(&mut rest, 8).map(|_| Value::Fixed)?,
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                Value::Bytes(take(&mut rest, length)?)
            }
            5 => take(&mut rest, 4).map(|_| Value::Fixed)?,
            _ => return None,
        };
        Some((key >> 3, value))
    })
}

/// The last varint of that number, 0 if there is none.
pub fn integer(message: &[u8], number: u64) -> u64 {
    fields(message)
        .filter_map(|(at, value)| match value {
            Value::Varint(value) if at == number => Some(value),
            Value::Varint(_) | Value::Bytes(_) | Value::Fixed => None,
        })
        .last()
        .unwrap_or(0)
}

/// Every message or byte string of that number.
pub fn submessages(message: &[u8], number: u64) -> impl Iterator<Item = &[u8]> {
    fields(message).filter_map(move |(at, value)| match value {
        Value::Bytes(bytes) if at == number => Some(bytes),
        Value::Varint(_) | Value::Bytes(_) | Value::Fixed => None,
    })
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, behind) = rest.split_first()?;
        *rest = behind;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, behind) = rest.split_at_checked(length)?;
    *rest = behind;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use tenure_etcd_shim::proto::etcdserverpb::{PutRequest, ResponseHeader};

    use super::*;

    #[test]
    fn reads_what_prost_writes() {
        let header = ResponseHeader { cluster_id: 7, member_id: u64::MAX, revision: 300, raft_term: 0 }.encode_to_vec();
        assert_eq!(
            [integer(&header, 1), integer(&header, 2), integer(&header, 3), integer(&header, 4)],
            [7, u64::MAX, 300, 0]
        );
        let put = PutRequest { key: "k".into(), value: vec![1; 200].into(), ..PutRequest::default() }.encode_to_vec();
        assert_eq!(submessages(&put, 2).next(), Some(&[1u8; 200][..]));
        assert_eq!(fields(&put[..put.len() - 1]).count(), 1, "a cut message ends before what is cut");
    }
}
