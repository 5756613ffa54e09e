//! What was measured, as a table for people and as JSON for programs.

use serde_json::{Value, json};

use crate::client::Workload;
use crate::load::Measured;

/// Column heads and their widths for [`row`].
const COLUMNS: [(&str, usize); 13] = [
    ("workload", 16),
    ("server", 12),
    ("ops/s", 10),
    ("units/s", 11),
    ("p50 µs", 9),
    ("p99 µs", 9),
    ("p99.9 µs", 9),
    ("max µs", 9),
    ("CPU µs/unit", 12),
    ("peak MiB", 9),
    ("disk B/unit", 12),
    ("client µs/unit", 14),
    ("errors", 7),
];

/// The table's first line.
pub fn head() -> String {
    line(COLUMNS.map(|(name, _)| name.to_string()))
}

/// One run's line. What is not known shows as `-`.
pub fn row(workload: Workload, server: &str, measured: &Measured) -> String {
    let latency = |quantile| measured.latency_us.value_at_quantile(quantile).to_string();
    let known = |value: Option<f64>, digits: usize| value.map_or("-".to_string(), |value| format!("{value:.digits$}"));
    let units = measured.units.max(1) as f64;
    line([
        format!("{} ({})", workload.name(), workload.unit()),
        server.to_string(),
        format!("{:.0}", measured.operations_per_second()),
        format!("{:.0}", measured.units_per_second()),
        latency(0.5),
        latency(0.99),
        latency(0.999),
        measured.latency_us.max().to_string(),
        known(measured.server_cpu_us_per_unit(), 2),
        known(measured.peak_rss_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20)), 0),
        known(measured.written_bytes.map(|bytes| bytes as f64 / units), 0),
        format!("{:.2}", measured.client_cpu_us_per_unit()),
        measured.errors.to_string(),
    ])
}

fn line(cells: [String; COLUMNS.len()]) -> String {
    let mut line = String::new();
    for (number, (cell, (_, width))) in cells.iter().zip(COLUMNS).enumerate() {
        line.push_str(&if number < 2 { format!("{cell:<width$} ") } else { format!("{cell:>width$} ") });
    }
    line.trim_end().to_string()
}

/// The same, and what the table leaves out: events' and progress' latencies, the first error.
pub fn json(workload: Workload, server: &str, measured: &Measured) -> Value {
    let latencies = |histogram: &hdrhistogram::Histogram<u64>| {
        json!({
            "count": histogram.len(),
            "p50_us": histogram.value_at_quantile(0.5),
            "p99_us": histogram.value_at_quantile(0.99),
            "p999_us": histogram.value_at_quantile(0.999),
            "max_us": histogram.max(),
        })
    };
    json!({
        "workload": workload.name(),
        "unit": workload.unit(),
        "server": server,
        "seconds": measured.seconds,
        "operations": measured.operations,
        "operations_per_second": measured.operations_per_second(),
        "units": measured.units,
        "units_per_second": measured.units_per_second(),
        "latency": latencies(&measured.latency_us),
        "event_latency": latencies(&measured.event_latency_us),
        "progress_latency": latencies(&measured.progress_latency_us),
        "server_cpu_us_per_unit": measured.server_cpu_us_per_unit(),
        "client_cpu_us_per_unit": measured.client_cpu_us_per_unit(),
        "peak_rss_bytes": measured.peak_rss_bytes,
        "written_bytes": measured.written_bytes,
        "errors": measured.errors,
        "first_error": measured.error,
    })
}
