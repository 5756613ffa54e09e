//! `tenurectl top`: what each tenant does now, from what members have counted at two moments.

use std::collections::HashMap;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use tenure_admin_api::v1::TopRequest;
use tenure_admin_api::v1::top_response::Row;
use tenure_provisioner::cells::Reached;
use tenure_provisioner::output::{self, Format};

/// By what the busiest is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Sort {
    #[default]
    Requests,
    Bytes,
    Cpu,
    Watchers,
    Stored,
}

#[derive(clap::Args)]
pub(crate) struct Options {
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Seconds between two looks.
    #[arg(long, default_value_t = 2.0)]
    interval: f64,
    /// Looks once, prints, and ends.
    #[arg(long)]
    once: bool,
    /// Rows shown.
    #[arg(long, default_value_t = 30)]
    rows: usize,
}

/// What a tenant did between two looks, by second.
struct Rates {
    cell: String,
    row: Row,
    requests: f64,
    bytes: f64,
    throttled: f64,
    /// Of one processor, in percent.
    cpu_percent: f64,
}

type Seen = HashMap<(String, String), Row>;

/// Every tenant's counters now, and when: of the member that each cell was reached by.
async fn look(cells: &mut [Reached]) -> anyhow::Result<(Seen, i64)> {
    let (mut seen, mut now_ms) = (Seen::new(), 0);
    for cell in cells {
        let answer = cell.client.top(TopRequest { limit: u32::MAX }).await;
        let answer = answer.map_err(|status| cell.cell.call_error(status))?.into_inner();
        now_ms = answer.now_ms;
        seen.extend(answer.rows.into_iter().map(|row| ((cell.cell.name.clone(), row.tenant.clone()), row)));
    }
    Ok((seen, now_ms))
}

fn rates(before: &(Seen, i64), now: &(Seen, i64), sort: Sort) -> Vec<Rates> {
    let seconds = ((now.1 - before.1) as f64 / 1e3).max(1e-3);
    let mut all: Vec<Rates> = now
        .0
        .iter()
        .map(|((cell, tenant), row)| {
            let empty = Row::default();
            let old = before.0.get(&(cell.clone(), tenant.clone())).unwrap_or(&empty);
            // A member that was started anew counts from nothing.
            let rate = |of: fn(&Row) -> u64| of(row).saturating_sub(of(old)) as f64 / seconds;
            Rates {
                cell: cell.clone(),
                requests: rate(|row| row.requests),
                bytes: rate(|row| row.received_bytes.saturating_add(row.sent_bytes)),
                throttled: rate(|row| row.throttled),
                cpu_percent: rate(|row| row.cpu_us) / 1e4,
                row: row.clone(),
            }
        })
        .collect();
    let key = |rates: &Rates| match sort {
        Sort::Requests => rates.requests,
        Sort::Bytes => rates.bytes,
        Sort::Cpu => rates.cpu_percent,
        Sort::Watchers => rates.row.watchers as f64,
        Sort::Stored => rates.row.stored_bytes as f64,
    };
    all.sort_by(|a, b| key(b).total_cmp(&key(a)).then_with(|| a.row.tenant.cmp(&b.row.tenant)));
    all
}

fn text(format: Format, all: &[Rates]) -> String {
    match format {
        Format::Table => {
            let head = [
                "CELL",
                "TENANT",
                "REQ/S",
                "BYTES/S",
                "CPU %",
                "THROTTLED/S",
                "WATCHERS",
                "CONNS",
                "KEYS",
                "STORED",
                "STATE",
            ];
            let row = |rates: &Rates| {
                let bytes = format!("{:.0}", rates.bytes).parse().unwrap_or(0);
                vec![
                    rates.cell.clone(),
                    rates.row.tenant.clone(),
                    format!("{:.1}", rates.requests),
                    output::bytes(bytes),
                    format!("{:.1}", rates.cpu_percent),
                    format!("{:.1}", rates.throttled),
                    rates.row.watchers.to_string(),
                    rates.row.connections.to_string(),
                    rates.row.keys.to_string(),
                    output::bytes(rates.row.stored_bytes),
                    output::state(rates.row.state()).to_string(),
                ]
            };
            output::table(&head, &all.iter().map(row).collect::<Vec<_>>())
        }
        Format::Json | Format::Yaml => {
            let row = |rates: &Rates| {
                json!({
                    "cell": rates.cell,
                    "tenant": rates.row.tenant,
                    "requests_per_second": rates.requests,
                    "bytes_per_second": rates.bytes,
                    "cpu_percent": rates.cpu_percent,
                    "throttled_per_second": rates.throttled,
                    "watchers": rates.row.watchers,
                    "connections": rates.row.connections,
                    "keys": rates.row.keys,
                    "stored_bytes": rates.row.stored_bytes,
                    "state": output::state(rates.row.state()),
                })
            };
            output::data(format, &Value::Array(all.iter().map(row).collect()))
        }
    }
}

/// Looks until it is interrupted, which ends it in good order.
pub(crate) async fn run(mut cells: Vec<Reached>, options: &Options, format: Format) -> anyhow::Result<()> {
    let interval = Duration::try_from_secs_f64(options.interval).context("--interval: want seconds")?;
    let mut before = look(&mut cells).await?;
    let is_live = !options.once && std::io::stdout().is_terminal();
    loop {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            interrupted = tokio::signal::ctrl_c() => return interrupted.context("wait for an interrupt"),
        }
        let now = look(&mut cells).await?;
        let mut all = rates(&before, &now, options.sort);
        all.truncate(options.rows);
        let mut out = std::io::stdout().lock();
        if is_live {
            // From the top of a clear screen.
            out.write_all(b"\x1b[H\x1b[2J").context("print")?;
        }
        out.write_all(text(format, &all).as_bytes()).and_then(|()| out.flush()).context("print")?;
        if options.once {
            return Ok(());
        }
        before = now;
    }
}
