//! One picture per case: throughput, latencies and CPU time of the servers beside each other.

use std::path::Path;

use plotters::prelude::*;
use serde_json::Value;

/// Name in the medians, and what the panel says above its bars.
const PANELS: [(&str, &str); 4] = [
    ("units_per_second", "per second"),
    ("p50_us", "p50 µs"),
    ("p99_us", "p99 µs"),
    ("server_cpu_us_per_unit", "CPU µs"),
];

const COLORS: [RGBColor; 5] = [
    RGBColor(30, 110, 190),
    RGBColor(230, 140, 30),
    RGBColor(130, 130, 130),
    RGBColor(60, 160, 90),
    RGBColor(150, 80, 160),
];

/// Writes `<case>.svg` for each case of the medians.
///
/// # Errors
/// If a file cannot be written.
pub fn write(dir: &Path, medians: &[Value]) -> anyhow::Result<()> {
    for entry in medians {
        let case = entry["case"].as_str().unwrap_or_default();
        let Some(servers) = entry["servers"].as_object() else { continue };
        let name = case.replace([':', ',', ' '], "-").replace("--", "-");
        draw(&dir.join(format!("{name}.svg")), case, servers)
            .map_err(|error| anyhow::anyhow!("draw {case}: {error}"))?;
    }
    Ok(())
}

fn draw(path: &Path, case: &str, servers: &serde_json::Map<String, Value>) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, (900, 300)).into_drawing_area();
    area.fill(&WHITE)?;
    let unit = servers.values().find_map(|median| median["unit"].as_str()).unwrap_or("op");
    let area = area.titled(&format!("{case} (per {unit})"), ("sans-serif", 20))?;
    for (panel, (name, title)) in area.split_evenly((1, PANELS.len())).into_iter().zip(PANELS) {
        let bars: Vec<(&String, f64)> =
            servers.iter().filter_map(|(server, median)| Some((server, median.get(name)?.as_f64()?))).collect();
        let top = bars.iter().map(|(_, value)| *value).fold(1e-9, f64::max) * 1.15;
        let mut chart = ChartBuilder::on(&panel)
            .caption(title, ("sans-serif", 15))
            .margin(8)
            .build_cartesian_2d(0.0..bars.len().max(1) as f64, 0.0..top)?;
        for (number, (server, value)) in bars.iter().enumerate() {
            let left = number as f64;
            let color = COLORS[number % COLORS.len()];
            chart.draw_series([Rectangle::new([(left + 0.1, 0.0), (left + 0.9, *value)], color.filled())])?;
            let text = format!("{server} {}", short(*value));
            chart.draw_series([Text::new(text, (left + 0.1, *value + top * 0.06), ("sans-serif", 12))])?;
        }
    }
    area.present()?;
    Ok(())
}

fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.1}M", v / 1e6),
        v if v >= 1e4 => format!("{:.0}k", v / 1e3),
        v if v >= 100.0 => format!("{v:.0}"),
        v => format!("{v:.2}"),
    }
}
