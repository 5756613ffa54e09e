//! Lines of the log that a client can cause as often as it likes: so many a second are written, and the next one says how many were not.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lines in one [`PERIOD`].
const LINES: u32 = 20;

const PERIOD: Duration = Duration::from_secs(1);

/// One kind of line.
#[derive(Debug, Default)]
pub(crate) struct Seldom(Mutex<Count>);

#[derive(Debug, Default)]
struct Count {
    began: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Seldom {
    /// Whether a line may be written now: how many were left out before it, if it may.
    pub(crate) fn line(&self, now: Instant) -> Option<u64> {
        let mut count = self.0.lock();
        if count.began.is_none_or(|began| now.saturating_duration_since(began) >= PERIOD) {
            (count.began, count.lines) = (Some(now), 0);
        }
        if count.lines == LINES {
            count.left_out += 1;
            return None;
        }
        count.lines += 1;
        Some(std::mem::take(&mut count.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_and_not_written() {
        let (seldom, start) = (Seldom::default(), Instant::now());
        let written =
            |from: u64| (0..100).filter_map(|ms| seldom.line(start + Duration::from_millis(from + ms))).collect();
        let first: Vec<u64> = written(0);
        assert_eq!(first, [0; LINES as usize]);
        let second: Vec<u64> = written(1_000);
        assert_eq!((second[0], &second[1..]), (100 - u64::from(LINES), &[0; LINES as usize - 1][..]));
    }
}
