//! The payload of one raft entry: a whole batch of commands.
//!
//! ```text
//! version  u8      1, or 2 if some command came from another member
//! count    u32 le  number of commands
//! count times:
//!   length u32 le
//!   bytes  [length]
//! of version 2, count times:
//!   life   u64 le  0: proposed by the leader's own clients
//!   number u64 le
//! ```
//! No checksum: the log keeps one over the entry. An entry without payload (raft's own, at the start of a term) carries no
//! commands. Frames are persisted and travel between releases, so a layout is never changed: it gets a new version, and
//! an unknown version is refused by name.

use bytes::{Buf, Bytes};

use crate::proposals::Origin;

const PLAIN: u8 = 1;
const WITH_ORIGINS: u8 = 2;

const HEADER_BYTES: usize = 5;
const LENGTH_BYTES: usize = 4;
const ORIGIN_BYTES: usize = 16;

/// Why bytes are not a frame. Committed bytes that are none mean corruption, or a newer release wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("frame version {0} is not known to this release")]
    Version(u8),
    #[error("frame ends early")]
    Truncated,
    #[error("frame has bytes after its last command")]
    Trailing,
}

/// An entry's commands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) commands: Vec<Bytes>,
    /// Which of them came from other members: place and origin, by growing place.
    pub(crate) origins: Vec<(usize, Origin)>,
}

/// Encodes the batch. Together the commands must stay below 4 GiB, which every configured bound is far below.
///
/// # Panics
/// If a command or the count does not fit 32 bits.
pub(crate) fn encode<'a>(commands: impl ExactSizeIterator<Item = (&'a Bytes, Option<Origin>)> + Clone) -> Vec<u8> {
    let count = commands.len();
    let bytes: usize = commands.clone().map(|(command, _)| LENGTH_BYTES + command.len()).sum();
    let has_origins = commands.clone().any(|(_, origin)| origin.is_some());
    let mut frame = Vec::with_capacity(HEADER_BYTES + bytes + if has_origins { count * ORIGIN_BYTES } else { 0 });
    frame.push(if has_origins { WITH_ORIGINS } else { PLAIN });
    frame.extend_from_slice(&length_prefix(count));
    for (command, _) in commands.clone() {
        frame.extend_from_slice(&length_prefix(command.len()));
        frame.extend_from_slice(command);
    }
    if has_origins {
        for (_, origin) in commands {
            let Origin { life, number } = origin.unwrap_or(Origin { life: 0, number: 0 });
            frame.extend_from_slice(&life.to_le_bytes());
            frame.extend_from_slice(&number.to_le_bytes());
        }
    }
    frame
}

/// The commands of an entry, in order, as slices of `frame`: nothing is copied.
///
/// # Errors
/// See [`FrameError`]. Never panics, whatever the bytes.
pub(crate) fn decode(mut frame: Bytes) -> Result<Frame, FrameError> {
    if frame.is_empty() {
        return Ok(Frame::default());
    }
    let version = frame.get_u8();
    if version != PLAIN && version != WITH_ORIGINS {
        return Err(FrameError::Version(version));
    }
    let count = take_length(&mut frame)?;
    // Each command takes its length prefix at least, so a lying count reserves no more than the frame holds.
    let mut commands = Vec::with_capacity(count.min(frame.len() / LENGTH_BYTES));
    for _ in 0..count {
        let length = take_length(&mut frame)?;
        if frame.len() < length {
            return Err(FrameError::Truncated);
        }
        commands.push(frame.split_to(length));
    }
    let mut origins = Vec::new();
    if version == WITH_ORIGINS {
        for place in 0..count {
            if frame.len() < ORIGIN_BYTES {
                return Err(FrameError::Truncated);
            }
            let origin = Origin { life: frame.get_u64_le(), number: frame.get_u64_le() };
            if origin.life != 0 {
                origins.push((place, origin));
            }
        }
    }
    if frame.is_empty() { Ok(Frame { commands, origins }) } else { Err(FrameError::Trailing) }
}

fn length_prefix(length: usize) -> [u8; LENGTH_BYTES] {
    u32::try_from(length).expect("bounds are far below 4 GiB").to_le_bytes()
}

fn take_length(frame: &mut Bytes) -> Result<usize, FrameError> {
    if frame.len() < LENGTH_BYTES { Err(FrameError::Truncated) } else { Ok(frame.get_u32_le() as usize) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(commands: &[Bytes]) -> Vec<u8> {
        encode(commands.iter().map(|command| (command, None)))
    }

    proptest! {
        #[test]
        fn round_trip(commands in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..64), 0u64..3), 0..40)) {
            let origin = |life: u64| (life != 0).then_some(Origin { life, number: life + 7 });
            let bodies: Vec<Bytes> = commands.iter().map(|(body, _)| Bytes::from(body.clone())).collect();
            let lives: Vec<Option<Origin>> = commands.iter().map(|(_, life)| origin(*life)).collect();
            let frame = decode(encode(bodies.iter().zip(lives.iter().copied())).into()).unwrap();
            prop_assert_eq!(&frame.commands, &bodies);
            let expected: Vec<_> = lives.iter().enumerate().filter_map(|(place, life)| Some((place, (*life)?))).collect();
            prop_assert_eq!(frame.origins, expected);
        }

        #[test]
        fn any_bytes_are_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(bytes.into());
        }

        #[test]
        fn every_cut_and_every_tail_is_refused(length in 0usize..64, cut in 1usize..64, tail in 1usize..8, life in 0u64..2) {
            let origin = (life != 0).then_some(Origin { life, number: 3 });
            let frame = encode([(&Bytes::from(vec![7; length]), origin), (&Bytes::new(), None)].into_iter());
            let cut = frame.len().saturating_sub(cut).max(1);
            prop_assert_eq!(decode(frame[..cut].to_vec().into()), Err(FrameError::Truncated));
            let mut longer = frame.clone();
            longer.extend(std::iter::repeat_n(0, tail));
            prop_assert_eq!(decode(longer.into()), Err(FrameError::Trailing));
        }
    }

    #[test]
    fn bytes_on_disk_stay_as_they_are() {
        let frame = plain(&[Bytes::from_static(b"ab"), Bytes::new()]);
        assert_eq!(frame, [1, 2, 0, 0, 0, 2, 0, 0, 0, b'a', b'b', 0, 0, 0, 0]);
        let origin = Origin { life: 5, number: 6 };
        let frame = encode([(&Bytes::from_static(b"a"), Some(origin))].into_iter());
        let expected = [2, 1, 0, 0, 0, 1, 0, 0, 0, b'a', 5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(frame, expected);
        assert_eq!(decode(vec![9].into()), Err(FrameError::Version(9)));
        assert_eq!(decode(Bytes::new()), Ok(Frame::default()));
        // A count of four billion in a frame of five bytes reserves nothing.
        assert_eq!(decode(vec![1, 255, 255, 255, 255].into()), Err(FrameError::Truncated));
    }
}
