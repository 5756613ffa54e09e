//! Criterion benches of the hot paths; see `benches/`. The library itself is empty.
