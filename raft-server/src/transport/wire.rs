//! What goes over the wire between members, as bytes.
//!
//! ```text
//! frame:    check u32 le   CRC-32 of the rest
//!           messages, each: length u32 le, kind u8, body
//! kind 1:   raft's message (protobuf)
//! kind 2:   Forward: from, to, term, life, heard, start, end (u64 le each), count u32 le,
//!           count times: number u64 le, lane u32 le, length u32 le, bytes
//! kind 3:   Forwarded: from, to, term, life, next (u64 le each), count u32 le, count times: number u64 le
//! ```
//! TCP's own check is weak, and what arrives here is written to the log as it is: a frame that is not what was sent ends the
//! connection, and raft repeats it. A member of another layout is refused by the version that both ends name.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use protobuf::{CodedInputStream, Message as _};
use raft::eraftpb::Message;

use super::PeerMessage;
use crate::forward::{Forward, Forwarded};

/// The layout written today; a peer that speaks another is refused.
pub(crate) const PEER_VERSION: &str = "1";

const RAFT: u8 = 1;
const FORWARD: u8 = 2;
const FORWARDED: u8 = 3;

const CHECK_BYTES: usize = 4;

/// Bytes that are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame from a peer is damaged: {0}")]
pub(crate) struct DamagedFrame(&'static str);

/// Encodes the messages as one frame.
pub(crate) fn encode(messages: &[PeerMessage]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u32_le(0);
    for message in messages {
        let start = frame.len();
        frame.put_u32_le(0);
        match message {
            PeerMessage::Raft(message) => {
                frame.put_u8(RAFT);
                frame.reserve(message.compute_size() as usize);
                message.write_to_writer(&mut (&mut frame).writer()).expect("a message has no required fields");
            }
            PeerMessage::Forward(message) => {
                frame.put_u8(FORWARD);
                put_forward(&mut frame, message);
            }
            PeerMessage::Forwarded(message) => {
                frame.put_u8(FORWARDED);
                put_forwarded(&mut frame, message);
            }
        }
        let length = u32::try_from(frame.len() - start - CHECK_BYTES).expect("messages are far below 4 GiB");
        frame[start..start + CHECK_BYTES].copy_from_slice(&length.to_le_bytes());
    }
    let check = crc32fast::hash(&frame[CHECK_BYTES..]);
    frame[..CHECK_BYTES].copy_from_slice(&check.to_le_bytes());
    frame.freeze()
}

fn put_forward(frame: &mut BytesMut, message: &Forward) {
    let Forward { from, to, term, life, heard, start, end, commands } = message;
    for number in [from, to, term, life, heard, start, end] {
        frame.put_u64_le(*number);
    }
    frame.put_u32_le(length(commands.len()));
    for (number, lane, command) in commands {
        frame.put_u64_le(*number);
        frame.put_u32_le(*lane);
        frame.put_u32_le(length(command.len()));
        frame.put_slice(command);
    }
}

fn put_forwarded(frame: &mut BytesMut, message: &Forwarded) {
    let Forwarded { from, to, term, life, next, refused } = message;
    for number in [from, to, term, life, next] {
        frame.put_u64_le(*number);
    }
    frame.put_u32_le(length(refused.len()));
    for number in refused {
        frame.put_u64_le(*number);
    }
}

fn length(length: usize) -> u32 {
    u32::try_from(length).expect("bounds are far below 4 GiB")
}

/// The messages of a frame. Byte strings share its buffer.
///
/// # Errors
/// [`DamagedFrame`]. Never panics, whatever the bytes.
pub(crate) fn decode(mut frame: Bytes) -> Result<Vec<PeerMessage>, DamagedFrame> {
    let check = frame.try_get_u32_le().map_err(|_| DamagedFrame("no check"))?;
    if crc32fast::hash(&frame) != check {
        return Err(DamagedFrame("its check differs"));
    }
    let mut messages = Vec::new();
    while frame.has_remaining() {
        let mut body = take_bytes(&mut frame)?;
        let kind = body.try_get_u8().map_err(|_| DamagedFrame("no kind"))?;
        messages.push(match kind {
            RAFT => {
                let mut input = CodedInputStream::from_carllerche_bytes(&body);
                let mut message = Message::default();
                message.merge_from(&mut input).map_err(|_| DamagedFrame("raft's message"))?;
                PeerMessage::Raft(Box::new(message))
            }
            FORWARD => PeerMessage::Forward(take_forward(&mut body)?),
            FORWARDED => PeerMessage::Forwarded(take_forwarded(&mut body)?),
            _ => return Err(DamagedFrame("an unknown kind")),
        });
    }
    Ok(messages)
}

fn take_u64(bytes: &mut Bytes) -> Result<u64, DamagedFrame> {
    bytes.try_get_u64_le().map_err(|_| DamagedFrame("it ends early"))
}

fn take_u32(bytes: &mut Bytes) -> Result<u32, DamagedFrame> {
    bytes.try_get_u32_le().map_err(|_| DamagedFrame("it ends early"))
}

fn take_bytes(bytes: &mut Bytes) -> Result<Bytes, DamagedFrame> {
    let length = take_u32(bytes)? as usize;
    if bytes.len() < length { Err(DamagedFrame("it ends early")) } else { Ok(bytes.split_to(length)) }
}

/// As many numbers as a message begins with.
fn take_numbers<const N: usize>(bytes: &mut Bytes) -> Result<[u64; N], DamagedFrame> {
    let mut numbers = [0; N];
    for number in &mut numbers {
        *number = take_u64(bytes)?;
    }
    Ok(numbers)
}

fn take_forward(bytes: &mut Bytes) -> Result<Forward, DamagedFrame> {
    let [from, to, term, life, heard, start, end] = take_numbers(bytes)?;
    let count = take_u32(bytes)?;
    let commands = (0..count).map(|_| Ok((take_u64(bytes)?, take_u32(bytes)?, take_bytes(bytes)?)));
    let commands = commands.collect::<Result<_, _>>()?;
    Ok(Forward { from, to, term, life, heard, commands, end, start })
}

fn take_forwarded(bytes: &mut Bytes) -> Result<Forwarded, DamagedFrame> {
    let [from, to, term, life, next] = take_numbers(bytes)?;
    let count = take_u32(bytes)?;
    let refused = (0..count).map(|_| take_u64(bytes)).collect::<Result<_, _>>()?;
    Ok(Forwarded { from, to, term, life, next, refused })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use raft::eraftpb::{Entry, MessageType};

    use super::*;

    fn examples() -> Vec<PeerMessage> {
        let mut message = Message { to: 2, from: 1, term: 7, msg_type: MessageType::MsgAppend, ..Message::default() };
        message.entries = vec![Entry { index: 5, term: 7, data: b"data".to_vec().into(), ..Entry::default() }].into();
        let commands = vec![(3, 9, Bytes::from_static(b"put")), (5, 9, Bytes::new())];
        vec![
            PeerMessage::Raft(Box::new(message)),
            PeerMessage::Forward(Forward { from: 1, to: 2, term: 3, life: 4, heard: 5, commands, start: 3, end: 6 }),
            PeerMessage::Forwarded(Forwarded { from: 2, to: 1, term: 3, life: 4, next: 6, refused: vec![5] }),
        ]
    }

    #[test]
    fn what_is_sent_arrives() {
        assert_eq!(decode(encode(&examples())), Ok(examples()));
        assert_eq!(decode(encode(&[])), Ok(vec![]));
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_found(place in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut frame = encode(&examples()).to_vec();
            let place = place.index(frame.len());
            frame[place] ^= 1 << bit;
            prop_assert!(decode(frame.into()).is_err());
        }

        // With a right check too: a peer's bytes never panic here.
        #[test]
        fn any_bytes_are_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut frame = crc32fast::hash(&bytes).to_le_bytes().to_vec();
            frame.extend(bytes);
            let _ = decode(frame.into());
        }
    }
}
