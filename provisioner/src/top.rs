//! `tenurectl top`: what each tenant does now, from what members have counted at two moments.
//!
//! Each member counts what it serves itself, so every endpoint is asked, and what they say is added up. One that does not answer is left
//! out until it does; two endpoints of one member count once.

use std::collections::{BTreeMap, HashMap};
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::future::join_all;
use serde_json::{Value, json};
use tenure_admin_api::v1::get_usage_response::Prefix;
use tenure_admin_api::v1::top_response::Row;
use tenure_admin_api::v1::{GetUsageRequest, TopRequest};
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
    /// Also the three Kubernetes resources of each shown tenant with most keys. Its keys are read for that, once a minute
    #[arg(long)]
    resources: bool,
}

/// Keys by resource are looked at again after this: nobody counts them as they come.
const RESOURCES_PERIOD: Duration = Duration::from_secs(60);

/// How many resources of a tenant are shown.
const RESOURCES_SHOWN: usize = 3;

/// The largest resources of tenants, most keys first, by cell and tenant.
#[derive(Default)]
struct Resources {
    asked: Option<Instant>,
    largest: HashMap<(String, String), Vec<Prefix>>,
}

impl Resources {
    /// Asks for those of the shown tenants, if it is time. Of a tenant that cannot be asked now, nothing is shown.
    async fn refresh(&mut self, members: &mut [Reached], shown: &[Rates]) {
        if self.asked.is_some_and(|asked| asked.elapsed() < RESOURCES_PERIOD) {
            return;
        }
        self.asked = Some(Instant::now());
        self.largest.clear();
        for rates in shown {
            let Some(member) = members.iter_mut().find(|member| member.cell.name == rates.cell) else { continue };
            let request = GetUsageRequest { name: rates.row.tenant.clone() };
            if let Ok(answer) = member.client.get_usage(request).await {
                let mut prefixes = answer.into_inner().prefixes;
                prefixes.sort_by(|a, b| b.keys.cmp(&a.keys).then_with(|| a.prefix.cmp(&b.prefix)));
                prefixes.truncate(RESOURCES_SHOWN);
                self.largest.insert((rates.cell.clone(), rates.row.tenant.clone()), prefixes);
            }
        }
    }

    fn of(&self, rates: &Rates) -> &[Prefix] {
        self.largest.get(&(rates.cell.clone(), rates.row.tenant.clone())).map_or(&[], Vec::as_slice)
    }
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

/// What one member has counted, by tenant, and when it said so.
#[derive(Default)]
struct Counted {
    now_ms: i64,
    rows: HashMap<String, Row>,
}

/// By cell and member.
type Seen = BTreeMap<(String, String), Counted>;

/// Every tenant's counters now, of all members that answer.
///
/// # Errors
/// If none does.
async fn look(members: &mut [Reached]) -> anyhow::Result<Seen> {
    let asked = members.iter_mut().map(async |of| {
        let answer = of.client.top(TopRequest { limit: u32::MAX }).await;
        answer.map(|answer| (of.cell.name.clone(), answer.into_inner())).map_err(|status| of.cell.call_error(status))
    });
    let (mut seen, mut last) = (Seen::new(), None);
    for answer in join_all(asked).await {
        match answer {
            Ok((cell, answer)) => {
                let rows = answer.rows.into_iter().map(|row| (row.tenant.clone(), row)).collect();
                seen.insert((cell, answer.member), Counted { now_ms: answer.now_ms, rows });
            }
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) if seen.is_empty() => Err(error.into()),
        _ => Ok(seen),
    }
}

fn rates(before: &Seen, now: &Seen, sort: Sort) -> Vec<Rates> {
    let mut all: BTreeMap<(&str, &str), Rates> = BTreeMap::new();
    for (of, counted) in now {
        let then = before.get(of);
        let seconds = then.map_or(0.0, |then| (counted.now_ms - then.now_ms) as f64 / 1e3).max(1e-3);
        for (tenant, row) in &counted.rows {
            let sum = all.entry((&of.0, tenant)).or_insert_with(|| Rates {
                cell: of.0.clone(),
                row: Row { watchers: 0, connections: 0, ..row.clone() },
                requests: 0.0,
                bytes: 0.0,
                throttled: 0.0,
                cpu_percent: 0.0,
            });
            sum.row.watchers += row.watchers;
            sum.row.connections += row.connections;
            // One that was not there before says what it does from the next look on.
            let Some(then) = then else { continue };
            let empty = Row::default();
            let old = then.rows.get(tenant).unwrap_or(&empty);
            // A member that was started anew counts from nothing.
            let rate = |of: fn(&Row) -> u64| of(row).saturating_sub(of(old)) as f64 / seconds;
            sum.requests += rate(|row| row.requests);
            sum.bytes += rate(|row| row.received_bytes.saturating_add(row.sent_bytes));
            sum.throttled += rate(|row| row.throttled);
            sum.cpu_percent += rate(|row| row.cpu_us) / 1e4;
        }
    }
    let mut all: Vec<Rates> = all.into_values().collect();
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

/// With resources, if there are any to be shown.
fn text(format: Format, all: &[Rates], resources: Option<&Resources>) -> String {
    match format {
        Format::Table => {
            let mut head = vec![
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
            if resources.is_some() {
                head.push("MOST KEYS");
            }
            let row = |rates: &Rates| {
                let bytes = format!("{:.0}", rates.bytes).parse().unwrap_or(0);
                let mut row = vec![
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
                ];
                if let Some(resources) = resources {
                    let of = resources.of(rates).iter().map(|prefix| format!("{} {}", prefix.prefix, prefix.keys));
                    row.push(of.collect::<Vec<_>>().join(", "));
                }
                row
            };
            output::table(&head, &all.iter().map(row).collect::<Vec<_>>())
        }
        Format::Json | Format::Yaml => {
            let row = |rates: &Rates| {
                let mut row = json!({
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
                });
                if let Some(resources) = resources {
                    let of = resources.of(rates).iter();
                    let of =
                        of.map(|prefix| json!({ "prefix": prefix.prefix, "keys": prefix.keys, "bytes": prefix.bytes }));
                    row["resources"] = of.collect();
                }
                row
            };
            output::data(format, &Value::Array(all.iter().map(row).collect()))
        }
    }
}

/// Looks until it is interrupted, which ends it in good order.
pub(crate) async fn run(mut members: Vec<Reached>, options: &Options, format: Format) -> anyhow::Result<()> {
    let interval = Duration::try_from_secs_f64(options.interval).context("--interval: want seconds")?;
    let mut before = look(&mut members).await?;
    let mut resources = options.resources.then(Resources::default);
    let is_live = !options.once && std::io::stdout().is_terminal();
    loop {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            interrupted = tokio::signal::ctrl_c() => return interrupted.context("wait for an interrupt"),
        }
        let now = look(&mut members).await?;
        let mut all = rates(&before, &now, options.sort);
        all.truncate(options.rows);
        if let Some(resources) = &mut resources {
            resources.refresh(&mut members, &all).await;
        }
        let mut out = std::io::stdout().lock();
        if is_live {
            // From the top of a clear screen.
            out.write_all(b"\x1b[H\x1b[2J").context("print")?;
        }
        out.write_all(text(format, &all, resources.as_ref()).as_bytes()).and_then(|()| out.flush()).context("print")?;
        if options.once {
            return Ok(());
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(now_ms: i64, rows: &[(&str, u64, u64)]) -> Counted {
        let row = |(tenant, requests, watchers): &(&str, u64, u64)| {
            let (tenant, requests, watchers) = ((*tenant).to_string(), *requests, *watchers);
            let (throttled, cpu_us) = (2 * requests, 50_000 * requests);
            let (received_bytes, sent_bytes) = (3 * requests, requests);
            let row = Row {
                tenant,
                requests,
                received_bytes,
                sent_bytes,
                throttled,
                cpu_us,
                watchers,
                keys: 7,
                ..Row::default()
            };
            (row.tenant.clone(), row)
        };
        Counted { now_ms, rows: rows.iter().map(row).collect() }
    }

    // Two members serve acme, one of them was started anew, and a third one comes.
    #[test]
    fn what_members_say_is_added_up() {
        let of = |member: &str| ("east".to_string(), member.to_string());
        let before = Seen::from([
            (of("m1"), counted(1_000, &[("acme", 100, 1), ("globex", 10, 0)])),
            (of("m2"), counted(5_000, &[("acme", 900, 1)])),
        ]);
        let now = Seen::from([
            (of("m1"), counted(3_000, &[("acme", 120, 2), ("globex", 10, 0)])),
            (of("m2"), counted(6_000, &[("acme", 30, 3)])),
            (of("m3"), counted(9_000, &[("acme", 5_000, 4)])),
        ]);
        let all = rates(&before, &now, Sort::Requests);
        let shown: Vec<_> =
            all.iter().map(|of| (of.row.tenant.as_str(), of.requests, of.row.watchers, of.row.keys)).collect();
        assert_eq!(shown, [("acme", 10.0, 9, 7), ("globex", 0.0, 0, 7)]);
        // Half a processor.
        assert_eq!((all[0].bytes, all[0].throttled, all[0].cpu_percent), (40.0, 20.0, 50.0));
    }

    #[test]
    fn resources_are_told_beside_their_tenant() {
        let of = ("east".to_string(), "m1".to_string());
        let seen = Seen::from([(of, counted(1_000, &[("acme", 1, 1), ("globex", 1, 1)]))]);
        let all = rates(&seen, &seen, Sort::Requests);
        let prefix = |prefix: &str, keys| Prefix { prefix: prefix.to_string(), keys, bytes: 10 * keys };
        let largest = vec![prefix("/registry/pods/", 7), prefix("/registry/events/", 2)];
        let largest = HashMap::from([(("east".to_string(), "acme".to_string()), largest)]);
        let resources = Resources { asked: None, largest };
        let table = text(Format::Table, &all, Some(&resources));
        let lines: Vec<&str> = table.lines().map(str::trim_end).collect();
        assert!(lines[0].ends_with("MOST KEYS"), "{table}");
        assert!(lines[1].ends_with("/registry/pods/ 7, /registry/events/ 2"), "{table}");
        assert!(!lines[2].contains("/registry"), "{table}");
        let data: Value = serde_json::from_str(&text(Format::Json, &all, Some(&resources))).expect("JSON");
        assert_eq!(data[0]["resources"][0], json!({ "prefix": "/registry/pods/", "keys": 7, "bytes": 70 }));
        assert_eq!(data[1]["resources"], json!([]));
        assert!(!text(Format::Table, &all, None).contains("MOST KEYS"));
    }
}
