//! Which threads go first where processors are short.
//!
//! A write goes through raft's thread, the log's and apply's, each for some microseconds, and for all tenants. If they compete as equals
//! with threads that always have something to do, which a flood of requests or of large reads makes of those that serve
//! connections and those that read, then each of them waits for the end of somebody's time slice, milliseconds each. So the latter
//! step back ([`step_back`]). Nothing is taken from them while a processor is free.
//!
//! That alone decides who is next when a slice has ended, and the system's slices are milliseconds. So a thread that reads much, or hands
//! out many events, ends its own now and then ([`GaveWay`]): whoever waits for the processor waits for a tenth of a millisecond.

use std::time::{Duration, Instant};

/// Steps of `nice` for threads that serve connections.
pub const SERVING: i32 = 5;

/// For threads that read much.
pub(crate) const READING: i32 = 10;

/// Lowers the priority of the calling thread by so many steps, five of which are to have a third of what it had against others. What the
/// system does not allow is not done.
pub fn step_back(steps: i32) {
    let thread = rustix::thread::gettid();
    let now = rustix::process::getpriority_process(Some(thread)).unwrap_or(0);
    if let Err(error) = rustix::process::setpriority_process(Some(thread), now + steps) {
        tracing::debug!(%error, "lower the priority of a thread");
    }
}

/// How long such a thread works before it lets others in.
const STEP: Duration = Duration::from_micros(100);

/// When a thread let others in last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GaveWay(Option<Instant>);

impl GaveWay {
    pub(crate) const NEVER: GaveWay = GaveWay(None);

    /// Lets other threads in if that is long ago; the first call is the beginning. Costs nothing to speak of while none waits.
    pub(crate) fn again(self, now: Instant) -> Self {
        let Some(at) = self.0 else { return GaveWay(Some(now)) };
        if now.saturating_duration_since(at) < STEP {
            return self;
        }
        std::thread::yield_now();
        // Others' time does not count.
        GaveWay(Some(Instant::now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_thread_itself_steps_back() {
        let of = |thread| rustix::process::getpriority_process(Some(thread)).unwrap();
        let before = of(rustix::thread::gettid());
        let stepped = std::thread::spawn(move || {
            step_back(READING);
            of(rustix::thread::gettid())
        });
        assert_eq!(stepped.join().unwrap(), (before + READING).min(19));
        assert_eq!(of(rustix::thread::gettid()), before);
    }

    #[test]
    fn others_are_let_in_once_a_step() {
        let at = Instant::now();
        let first = GaveWay::NEVER.again(at);
        assert_eq!(first, GaveWay(Some(at)));
        assert_eq!(first.again(at + STEP / 2), first);
        assert!(first.again(at + STEP).0.unwrap() > at);
    }
}
