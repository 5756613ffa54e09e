//! Answers as people and programs read them: a table, JSON, YAML.
//!
//! JSON and YAML are the same data under the API's own field names; the table is a choice of it.

use serde_json::{Map, Value, json};
use tenure_admin_api::v1::{self as api, State};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::limits::{NAMES, place};

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
    Yaml,
}

/// A table with a head, columns two blanks apart.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let all = || std::iter::once(head.iter().map(ToString::to_string).collect()).chain(rows.iter().cloned());
    let mut widths = vec![0; head.len()];
    for row in all() {
        let row: Vec<String> = row;
        for (width, cell) in widths.iter_mut().zip(&row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in all() {
        let cells = widths.iter().zip(&row).map(|(width, cell)| format!("{cell:<width$}"));
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// Tenants choose their keys, and an administrator's terminal must not do what they say.
fn printable(text: &str) -> String {
    let escaped = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(escaped).collect()
}

/// Data in one of the formats for programs.
pub fn data(format: Format, value: &Value) -> String {
    match format {
        Format::Yaml => {
            let mut out = String::new();
            yaml(&mut out, value, 0);
            out
        }
        Format::Json | Format::Table => format!("{value:#}\n"),
    }
}

/// YAML's block style. Scalars are JSON's, which are YAML's too.
fn yaml(out: &mut String, value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (name, value) in map {
                out.push_str(&format!("{indent}{}:", Value::from(name.as_str())));
                nested(out, value, depth + 1);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                out.push_str(&format!("{indent}-"));
                nested(out, item, depth + 1);
            }
        }
        scalar @ (Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::String(_)
        | Value::Array(_)
        | Value::Object(_)) => out.push_str(&format!("{indent}{scalar}\n")),
    }
}

fn nested(out: &mut String, value: &Value, depth: usize) {
    let is_block =
        value.as_object().is_some_and(|map| !map.is_empty()) || value.as_array().is_some_and(|list| !list.is_empty());
    if is_block {
        out.push('\n');
        yaml(out, value, depth);
    } else {
        out.push_str(&format!(" {value}\n"));
    }
}

/// A moment, for people; empty if it is not known.
pub fn moment(milliseconds: i64) -> String {
    let moment = OffsetDateTime::from_unix_timestamp(milliseconds.div_euclid(1_000)).ok();
    moment.filter(|_| milliseconds != 0).and_then(|moment| moment.format(&Rfc3339).ok()).unwrap_or_default()
}

/// Milliseconds since 1970 of a moment as [`moment`] writes it; `None` if it is none.
pub fn milliseconds(moment: &str) -> Option<i64> {
    let moment = OffsetDateTime::parse(moment, &Rfc3339).ok()?;
    i64::try_from(moment.unix_timestamp_nanos().div_euclid(1_000_000)).ok()
}

/// Bytes, for people.
pub fn bytes(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

pub fn state(state: State) -> &'static str {
    match state {
        State::Unspecified => "unknown",
        State::Active => "active",
        State::ReadOnly => "read-only",
        State::Suspended => "suspended",
        State::Deleting => "deleting",
    }
}

/// Limits that are set.
pub fn limits(limits: &api::Limits) -> Value {
    let mut of = *limits;
    let set = NAMES.iter().filter_map(|name| Some((name.to_string(), json!((*place(&mut of, name)?)?))));
    Value::Object(set.collect::<Map<_, _>>())
}

fn usage(usage: &api::Usage) -> Value {
    json!({
        "keys": usage.keys,
        "stored_bytes": usage.stored_bytes,
        "live_bytes": usage.live_bytes,
        "versions": usage.versions,
        "leases": usage.leases,
        "revision": usage.revision,
        "compact_revision": usage.compact_revision,
        "alarms": usage.alarms,
        "watchers": usage.watchers,
        "connections": usage.connections,
    })
}

/// Everything of a tenant.
pub fn tenant(cell: &str, tenant: &api::Tenant) -> Value {
    let mut labels: Vec<_> = tenant.labels.iter().collect();
    labels.sort();
    json!({
        "cell": cell,
        "name": tenant.name,
        "id": tenant.id,
        "cluster_id": format!("{:x}", tenant.cluster_id),
        "state": state(tenant.state()),
        "limits": limits(&tenant.limits.unwrap_or_default()),
        "effective_limits": limits(&tenant.effective_limits.unwrap_or_default()),
        "labels": labels.into_iter().map(|(name, value)| (name.clone(), json!(value))).collect::<Map<_, _>>(),
        "created_at": moment(tenant.created_at_ms),
        "usage": tenant.usage.as_ref().map(usage),
        "credentials_valid_from": moment(tenant.credentials_valid_from_ms),
        "revoked_serials": tenant.revoked_serials,
        "trusted_ca_pem": tenant.trusted_ca_pem,
    })
}

/// What a table says of a tenant.
pub const TENANT_HEAD: [&str; 9] = ["CELL", "NAME", "ID", "STATE", "KEYS", "STORED", "LIMIT", "ALARMS", "CREATED"];

pub fn tenant_row(cell: &str, tenant: &api::Tenant) -> Vec<String> {
    let usage = tenant.usage.clone().unwrap_or_default();
    let limit = match tenant.effective_limits.and_then(|limits| limits.stored_bytes) {
        None => String::new(),
        Some(0) => "none".to_string(),
        Some(limit) => bytes(limit),
    };
    vec![
        cell.to_string(),
        tenant.name.clone(),
        tenant.id.to_string(),
        state(tenant.state()).to_string(),
        usage.keys.to_string(),
        bytes(usage.stored_bytes),
        limit,
        usage.alarms.join(","),
        moment(tenant.created_at_ms),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows = vec![vec!["acme".to_string(), "1".to_string()], vec!["a".to_string(), String::new()]];
        assert_eq!(table(&["NAME", "ID"], &rows), "NAME  ID\nacme  1\na\n");
    }

    #[test]
    fn yaml_is_what_a_parser_reads_back() {
        let value = json!({
            "a": 1, "b": "x: \"y\"\n", "list": ["one", { "deep": [], "map": {} }, [true, null]], "empty": {}, "yes": "no",
        });
        let text = data(Format::Yaml, &value);
        let read = <saphyr::Yaml<'_> as saphyr::LoadableYamlNode>::load_from_str(&text).unwrap();
        let document = &read[0];
        assert_eq!(document["a"].as_integer(), Some(1));
        assert_eq!(document["b"].as_str(), Some("x: \"y\"\n"));
        assert_eq!(document["list"][2][0].as_bool(), Some(true));
        assert_eq!(document["yes"].as_str(), Some("no"));
        assert_eq!(document["list"][0].as_str(), Some("one"));
    }

    #[test]
    fn figures_are_for_people() {
        assert_eq!((bytes(1_023), bytes(1_536), bytes(3 << 30)), ("1023 B".into(), "1.5 KiB".into(), "3.0 GiB".into()));
        assert_eq!((moment(0), moment(1_000)), (String::new(), "1970-01-01T00:00:01Z".to_string()));
        assert_eq!((milliseconds("1970-01-01T00:00:01Z"), milliseconds("yesterday")), (Some(1_000), None));
        let of = api::Limits { watchers: Some(0), ..Default::default() };
        assert_eq!(limits(&of), json!({ "watchers": 0 }));
    }
}
