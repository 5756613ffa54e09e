//! etcd's multi-version store over an ordered engine.
//!
//! A key's life is a list of versions; a put appends one, a delete appends a tombstone, nothing is changed in place. A read
//! at revision r takes of each key the newest version at or below r. `write` and `txn` run inside `apply` on an
//! [`overlay::Overlay`], so a txn sees its own changes before they reach the engine; `read` works on either.
//!
//! What must hold:
//! 1. Main revisions of a tenant have no gaps: a command that changes something takes exactly the next one.
//! 2. For each key, `head` describes the newest version in `kv`, and every version in `kv` has its row in `rev`.
//! 3. A version's `previous` names the version it replaced, or one that has been reclaimed.
//! 4. Nothing that a read at or above the compact revision needs is ever removed.

pub(crate) mod compact;
pub(crate) mod hash;
pub(crate) mod overlay;
pub(crate) mod read;
pub(crate) mod txn;
pub(crate) mod write;
