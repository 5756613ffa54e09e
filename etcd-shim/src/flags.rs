//! etcd's command line: one or two dashes, `--f v`, `--f=v`, bare booleans, `ETCD_*` variables behind the flags.
//!
//! A flag that is not built is refused by name. Everything wrong is one line; the program then exits with 1.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use crate::cell::check_tenant_name;
use crate::service::{MAX_REQUEST_BYTES, MAX_TXN_OPS};

/// A flag and whether it stands alone (`--f`), as Go's booleans do.
const FLAGS: &[(&str, bool, &str)] = &[
    ("data-dir", false, "directory of everything kept (default ${name}.tenure)"),
    ("name", false, "this member's name (default \"default\")"),
    (
        "listen-client-urls",
        false,
        "URLs of the tenant by certificate, or of \"default\" (default http://localhost:2379)",
    ),
    ("advertise-client-urls", false, "URLs told to clients (default: where it listens)"),
    ("tenant-listen", false, "NAME=URL: a listener of one tenant's own; may be given again"),
    ("cert-file", false, "server certificate, PEM"),
    ("key-file", false, "its key, PEM"),
    ("trusted-ca-file", false, "CA of client certificates, PEM"),
    ("client-cert-auth", true, "demand a client certificate"),
    ("quota-backend-bytes", false, "bytes each tenant may hold (0 = 2 GiB, negative = no limit)"),
    ("max-request-bytes", false, "largest write (default 1572864)"),
    ("max-txn-ops", false, "most operations of a txn (default 128)"),
    ("watch-progress-notify-interval", false, "period of watch progress (default 10m)"),
    ("heartbeat-interval", false, "milliseconds between heartbeats (default 100)"),
    ("election-timeout", false, "milliseconds without a leader before an election (default 1000)"),
    ("log-level", false, "debug, info, warn, error, panic or fatal (default info)"),
    ("version", true, "print the version and exit"),
    ("help", true, "print this and exit"),
];

/// The smallest period of watch progress, as in etcd.
const PROGRESS_PERIOD_MIN: Duration = Duration::from_millis(100);

/// The longest election timeout, as in etcd.
const ELECTION_TIMEOUT_MAX: Duration = Duration::from_secs(50);

/// Everything the command line says, checked.
#[derive(Clone, Debug)]
pub struct Flags {
    pub data_dir: PathBuf,
    pub name: String,
    pub listen_client_urls: Vec<Url>,
    pub advertise_client_urls: Vec<String>,
    pub tenant_listen: Vec<(String, Url)>,
    pub tls: Option<TlsFiles>,
    pub quota_backend_bytes: i64,
    pub max_request_bytes: usize,
    pub max_txn_ops: usize,
    pub progress_period: Duration,
    pub heartbeat_interval: Duration,
    pub election_timeout: Duration,
    pub log_level: String,
    /// Set variables that name no flag: worth a warning.
    pub unknown_variables: Vec<String>,
}

/// The files behind `https://` and `unixs://` URLs.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    pub trusted_ca_file: Option<PathBuf>,
    pub client_cert_auth: bool,
}

/// What to do.
#[derive(Clone, Debug)]
pub enum Parsed {
    Run(Box<Flags>),
    Version,
    Help,
}

/// What is wrong with a command line, in one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FlagError(String);

/// Reads arguments (without the program's name) and environment.
///
/// # Errors
/// [`FlagError`].
pub fn parse(
    arguments: impl IntoIterator<Item = String>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Parsed, FlagError> {
    let mut given = Given::default();
    given.read_arguments(arguments)?;
    if given.is_set("help")? {
        return Ok(Parsed::Help);
    }
    if given.is_set("version")? {
        return Ok(Parsed::Version);
    }
    let unknown_variables = given.read_environment(environment);
    Ok(Parsed::Run(Box::new(given.check(unknown_variables)?)))
}

/// What `--help` prints.
pub fn usage() -> String {
    let lines = FLAGS.iter().map(|(name, _, text)| format!("  --{name}\n        {text}\n"));
    format!("Usage: tenured [flags]\n\nEvery flag can be set as ETCD_<NAME> too.\n\n{}", lines.collect::<String>())
}

/// Flags as text, the last one of each first-come name winning; `tenant-listen` collects.
#[derive(Default)]
struct Given {
    values: BTreeMap<&'static str, String>,
    tenant_listen: Vec<String>,
}

impl Given {
    fn read_arguments(&mut self, arguments: impl IntoIterator<Item = String>) -> Result<(), FlagError> {
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let Some(body) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
                return Err(FlagError(format!("'{argument}' is not a valid flag")));
            };
            let (name, value) = match body.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (body, None),
            };
            let Some((name, alone, _)) = FLAGS.iter().find(|(known, ..)| *known == name) else {
                return Err(FlagError(format!("flag provided but not defined: -{name}")));
            };
            let value = match value {
                Some(value) => value,
                None if *alone => "true".to_string(),
                None => arguments.next().ok_or_else(|| FlagError(format!("flag needs an argument: -{name}")))?,
            };
            self.set(name, value);
        }
        Ok(())
    }

    fn set(&mut self, name: &'static str, value: String) {
        if name == "tenant-listen" {
            self.tenant_listen.push(value);
        } else {
            self.values.insert(name, value);
        }
    }

    /// Fills in what no flag said. Answers the variables that mean nothing here.
    fn read_environment(&mut self, environment: impl IntoIterator<Item = (String, String)>) -> Vec<String> {
        let mut unknown = Vec::new();
        for (variable, value) in environment {
            let Some(name) = variable.strip_prefix("ETCD_") else { continue };
            let name = name.to_ascii_lowercase().replace('_', "-");
            match FLAGS.iter().find(|(known, ..)| *known == name) {
                Some(("tenant-listen", ..)) if self.tenant_listen.is_empty() => {
                    self.tenant_listen = value.split(',').map(str::to_string).collect();
                }
                Some((known, ..)) => {
                    self.values.entry(known).or_insert(value);
                }
                None => unknown.push(variable),
            }
        }
        unknown
    }

    fn is_set(&self, name: &str) -> Result<bool, FlagError> {
        let Some(value) = self.values.get(name) else { return Ok(false) };
        match value.as_str() {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            _ => Err(bad(name, value, "want true or false")),
        }
    }

    fn text(&self, name: &str, default: &str) -> String {
        self.values.get(name).cloned().unwrap_or_else(|| default.to_string())
    }

    fn number<T: std::str::FromStr + Copy>(&self, name: &str, default: T) -> Result<T, FlagError> {
        match self.values.get(name) {
            Some(value) => value.parse().map_err(|_| bad(name, value, "want a number")),
            None => Ok(default),
        }
    }

    fn check(self, unknown_variables: Vec<String>) -> Result<Flags, FlagError> {
        let name = self.text("name", "default");
        let tls = self.tls()?;
        let listen = self.text("listen-client-urls", "http://localhost:2379");
        let listen_client_urls = listen
            .split(',')
            .map(|url| listen_url("listen-client-urls", url, tls.is_some()))
            .collect::<Result<_, _>>()?;
        let advertise = self.values.get("advertise-client-urls").map_or(listen.as_str(), String::as_str);
        let advertise_client_urls = advertise.split(',').map(str::to_string).collect();
        let tenant_listen =
            self.tenant_listen.iter().map(|pair| tenant_listen(pair, tls.is_some())).collect::<Result<_, _>>()?;
        let log_level = self.text("log-level", "info");
        if !["debug", "info", "warn", "error", "dpanic", "panic", "fatal"].contains(&log_level.as_str()) {
            return Err(bad("log-level", &log_level, "want debug, info, warn, error, panic or fatal"));
        }
        let heartbeat_interval = Duration::from_millis(self.number("heartbeat-interval", 100)?);
        let election_timeout = Duration::from_millis(self.number("election-timeout", 1_000)?);
        if heartbeat_interval.is_zero()
            || election_timeout < 5 * heartbeat_interval
            || election_timeout > ELECTION_TIMEOUT_MAX
        {
            return Err(FlagError(format!(
                "--election-timeout[{}ms] must be at least 5 times --heartbeat-interval[{}ms], and at most 50000ms",
                election_timeout.as_millis(),
                heartbeat_interval.as_millis()
            )));
        }
        Ok(Flags {
            data_dir: self.text("data-dir", &format!("{name}.tenure")).into(),
            listen_client_urls,
            advertise_client_urls,
            tenant_listen,
            tls,
            quota_backend_bytes: self.number("quota-backend-bytes", 0)?,
            max_request_bytes: self.number("max-request-bytes", MAX_REQUEST_BYTES)?,
            max_txn_ops: self.number("max-txn-ops", MAX_TXN_OPS)?,
            progress_period: self.progress_period()?,
            heartbeat_interval,
            election_timeout,
            log_level,
            unknown_variables,
            name,
        })
    }

    fn progress_period(&self) -> Result<Duration, FlagError> {
        const NAME: &str = "watch-progress-notify-interval";
        let text = self.text(NAME, "10m");
        let period = parse_duration(&text).ok_or_else(|| bad(NAME, &text, "want a duration such as 5s or 10m"))?;
        if period.is_zero() {
            return Ok(Duration::from_secs(600));
        }
        if period < PROGRESS_PERIOD_MIN { Err(bad(NAME, &text, "want at least 100ms")) } else { Ok(period) }
    }

    fn tls(&self) -> Result<Option<TlsFiles>, FlagError> {
        let client_cert_auth = self.is_set("client-cert-auth")?;
        let file = |name| self.values.get(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let trusted_ca_file = file("trusted-ca-file");
        match (file("cert-file"), file("key-file")) {
            (Some(cert_file), Some(key_file)) => {
                if client_cert_auth && trusted_ca_file.is_none() {
                    return Err(FlagError("--client-cert-auth needs --trusted-ca-file".to_string()));
                }
                Ok(Some(TlsFiles { cert_file, key_file, trusted_ca_file, client_cert_auth }))
            }
            (None, None) if client_cert_auth => {
                Err(FlagError("--client-cert-auth needs --cert-file and --key-file".to_string()))
            }
            (None, None) => Ok(None),
            (Some(_), None) | (None, Some(_)) => {
                Err(FlagError("--cert-file and --key-file must both be given, or neither".to_string()))
            }
        }
    }
}

fn bad(name: &str, value: &str, want: &str) -> FlagError {
    FlagError(format!("invalid value {value:?} for flag -{name}: {want}"))
}

fn listen_url(flag: &str, text: &str, has_tls: bool) -> Result<Url, FlagError> {
    let url = Url::parse(text.trim()).map_err(|error| bad(flag, text, &error.to_string()))?;
    match url.scheme() {
        "http" | "https" if url.port().is_none() => return Err(bad(flag, text, "want host:port")),
        "http" | "https" if !matches!(url.path(), "" | "/") => return Err(bad(flag, text, "want no path")),
        "http" | "unix" => {}
        "https" | "unixs" if has_tls => {}
        "https" | "unixs" => return Err(bad(flag, text, "TLS needs --cert-file and --key-file")),
        _ => return Err(bad(flag, text, "want http, https, unix or unixs")),
    }
    Ok(url)
}

fn tenant_listen(pair: &str, has_tls: bool) -> Result<(String, Url), FlagError> {
    const NAME: &str = "tenant-listen";
    let (name, url) = pair.trim().split_once('=').ok_or_else(|| bad(NAME, pair, "want NAME=URL"))?;
    check_tenant_name(name).map_err(|error| bad(NAME, pair, &error.to_string()))?;
    Ok((name.to_string(), listen_url(NAME, url, has_tls)?))
}

/// Go's durations: `300ms`, `1h30m`, `0`.
fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at_checked(digits)?;
        let unit_len = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(unit_len)?;
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?)?;
        rest = tail;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Result<Flags, String> {
        let environment = environment.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        match parse(arguments.iter().map(ToString::to_string), environment) {
            Ok(Parsed::Run(flags)) => Ok(*flags),
            Ok(other) => Err(format!("{other:?}")),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn all_spellings_of_a_flag_are_one() {
        for arguments in [&["--name", "a"][..], &["-name", "a"], &["--name=a"], &["-name=b", "--name=a"]] {
            assert_eq!(run(arguments, &[]).unwrap().name, "a");
        }
        assert_eq!(run(&[], &[("ETCD_NAME", "env")]).unwrap().name, "env");
        assert_eq!(run(&["--name=flag"], &[("ETCD_NAME", "env")]).unwrap().name, "flag");
        assert_eq!(run(&[], &[("ETCD_NOPE", "1")]).unwrap().unknown_variables, ["ETCD_NOPE"]);
    }

    #[test]
    fn tenants_collect_and_are_checked() {
        let flags = run(&["--tenant-listen", "a=http://127.0.0.1:1", "-tenant-listen=b=unix:///tmp/b"], &[]).unwrap();
        assert_eq!(flags.tenant_listen.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert!(run(&["--tenant-listen", "A=http://127.0.0.1:1"], &[]).unwrap_err().contains("invalid tenant name"));
        assert!(run(&["--tenant-listen", "nourl"], &[]).unwrap_err().contains("want NAME=URL"));
    }

    #[test]
    fn what_is_wrong_is_one_line() {
        for (arguments, text) in [
            (&["--nope"][..], "flag provided but not defined: -nope"),
            (&["--name"], "flag needs an argument: -name"),
            (&["serve"], "'serve' is not a valid flag"),
            (&["--max-txn-ops=x"], "invalid value \"x\" for flag -max-txn-ops: want a number"),
            (&["--client-cert-auth=maybe"], "invalid value \"maybe\" for flag -client-cert-auth: want true or false"),
            (&["--cert-file=c"], "--cert-file and --key-file must both be given, or neither"),
            (&["--watch-progress-notify-interval=1ms"], "want at least 100ms"),
            (&["--listen-client-urls=https://127.0.0.1:1"], "TLS needs --cert-file and --key-file"),
            (&["--listen-client-urls=http://127.0.0.1"], "want host:port"),
            (&["--log-level=loud"], "want debug, info, warn, error, panic or fatal"),
        ] {
            let error = run(arguments, &[]).unwrap_err();
            assert!(error.contains(text) && !error.contains('\n'), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn durations_are_gos() {
        for (text, millis) in [("5s", 5_000), ("100ms", 100), ("1h30m", 5_400_000), ("1.5s", 1_500), ("0", 0)] {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "5", "s", "-1s", "1x"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}
