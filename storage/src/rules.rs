//! By which rules a cell decides.
//!
//! What [`apply`](crate::apply) makes of a command must be the same on all members, and the same again when a member replays its log. A
//! release that decides anything differently would break both: in a cell of two releases members would differ, and so would one that is
//! stopped with the old program and started with the new one. So the rules are numbered, the number in force is replicated state, in the
//! cell's row beside the applied index, and each command is decided by the number that holds where it stands in the log. A release knows
//! the rules of earlier ones.
//!
//! Life of a change. A release that decides something anew gives it the next number and asks a method of [`Rules`] where it decides. When
//! all members of a cell run it, the leader raises the number ([`Command::RaiseRules`](crate::Command::RaiseRules)), as etcd raises its
//! cluster version. From there on the new rules hold, and there is no way back.
//!
//! What must hold: no number is compared outside this module; what a number stands for never changes. A member that finds a number which it
//! does not know stops, by name ([`Fault::Rules`](crate::Fault::Rules)): at start, at the command, or when it is offered a copy of the state.

use crate::limits;

/// The number of the rules in force. What differs between numbers are its methods' answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rules(u32);

impl Rules {
    /// Those of a new cell, and of all data from before rules had numbers.
    pub const FIRST: Rules = Rules(1);

    /// A command's memory is bounded whatever a tenant has stored: [`limits::DELETED_KEYS_MAX`], [`limits::LEASE_KEYS_MAX`],
    /// [`limits::LEASES_MAX`], [`limits::TXN_STORED_BYTES_MAX`].
    const BOUNDED: Rules = Rules(2);

    /// The newest that this release knows.
    pub const NEWEST: Rules = Rules::BOUNDED;

    /// The rules with this number. `None`: of a later release.
    pub fn of_number(number: u32) -> Option<Rules> {
        (Rules::FIRST.0..=Rules::NEWEST.0).contains(&number).then_some(Rules(number))
    }

    pub fn number(self) -> u32 {
        self.0
    }

    fn are_bounded(self) -> bool {
        self >= Rules::BOUNDED
    }

    pub(crate) fn deleted_keys_max(self) -> usize {
        if self.are_bounded() { limits::DELETED_KEYS_MAX } else { usize::MAX }
    }

    pub(crate) fn txn_stored_bytes_max(self) -> usize {
        if self.are_bounded() { limits::TXN_STORED_BYTES_MAX } else { usize::MAX }
    }

    /// Of a tenant whose limit says nothing else.
    pub(crate) fn leases_max(self) -> u64 {
        if self.are_bounded() { limits::LEASES_MAX } else { u64::MAX }
    }

    /// `None`: nobody counts the keys of a lease.
    pub(crate) fn lease_keys_max(self) -> Option<u64> {
        self.are_bounded().then_some(limits::LEASE_KEYS_MAX)
    }

    /// Whether reading the value that a put keeps counts as work of its txn.
    pub(crate) fn kept_values_are_work(self) -> bool {
        self.are_bounded()
    }

    /// Whether a compaction looks again at what the one before has kept and is still freeing.
    pub(crate) fn compactions_look_again(self) -> bool {
        self.are_bounded()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_later_releases_are_not_known() {
        assert_eq!(Rules::of_number(0), None);
        assert_eq!(Rules::of_number(1), Some(Rules::FIRST));
        assert_eq!(Rules::of_number(Rules::NEWEST.number()), Some(Rules::NEWEST));
        assert_eq!(Rules::of_number(Rules::NEWEST.number() + 1), None);
    }
}
