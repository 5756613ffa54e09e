//! Tests across crates and on real processes; see `tests/`. The library itself is empty.
