//! What was measured, as a table for people and as JSON for programs.

use serde_json::{Value, json};

use crate::client::Workload;
use crate::load::Measured;

/// Column heads and their widths for [`row`].
const COLUMNS: [(&str, usize); 13] = [
    ("workload", 22),
    ("server", 8),
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

/// A line of medians, as `compare` makes them.
pub fn median_row(case: &str, server: &str, median: &Value) -> String {
    let known = |name: &str, by: f64, digits: usize| {
        median.get(name).and_then(Value::as_f64).map_or("-".to_string(), |value| format!("{:.digits$}", value / by))
    };
    let units = median.get("units").and_then(Value::as_f64).unwrap_or(1.0).max(1.0);
    line([
        case.to_string(),
        server.to_string(),
        known("operations_per_second", 1.0, 0),
        known("units_per_second", 1.0, 0),
        known("p50_us", 1.0, 0),
        known("p99_us", 1.0, 0),
        known("p999_us", 1.0, 0),
        known("max_us", 1.0, 0),
        known("server_cpu_us_per_unit", 1.0, 2),
        known("peak_rss_bytes", f64::from(1 << 20), 0),
        known("written_bytes", units, 0),
        known("client_cpu_us_per_unit", 1.0, 2),
        known("errors", 1.0, 0),
    ])
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

/// Tenured beside etcd, a line a case: ratios of the medians of a comparison.
pub fn ratio_table(report: &Value) -> String {
    let mut table = format!(
        "\n{:<32} {:>11} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
        "tenured / etcd", "units/s", "etcd's", "ratio", "p50", "p99", "CPU µs", "etcd's", "ratio",
    );
    for entry in report["medians"].as_array().into_iter().flatten() {
        let figure = |server: &str, name: &str, digits: usize| {
            entry["servers"][server][name].as_f64().map_or("-".to_string(), |value| format!("{value:.digits$}"))
        };
        let ratio = |name: &str| entry["ratios"][name].as_f64().map_or("-".to_string(), |ratio| format!("{ratio:.2}"));
        table.push_str(&format!(
            "{:<32} {:>11} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
            entry["case"].as_str().unwrap_or_default(),
            figure("tenured", "units_per_second", 0),
            figure("etcd", "units_per_second", 0),
            ratio("units_per_second"),
            ratio("p50_us"),
            ratio("p99_us"),
            figure("tenured", "server_cpu_us_per_unit", 2),
            figure("etcd", "server_cpu_us_per_unit", 2),
            ratio("server_cpu_us_per_unit"),
        ));
    }
    table
}
