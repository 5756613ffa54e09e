//! etcd's command line: one or two dashes, `--f v`, `--f=v`, bare booleans, `ETCD_*` variables behind the flags.
//!
//! Flags of etcd that need nothing here are taken with a warning; what is asked for and not built is refused by name. Everything wrong is one line; the program then exits with 1.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use crate::cell::check_tenant_name;
use crate::listen::ConnectionLimits;
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
    ("max-concurrent-streams", false, "requests open at a time on one connection (default: no limit)"),
    ("grpc-keepalive-min-time", false, "how often a client may ping (default 5s)"),
    ("grpc-keepalive-interval", false, "how often an idle client is pinged (default 2h)"),
    ("grpc-keepalive-timeout", false, "how long it may take to answer (default 20s)"),
    ("listen-metrics-urls", false, "URLs that serve /metrics and health alone, of \"default\""),
    ("log-level", false, "debug, info, warn, error, panic or fatal (default info)"),
    ("version", true, "print the version and exit"),
    ("help", true, "print this and exit"),
];

/// Flags of etcd that a store of one member can take without acting on them, and whether they stand alone. Each one given
/// is named in a warning.
const WITHOUT_EFFECT: &[(&str, bool)] = &[
    ("snapshot-count", false),
    ("initial-election-tick-advance", true),
    ("listen-peer-urls", false),
    ("max-snapshots", false),
    ("max-wals", false),
    ("backend-bbolt-freelist-type", false),
    ("backend-batch-interval", false),
    ("backend-batch-limit", false),
    ("socket-reuse-port", true),
    ("socket-reuse-address", true),
    ("raft-read-timeout", false),
    ("raft-write-timeout", false),
    ("feature-gates", false),
    ("initial-advertise-peer-urls", false),
    ("initial-cluster-state", false),
    ("initial-cluster-token", false),
    ("strict-reconfig-check", true),
    ("pre-vote", true),
    ("v2-deprecation", false),
    ("peer-cert-file", false),
    ("peer-key-file", false),
    ("peer-client-cert-auth", true),
    ("peer-client-cert-file", false),
    ("peer-client-key-file", false),
    ("peer-trusted-ca-file", false),
    ("peer-cert-allowed-cn", false),
    ("peer-cert-allowed-hostname", false),
    ("peer-auto-tls", true),
    ("peer-crl-file", false),
    ("peer-skip-client-san-verification", true),
    ("client-cert-file", false),
    ("client-key-file", false),
    ("self-signed-cert-validity", false),
    ("auth-token", false),
    ("auth-token-ttl", false),
    ("bcrypt-cost", false),
    ("enable-pprof", true),
    ("metrics", false),
    ("logger", false),
    ("log-outputs", false),
    ("log-format", false),
    ("enable-log-rotation", true),
    ("log-rotation-config-json", false),
    ("warning-unary-request-duration", false),
    ("warning-apply-duration", false),
    ("enable-distributed-tracing", true),
    ("distributed-tracing-address", false),
    ("distributed-tracing-service-name", false),
    ("distributed-tracing-instance-id", false),
    ("distributed-tracing-sampling-rate", false),
    ("corrupt-check-time", false),
    ("compact-hash-check-time", false),
    ("compaction-batch-limit", false),
    ("compaction-sleep-interval", false),
    ("downgrade-check-time", false),
    ("snapshot-catchup-entries", false),
    ("bootstrap-defrag-threshold-megabytes", false),
    ("memory-mlock", true),
    ("max-learners", false),
    ("unsafe-no-fsync", true),
];

/// Flags of etcd that must not be passed over in silence, because whoever sets them relies on them: whether they stand
/// alone, and the values that ask for nothing.
const NOT_BUILT: &[(&str, bool, &[&str])] = &[
    ("wal-dir", false, &[""]),
    ("auto-compaction-retention", false, &["", "0"]),
    ("auto-compaction-mode", false, &["periodic", "revision"]),
    ("client-crl-file", false, &[""]),
    ("client-cert-allowed-hostname", false, &[""]),
    ("auto-tls", true, &["false"]),
    ("cipher-suites", false, &[""]),
    ("tls-min-version", false, &["", "TLS1.2"]),
    ("tls-max-version", false, &["", "TLS1.3"]),
    ("cors", false, &["", "*"]),
    ("host-whitelist", false, &["", "*"]),
    ("force-new-cluster", true, &["false"]),
    ("listen-client-http-urls", false, &[""]),
    ("config-file", false, &[""]),
    ("discovery", false, &[""]),
    ("discovery-token", false, &[""]),
    ("discovery-endpoints", false, &[""]),
    ("discovery-srv", false, &[""]),
];

/// Old spellings that etcd took and Kubernetes' tests still use.
const ALIASES: &[(&str, &str)] = &[("experimental-watch-progress-notify-interval", "watch-progress-notify-interval")];

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
    /// URLs of listeners that answer no gRPC.
    pub listen_metrics_urls: Vec<Url>,
    pub connections: ConnectionLimits,
    /// Flags that were given and mean nothing here: worth a warning.
    pub without_effect: Vec<&'static str>,
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
            let Some((name, alone)) = known(name) else {
                return Err(FlagError(format!("flag provided but not defined: -{name}")));
            };
            let value = match value {
                Some(value) => value,
                None if alone => "true".to_string(),
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
            match known(&name) {
                Some(("tenant-listen", _)) => {
                    if self.tenant_listen.is_empty() {
                        self.tenant_listen = value.split(',').map(str::to_string).collect();
                    }
                }
                Some((known, _)) => {
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

    /// Refuses what is not built and asked for; answers what is given without having an effect.
    fn check_unused(&self) -> Result<Vec<&'static str>, FlagError> {
        for (name, _, harmless) in NOT_BUILT {
            if let Some(value) = self.values.get(name).filter(|value| !harmless.contains(&value.as_str())) {
                return Err(FlagError(format!("flag -{name} is not supported yet (value {value:?})")));
            }
        }
        if let Some(members) = self.values.get("initial-cluster").filter(|members| members.contains(',')) {
            return Err(FlagError(format!(
                "flag -initial-cluster: one member is supported as yet (value {members:?})"
            )));
        }
        let given = |name: &&'static str| self.values.contains_key(name);
        Ok(WITHOUT_EFFECT.iter().map(|(name, _)| *name).filter(given).collect())
    }

    fn connection_limits(&self) -> Result<ConnectionLimits, FlagError> {
        let default = ConnectionLimits::default();
        Ok(ConnectionLimits {
            streams_max: match self.number("max-concurrent-streams", u32::MAX)? {
                u32::MAX => None,
                streams => Some(streams),
            },
            ping_interval_min: self.duration("grpc-keepalive-min-time", default.ping_interval_min)?,
            keepalive_interval: self.duration("grpc-keepalive-interval", default.keepalive_interval)?,
            keepalive_timeout: self.duration("grpc-keepalive-timeout", default.keepalive_timeout)?,
        })
    }

    fn duration(&self, name: &str, default: Duration) -> Result<Duration, FlagError> {
        let Some(text) = self.values.get(name) else { return Ok(default) };
        parse_duration(text).ok_or_else(|| bad(name, text, "want a duration such as 5s or 10m"))
    }

    fn urls(&self, name: &str, text: &str, has_tls: bool) -> Result<Vec<Url>, FlagError> {
        text.split(',').filter(|url| !url.is_empty()).map(|url| listen_url(name, url, has_tls)).collect()
    }

    fn check(self, unknown_variables: Vec<String>) -> Result<Flags, FlagError> {
        let without_effect = self.check_unused()?;
        let name = self.text("name", "default");
        let tls = self.tls()?;
        let listen = self.text("listen-client-urls", "http://localhost:2379");
        let listen_client_urls = self.urls("listen-client-urls", &listen, tls.is_some())?;
        let listen_metrics_urls =
            self.urls("listen-metrics-urls", &self.text("listen-metrics-urls", ""), tls.is_some())?;
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
            listen_metrics_urls,
            connections: self.connection_limits()?,
            without_effect,
            unknown_variables,
            name,
        })
    }

    fn progress_period(&self) -> Result<Duration, FlagError> {
        const NAME: &str = "watch-progress-notify-interval";
        const DEFAULT: Duration = Duration::from_secs(600);
        let period = self.duration(NAME, DEFAULT)?;
        if period.is_zero() {
            return Ok(DEFAULT);
        }
        if period < PROGRESS_PERIOD_MIN {
            return Err(bad(NAME, &self.text(NAME, ""), "want at least 100ms"));
        }
        Ok(period)
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

/// The name of a flag as it is kept, and whether it stands alone.
fn known(name: &str) -> Option<(&'static str, bool)> {
    let name = ALIASES.iter().find(|(old, _)| *old == name).map_or(name, |(_, new)| new);
    let acting = FLAGS.iter().map(|(known, alone, _)| (*known, *alone));
    let unused = WITHOUT_EFFECT.iter().copied();
    let not_built = NOT_BUILT.iter().map(|(known, alone, _)| (*known, *alone));
    let mut all = acting.chain(unused).chain(not_built).chain([("initial-cluster", false)]);
    all.find(|(known, _)| *known == name)
}

fn bad(name: &str, value: &str, want: &str) -> FlagError {
    FlagError(format!("invalid value {value:?} for flag -{name}: {want}"))
}

fn listen_url(flag: &str, text: &str, has_tls: bool) -> Result<Url, FlagError> {
    let url = Url::parse(text.trim()).map_err(|error| bad(flag, text, &error.to_string()))?;
    match url.scheme() {
        "http" | "https" if !has_port(text) => return Err(bad(flag, text, "want host:port")),
        "http" | "https" if !matches!(url.path(), "" | "/") => return Err(bad(flag, text, "want no path")),
        "http" | "unix" => {}
        "https" | "unixs" if has_tls => {}
        "https" | "unixs" => return Err(bad(flag, text, "TLS needs --cert-file and --key-file")),
        _ => return Err(bad(flag, text, "want http, https, unix or unixs")),
    }
    Ok(url)
}

/// Whether the text names a port; the parsed URL no longer says so of a scheme's usual one.
fn has_port(text: &str) -> bool {
    let authority = text.split_once("://").map_or("", |(_, rest)| rest.split('/').next().unwrap_or(""));
    authority
        .rsplit_once(':')
        .is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
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
        let alias = ["--experimental-watch-progress-notify-interval", "1s"];
        assert_eq!(run(&alias, &[]).unwrap().progress_period, Duration::from_secs(1));
        assert!(run(&["--listen-client-urls=http://h:80,https://h:443", "--cert-file=c", "--key-file=k"], &[]).is_ok());
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
            (
                &["--auto-compaction-retention=1h"],
                "flag -auto-compaction-retention is not supported yet (value \"1h\")",
            ),
            (&["--auto-tls"], "flag -auto-tls is not supported yet"),
            (&["--initial-cluster=a=http://h:1,b=http://h:2"], "one member is supported as yet"),
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
    fn etcds_other_flags_are_taken_where_nothing_depends_on_them() {
        let arguments =
            ["--initial-cluster=default=http://h:1", "-pre-vote", "--auto-tls=false", "--cors=*", "--bcrypt-cost", "4"];
        assert_eq!(run(&arguments, &[]).unwrap().without_effect, ["pre-vote", "bcrypt-cost"]);
        let limits = run(&["--max-concurrent-streams=7", "--grpc-keepalive-min-time=1s"], &[]).unwrap().connections;
        assert_eq!((limits.streams_max, limits.ping_interval_min), (Some(7), Duration::from_secs(1)));
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
