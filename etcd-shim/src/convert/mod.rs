//! Between the wire's messages and storage's values, by hand and without logic.
//!
//! Nothing is decided here: what could be wrong with a request was found by [`crate::check`] before. Where the wire has
//! several spellings of one meaning (a missing union member, a limit below zero) they become one value here.

pub mod from_proto;
pub mod to_proto;
