//! Prometheus' text form: what the answer to a scrape is made of.

use std::fmt::{Display, Write as _};

use tenure_raft_server::HistogramSnapshot;

/// The head of a family, once and before its samples. `help` says the unit and what is counted; it has no backslash and no line
/// break, which would have to be escaped.
pub(crate) fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// A family of one sample without labels.
pub(crate) fn metric(out: &mut String, name: &str, kind: &str, help: &str, value: impl Display) {
    family(out, name, kind, help);
    let _ = writeln!(out, "{name} {value}");
}

/// A family of one histogram without labels.
pub(super) fn histogram(out: &mut String, name: &str, help: &str, snapshot: &HistogramSnapshot) {
    family(out, name, "histogram", help);
    buckets(out, name, "", snapshot);
}

/// `labels` in front of a bucket's own, each with its comma.
pub(super) fn buckets(out: &mut String, name: &str, labels: &str, snapshot: &HistogramSnapshot) {
    for (bound, count) in &snapshot.buckets {
        let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_string() };
        let _ = writeln!(out, "{name}_bucket{{{labels}le=\"{bound}\"}} {count}");
    }
    let alone = labels.trim_end_matches(',');
    let braces = if alone.is_empty() { String::new() } else { format!("{{{alone}}}") };
    let _ = writeln!(out, "{name}_sum{braces} {}\n{name}_count{braces} {}", snapshot.sum_seconds, snapshot.count);
}
