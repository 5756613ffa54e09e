//! The payload of one raft entry: a whole batch of commands.
//!
//! ```text
//! version  u8      FRAME_VERSION
//! count    u32 le  number of commands
//! count times:
//!   length u32 le
//!   bytes  [length]
//! ```
//! No checksum: the log keeps one over the entry. An entry without payload (raft's own, at the start of a term) carries no
//! commands. Frames are persisted and travel between releases, so a layout is never changed: it gets a new version, and
//! an unknown version is refused by name.

use bytes::{Buf, Bytes};

/// The layout written today.
pub(crate) const FRAME_VERSION: u8 = 1;

const HEADER_BYTES: usize = 5;
const LENGTH_BYTES: usize = 4;

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

/// Encodes the batch. Together the commands must stay below 4 GiB, which every configured bound is far below.
///
/// # Panics
/// If a command or the count does not fit 32 bits.
pub(crate) fn encode<'a>(commands: impl ExactSizeIterator<Item = &'a Bytes> + Clone) -> Vec<u8> {
    let bytes: usize = commands.clone().map(|command| LENGTH_BYTES + command.len()).sum();
    let mut frame = Vec::with_capacity(HEADER_BYTES + bytes);
    frame.push(FRAME_VERSION);
    frame.extend_from_slice(&length_prefix(commands.len()));
    for command in commands {
        frame.extend_from_slice(&length_prefix(command.len()));
        frame.extend_from_slice(command);
    }
    frame
}

/// The commands of an entry, in order, as slices of `frame`: nothing is copied.
///
/// # Errors
/// See [`FrameError`]. Never panics, whatever the bytes.
pub(crate) fn decode(mut frame: Bytes) -> Result<Vec<Bytes>, FrameError> {
    if frame.is_empty() {
        return Ok(Vec::new());
    }
    let version = frame.get_u8();
    if version != FRAME_VERSION {
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
    if frame.is_empty() { Ok(commands) } else { Err(FrameError::Trailing) }
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

    proptest! {
        #[test]
        fn round_trip(commands in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..40)) {
            let commands: Vec<Bytes> = commands.into_iter().map(Bytes::from).collect();
            prop_assert_eq!(decode(encode(commands.iter()).into()).unwrap(), commands);
        }

        #[test]
        fn any_bytes_are_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(bytes.into());
        }

        #[test]
        fn every_cut_and_every_tail_is_refused(length in 0usize..64, cut in 1usize..64, tail in 1usize..8) {
            let frame = encode([Bytes::from(vec![7; length]), Bytes::new()].iter());
            let cut = frame.len().saturating_sub(cut).max(1);
            prop_assert_eq!(decode(frame[..cut].to_vec().into()), Err(FrameError::Truncated));
            let mut longer = frame.clone();
            longer.extend(std::iter::repeat_n(0, tail));
            prop_assert_eq!(decode(longer.into()), Err(FrameError::Trailing));
        }
    }

    #[test]
    fn bytes_on_disk_stay_as_they_are() {
        let frame = encode([Bytes::from_static(b"ab"), Bytes::new()].iter());
        assert_eq!(frame, [1, 2, 0, 0, 0, 2, 0, 0, 0, b'a', b'b', 0, 0, 0, 0]);
        assert_eq!(decode(vec![9].into()), Err(FrameError::Version(9)));
        assert_eq!(decode(Bytes::new()), Ok(Vec::new()));
        // A count of four billion in a frame of five bytes reserves nothing.
        assert_eq!(decode(vec![1, 255, 255, 255, 255].into()), Err(FrameError::Truncated));
    }
}
