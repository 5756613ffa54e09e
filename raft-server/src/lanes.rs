//! Where proposals wait for the next batch: one queue per lane, served in deficit round robin by bytes.
//!
//! A command has a *length*, which is what it takes while it waits, and a *cost*, which is what counts for turns and batches: its length, or
//! more if it does more than it says.
//!
//! A *lane* is an opaque number (the layers above use the tenant's). Each turn a lane may send [`QUANTUM_BYTES`]; what it
//! does not use because its next command is larger stays its own for the next turn. So while several lanes wait, each
//! gets the same share of bytes, whatever the size and number of its commands. A lane costs nothing while it is empty:
//! it exists from its first waiting command to its last.
//!
//! Bounds. A lane holds at most `lane_bytes_max`, and never more than what all lanes together leave free. The second
//! rule keeps room for newcomers: with n lanes pushing without end each settles at 1/(n+1) of `total_bytes_max`, and
//! a lane that was quiet finds the last share free. At either bound the push is refused.

use std::collections::{HashMap, VecDeque};

use crate::error::ProposeError;

/// Bytes a lane may send per turn.
pub(crate) const QUANTUM_BYTES: usize = 64 << 10;

/// Counted for each command besides its length: what it costs to carry an empty one.
pub(crate) const COMMAND_OVERHEAD_BYTES: usize = 64;

/// See the module's essay. `T` is what waits; its size is told by the caller.
pub(crate) struct Lanes<T> {
    lanes: HashMap<u32, Lane<T>>,
    /// The lanes that hold something, each once, in the order of their turns.
    turns: VecDeque<u32>,
    bytes: usize,
    cost_bytes: usize,
    items: usize,
    lane_bytes_max: usize,
    total_bytes_max: usize,
    closed: bool,
}

struct Lane<T> {
    queue: VecDeque<Queued<T>>,
    /// Of their lengths.
    bytes: usize,
    /// What it may still send in this turn.
    deficit: usize,
    /// Whether it stands in a turn that a full batch interrupted: it gets no second quantum for it.
    in_turn: bool,
}

struct Queued<T> {
    bytes: usize,
    cost_bytes: usize,
    item: T,
}

/// Why a push was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PushError {
    Full,
    Closed,
}

impl From<PushError> for ProposeError {
    fn from(error: PushError) -> Self {
        match error {
            PushError::Full => ProposeError::QueueFull,
            PushError::Closed => ProposeError::Stopped,
        }
    }
}

impl<T> Lanes<T> {
    pub(crate) fn new(lane_bytes_max: usize, total_bytes_max: usize) -> Self {
        let (lanes, turns) = (HashMap::new(), VecDeque::new());
        Lanes { lanes, turns, bytes: 0, cost_bytes: 0, items: 0, lane_bytes_max, total_bytes_max, closed: false }
    }

    /// Bytes waiting in all lanes, overheads included.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// What those that wait cost, overheads included.
    pub(crate) fn cost_bytes(&self) -> usize {
        self.cost_bytes
    }

    /// Whether [`Lanes::take_batch`] would give as much as it may.
    pub(crate) fn has_full_batch(&self, cost_bytes_max: usize, items_max: usize) -> bool {
        self.cost_bytes >= cost_bytes_max || self.items >= items_max
    }

    /// Commands waiting in all lanes.
    pub(crate) fn items(&self) -> usize {
        self.items
    }

    /// Adds an item, or gives it back with the reason.
    pub(crate) fn push(
        &mut self,
        lane: u32,
        command_bytes: usize,
        cost_bytes: usize,
        item: T,
    ) -> Result<(), (PushError, T)> {
        if self.closed {
            return Err((PushError::Closed, item));
        }
        let bytes = command_bytes + COMMAND_OVERHEAD_BYTES;
        let held = self.lanes.get(&lane).map_or(0, |lane| lane.bytes);
        let free = self.total_bytes_max.saturating_sub(self.bytes);
        if held + bytes > self.lane_bytes_max.min(free) {
            return Err((PushError::Full, item));
        }
        let turns = &mut self.turns;
        let entry = self.lanes.entry(lane).or_insert_with(|| {
            turns.push_back(lane);
            Lane { queue: VecDeque::new(), bytes: 0, deficit: 0, in_turn: false }
        });
        let cost_bytes = cost_bytes.max(command_bytes) + COMMAND_OVERHEAD_BYTES;
        entry.queue.push_back(Queued { bytes, cost_bytes, item });
        entry.bytes += bytes;
        self.bytes += bytes;
        self.cost_bytes += cost_bytes;
        self.items += 1;
        Ok(())
    }

    /// The next batch: at most `items_max`, and of a cost of at most `cost_bytes_max` unless its only item has more. Empty only if
    /// nothing waits.
    pub(crate) fn take_batch(&mut self, cost_bytes_max: usize, items_max: usize) -> Vec<T> {
        assert!(items_max > 0, "a batch has room for one");
        let mut batch = Vec::with_capacity(self.items.min(items_max));
        let mut batch_cost_bytes = 0;
        while let Some(&id) = self.turns.front() {
            let lane = self.lanes.get_mut(&id).expect("a lane with a turn exists");
            if !lane.in_turn {
                lane.deficit += QUANTUM_BYTES;
                lane.in_turn = true;
            }
            while let Some(&Queued { cost_bytes, .. }) = lane.queue.front() {
                if cost_bytes > lane.deficit {
                    break;
                }
                if batch.len() == items_max || (!batch.is_empty() && batch_cost_bytes + cost_bytes > cost_bytes_max) {
                    return batch;
                }
                let Queued { bytes, item, .. } = lane.queue.pop_front().expect("the front was there");
                lane.deficit -= cost_bytes;
                lane.bytes -= bytes;
                self.bytes -= bytes;
                self.cost_bytes -= cost_bytes;
                self.items -= 1;
                batch_cost_bytes += cost_bytes;
                batch.push(item);
            }
            self.turns.pop_front();
            if lane.queue.is_empty() {
                self.lanes.remove(&id);
            } else {
                lane.in_turn = false;
                self.turns.push_back(id);
            }
        }
        batch
    }

    /// Refuses every later push and gives back what waits.
    pub(crate) fn close(&mut self) -> Vec<T> {
        self.closed = true;
        self.drain()
    }

    /// Gives back what waits, lane by lane.
    fn drain(&mut self) -> Vec<T> {
        let turns = std::mem::take(&mut self.turns);
        let lanes = turns.into_iter().filter_map(|id| self.lanes.remove(&id));
        let drained = lanes.flat_map(|lane| lane.queue).map(|queued| queued.item).collect();
        assert!(self.lanes.is_empty(), "a lane that holds something has a turn");
        (self.bytes, self.cost_bytes, self.items) = (0, 0, 0);
        drained
    }

    /// Drops the items that `keep` does not want.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for lane in self.lanes.values_mut() {
            lane.queue.retain(|Queued { bytes, cost_bytes, item }| {
                let kept = keep(item);
                if !kept {
                    lane.bytes -= bytes;
                    self.bytes -= bytes;
                    self.cost_bytes -= cost_bytes;
                    self.items -= 1;
                }
                kept
            });
        }
        self.lanes.retain(|_, lane| !lane.queue.is_empty());
        let lanes = &self.lanes;
        self.turns.retain(|id| lanes.contains_key(id));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 1 << 20;

    fn shares(taken: &[(u32, usize)]) -> HashMap<u32, usize> {
        let mut bytes = HashMap::new();
        for (lane, size) in taken {
            *bytes.entry(*lane).or_default() += size + COMMAND_OVERHEAD_BYTES;
        }
        bytes
    }

    // A lane of many small commands and a lane of few large ones get the same bytes, and a lane that arrives
    // late gets its share of the very next batches.
    #[test]
    fn lanes_share_by_bytes_not_by_commands() {
        let mut lanes = Lanes::new(64 * MIB, 256 * MIB);
        for _ in 0..20_000 {
            lanes.push(1, 300, 0, (1, 300)).unwrap();
        }
        for _ in 0..100 {
            lanes.push(2, 50_000, 0, (2, 50_000)).unwrap();
        }
        let taken: Vec<_> = (0..4).flat_map(|_| lanes.take_batch(MIB, 10_000)).collect();
        let bytes = shares(&taken);
        assert!(bytes[&1].abs_diff(bytes[&2]) <= 2 * QUANTUM_BYTES, "{bytes:?}");

        lanes.push(3, 10, 0, (3, 10)).unwrap();
        let next = lanes.take_batch(MIB, 10_000);
        assert!(next.contains(&(3, 10)), "a newcomer waits for one round, not for the backlog");
    }

    // One lane that pushes without end cannot take the room of a lane that was quiet.
    #[test]
    fn greedy_lanes_leave_room_for_a_quiet_one() {
        let mut lanes = Lanes::new(MIB, MIB);
        let mut pushed = [0; 3];
        loop {
            let before = pushed;
            for lane in 0..3u32 {
                if lanes.push(lane, 1000, 0, ()).is_ok() {
                    pushed[lane as usize] += 1;
                }
            }
            if pushed == before {
                break;
            }
        }
        assert!(pushed.iter().all(|&n| (240..=250).contains(&n)), "a quarter each: {pushed:?}");
        assert_eq!(lanes.push(0, 1000, 0, ()), Err((PushError::Full, ())));
        for _ in 0..100 {
            lanes.push(9, 1000, 0, ()).unwrap();
        }
    }

    #[test]
    fn empty_lanes_cost_nothing_and_large_commands_pass() {
        let mut lanes = Lanes::new(64 * MIB, 256 * MIB);
        lanes.push(1, 10 * MIB, 0, "large").unwrap();
        lanes.push(2, 1, 0, "small").unwrap();
        let mut order = Vec::new();
        while lanes.items() > 0 {
            order.extend(lanes.take_batch(MIB, 100));
        }
        // The large one saves up for its turn; it passes alone although it is larger than a batch.
        assert_eq!(order, ["small", "large"]);
        assert_eq!((lanes.lanes.len(), lanes.turns.len(), lanes.bytes()), (0, 0, 0));
        assert_eq!(lanes.close(), Vec::<&str>::new());
        assert_eq!(lanes.push(1, 1, 0, "late"), Err((PushError::Closed, "late")));
    }

    // Those that do much wait like others, whatever they cost, and go alone.
    #[test]
    fn the_cost_of_commands_bounds_batches_not_queues() {
        let mut lanes = Lanes::new(4096, 8192);
        for dear in ["a", "b", "c"] {
            lanes.push(1, 10, MIB, dear).unwrap();
        }
        assert!(lanes.has_full_batch(MIB, 100) && !lanes.has_full_batch(4 * MIB, 4), "as batches are taken");
        lanes.push(2, 10, 0, "cheap").unwrap();
        let batches: Vec<_> = (0..4).map(|_| lanes.take_batch(MIB, 100)).collect();
        assert_eq!(batches, [vec!["cheap"], vec!["a"], vec!["b"], vec!["c"]]);
        assert_eq!((lanes.bytes(), lanes.cost_bytes()), (0, 0));
    }

    #[test]
    fn what_is_not_wanted_any_more_leaves_nothing_behind() {
        let mut lanes = Lanes::new(MIB, MIB);
        for number in 0..10u32 {
            lanes.push(number % 3, 100, 0, number).unwrap();
        }
        lanes.retain(|number| number % 3 == 1 && *number > 1);
        assert_eq!((lanes.items(), lanes.bytes()), (2, 2 * (100 + COMMAND_OVERHEAD_BYTES)));
        assert_eq!(lanes.cost_bytes(), lanes.bytes());
        assert_eq!(lanes.take_batch(MIB, 100), [4, 7]);
        assert_eq!((lanes.lanes.len(), lanes.turns.len(), lanes.bytes()), (0, 0, 0));
    }

    proptest! {
        // Whatever is pushed comes out once, in order within its lane, in batches within their bounds.
        #[test]
        fn nothing_is_lost_or_reordered(
            pushes in prop::collection::vec((0u32..5, 0usize..200_000), 0..200),
            bytes_max in 1000usize..300_000,
            items_max in 1usize..50,
        ) {
            let mut lanes = Lanes::new(1 << 40, 1 << 41);
            for (number, (lane, bytes)) in pushes.iter().enumerate() {
                lanes.push(*lane, *bytes, 0, (*lane, number, *bytes)).unwrap();
            }
            let mut taken = Vec::new();
            loop {
                let batch = lanes.take_batch(bytes_max, items_max);
                let bytes: usize = batch.iter().map(|(_, _, bytes)| bytes + COMMAND_OVERHEAD_BYTES).sum();
                prop_assert!(batch.len() <= items_max && (bytes <= bytes_max || batch.len() == 1));
                if batch.is_empty() { break; }
                taken.extend(batch);
            }
            prop_assert_eq!((lanes.bytes(), lanes.items(), taken.len()), (0, 0, pushes.len()));
            for lane in 0..5 {
                prop_assert!(taken.iter().filter(|t| t.0 == lane).map(|t| t.1).is_sorted());
            }
        }
    }
}
