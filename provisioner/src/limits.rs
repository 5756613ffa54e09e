//! Limits as operators write them: `8GiB`, `500`, `none`, `default`.

use tenure_admin_api::v1::Limits;

/// What one limit is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// 0: none at all.
    To(u64),
    /// As for tenants of which nothing is said.
    Default,
}

/// Reads a setting: a number, with K, M, G, T (thousands) or Ki, Mi, Gi, Ti (1,024s) and an optional B behind it; `none`; `default`.
///
/// # Errors
/// What is wanted instead, in one line.
pub fn parse(text: &str) -> Result<Setting, String> {
    match text {
        "none" => return Ok(Setting::To(0)),
        "default" => return Ok(Setting::Default),
        _ => {}
    }
    let wanted = || format!("{text:?}: want a number such as 500, 20M or 8GiB, or none, or default");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wanted())?;
    let factor: u64 = match unit.strip_suffix('B').unwrap_or(unit) {
        "" => 1,
        "k" | "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err(wanted()),
    };
    match number.checked_mul(factor) {
        // As a limit 0 means none, which is to be said in words.
        Some(0) | None => Err(wanted()),
        Some(value) => Ok(Setting::To(value)),
    }
}

/// Names of all limits, as the API has them.
pub const NAMES: [&str; 10] = [
    "stored_bytes",
    "requests_per_second",
    "request_bytes_per_second",
    "response_bytes_in_flight",
    "watchers",
    "streams",
    "connections",
    "leases",
    "request_bytes",
    "response_bytes_per_second",
];

/// The place of a limit in a message; `None` if there is no such limit.
pub fn place<'a>(limits: &'a mut Limits, name: &str) -> Option<&'a mut Option<u64>> {
    Some(match name {
        "stored_bytes" => &mut limits.stored_bytes,
        "requests_per_second" => &mut limits.requests_per_second,
        "request_bytes_per_second" => &mut limits.request_bytes_per_second,
        "response_bytes_in_flight" => &mut limits.response_bytes_in_flight,
        "watchers" => &mut limits.watchers,
        "streams" => &mut limits.streams,
        "connections" => &mut limits.connections,
        "leases" => &mut limits.leases,
        "request_bytes" => &mut limits.request_bytes,
        "response_bytes_per_second" => &mut limits.response_bytes_per_second,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_people_write_them() {
        for (text, value) in [("500", 500), ("20M", 20_000_000), ("8GiB", 8 << 30), ("1KiB", 1024), ("2kB", 2000)] {
            assert_eq!(parse(text), Ok(Setting::To(value)), "{text}");
        }
        assert_eq!((parse("none"), parse("default")), (Ok(Setting::To(0)), Ok(Setting::Default)));
        for bad in ["", "0", "-1", "1.5G", "8Gb", "99999999999999999999", "99999999999T"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_limit_has_a_place() {
        let mut limits = Limits::default();
        for name in NAMES {
            *place(&mut limits, name).unwrap() = Some(1);
        }
        assert!(place(&mut limits, "speed").is_none());
        let mut other = Limits::default();
        assert!(NAMES.iter().all(|name| place(&mut limits, name).unwrap().is_some()));
        assert!(NAMES.iter().all(|name| place(&mut other, name).unwrap().is_none()));
    }
}
