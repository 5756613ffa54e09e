//! etcd's command line: one or two dashes, `--f v`, `--f=v`, bare booleans, `ETCD_*` variables behind the flags.
//!
//! Every flag of etcd is known. Those that mean nothing here are taken with a warning; what is asked for and not
//! built is refused by name, because whoever set it relies on it. Everything wrong is one line; the program then exits with 1.
//! A configuration file stands for all of them: see [`crate::config_file`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use url::Url;

use crate::auto_compaction::AutoCompaction;
use crate::cell::{ClusterState, InitialCluster, check_tenant_name};
use crate::config_file;
use crate::http_endpoints::HttpAccess;
use crate::ids::{CLUSTER_TOKEN_DEFAULT, PEER_URL_DEFAULT};
use crate::issuer::IssuerFiles;
use crate::listen::ConnectionLimits;
use crate::logging::{LogFormat, LogOutput, LogSettings};
use crate::service::{MAX_REQUEST_BYTES, MAX_TXN_OPS, REQUEST_BYTES_BOUND};
use crate::tls::PeerTlsFiles;
use crate::tls_protocol::TlsProtocol;
use crate::urls::{check_member_url, has_port};

/// What a flag's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// True or false; stands alone (`--f`) too, as Go's do.
    Switch,
    Number,
    /// As Go writes it: `5s`, `1h30m`.
    Duration,
    Text,
}

/// Name, kind and help of the flags that act, by group.
type Group = (&'static str, &'static [(&'static str, Kind, &'static str)]);

const FLAGS: &[Group] = &[
    (
        "Member",
        &[
            ("data-dir", Kind::Text, "directory of everything kept (default ${name}.tenure)"),
            (
                "config-file",
                Kind::Text,
                "YAML file with flags by their names; other flags and variables do not count then",
            ),
            ("name", Kind::Text, "this member's name (default \"default\")"),
            ("heartbeat-interval", Kind::Number, "milliseconds between heartbeats (default 100)"),
            ("election-timeout", Kind::Number, "milliseconds without a leader before an election (default 1000)"),
            ("initial-advertise-peer-urls", Kind::Text, "of a new data directory: what its member id is made from"),
            ("initial-cluster-token", Kind::Text, "of a new data directory: what its ids are made from"),
        ],
    ),
    (
        "Cluster",
        &[
            ("listen-peer-urls", Kind::Text, "URLs that other members use (default: none, the member is alone)"),
            ("initial-cluster", Kind::Text, "NAME=URL of every member, separated by commas (default: this one alone)"),
            ("initial-cluster-state", Kind::Text, "new, or existing to join the members there are (default new)"),
            ("force-new-cluster", Kind::Switch, "go on alone, without the other members: for a majority that is lost"),
            (
                "strict-reconfig-check",
                Kind::Switch,
                "refuse changes of members that endanger the quorum (default true)",
            ),
            ("max-learners", Kind::Number, "members without a vote at a time (default 1)"),
            ("pre-vote", Kind::Switch, "ask before disturbing the others with an election (default true)"),
            ("snapshot-count", Kind::Number, "log entries after which the state is made durable (default: by bytes)"),
            ("snapshot-catchup-entries", Kind::Number, "log entries kept for members behind (default 5000)"),
            ("peer-cert-file", Kind::Text, "certificate towards other members, PEM"),
            ("peer-key-file", Kind::Text, "its key, PEM"),
            (
                "peer-trusted-ca-file",
                Kind::Text,
                "CA of the members' certificates, PEM; those that connect must show one of it",
            ),
            (
                "peer-client-cert-auth",
                Kind::Switch,
                "demand a certificate of members that connect: --peer-trusted-ca-file must be given",
            ),
            ("peer-client-cert-file", Kind::Text, "certificate where this member connects, if it is another one, PEM"),
            ("peer-client-key-file", Kind::Text, "its key, PEM"),
            ("peer-auto-tls", Kind::Switch, "TLS between members with certificates that nobody checks"),
        ],
    ),
    (
        "Clients",
        &[
            (
                "listen-client-urls",
                Kind::Text,
                "URLs of the tenant by certificate, or of \"default\" (default http://localhost:2379)",
            ),
            ("listen-client-http-urls", Kind::Text, "URLs that serve HTTP; --listen-client-urls then serve gRPC alone"),
            ("advertise-client-urls", Kind::Text, "URLs told to clients (default: where it listens)"),
            ("tenant-listen", Kind::Text, "NAME=URL: a listener of one tenant's own; may be given again"),
            ("max-concurrent-streams", Kind::Number, "requests open at a time on one connection (default 2000)"),
            ("grpc-keepalive-min-time", Kind::Duration, "how often a client may ping (default 5s)"),
            ("grpc-keepalive-interval", Kind::Duration, "how often an idle client is pinged (default 2h)"),
            ("grpc-keepalive-timeout", Kind::Duration, "how long it may take to answer (default 20s)"),
            (
                "cell-domain",
                Kind::Text,
                "TLS clients that call the server NAME.DOMAIN are tenant NAME, if no certificate says so (default: none)",
            ),
            ("cors", Kind::Text, "origins of web pages that may read answers (default *)"),
            (
                "host-whitelist",
                Kind::Text,
                "host names that cleartext HTTP requests may call this server by (default *)",
            ),
        ],
    ),
    (
        "TLS",
        &[
            ("cert-file", Kind::Text, "server certificate, PEM"),
            ("key-file", Kind::Text, "its key, PEM"),
            ("trusted-ca-file", Kind::Text, "CA of client certificates, PEM; clients must show one of it"),
            ("client-cert-auth", Kind::Switch, "demand a client certificate: --trusted-ca-file must be given"),
            ("auto-tls", Kind::Switch, "TLS with a certificate made at start, which clients cannot check"),
            (
                "cipher-suites",
                Kind::Text,
                "TLS 1.2 suites by Go's names, separated by commas, with clients and members (default: all of rustls)",
            ),
            ("tls-min-version", Kind::Text, "TLS1.2 or TLS1.3 (default TLS1.2)"),
            ("tls-max-version", Kind::Text, "TLS1.2 or TLS1.3 (default TLS1.3)"),
        ],
    ),
    (
        "Administration",
        &[
            (
                "listen-admin-urls",
                Kind::Text,
                "https URLs of the admin API, for clients whose certificate has the URI SAN tenure://admin; \
                 DATA-DIR/admin.sock is always there",
            ),
            (
                "issuer-cert-file",
                Kind::Text,
                "CA that signs certificates of tenants, PEM; clients are told to trust it",
            ),
            ("issuer-key-file", Kind::Text, "its key, PEM"),
        ],
    ),
    (
        "Limits",
        &[
            ("quota-backend-bytes", Kind::Number, "bytes each tenant may hold (0 = 2 GiB, negative = no limit)"),
            (
                "disk-reserve-bytes",
                Kind::Number,
                "free bytes on the disk below which writes are refused (default 268435456, or a tenth of the disk)",
            ),
            ("max-request-bytes", Kind::Number, "largest write (default 1572864, at most 15728640)"),
            ("max-txn-ops", Kind::Number, "most operations of a txn (default 128)"),
            (
                "auto-compaction-mode",
                Kind::Text,
                "periodic or revision: what --auto-compaction-retention is (default periodic)",
            ),
            (
                "auto-compaction-retention",
                Kind::Text,
                "hours, a duration such as 5m, or revisions of each tenant that stay (default 0: all)",
            ),
            ("watch-progress-notify-interval", Kind::Duration, "period of watch progress (default 10m)"),
        ],
    ),
    (
        "Logs and metrics",
        &[
            ("log-level", Kind::Text, "debug, info, warn, error, panic or fatal (default info)"),
            ("log-format", Kind::Text, "json or console (default json)"),
            ("log-outputs", Kind::Text, "default, stderr, stdout or files, separated by commas (default stderr)"),
            ("logger", Kind::Text, "zap: that its lines look like this is all there is to it"),
            ("listen-metrics-urls", Kind::Text, "URLs that serve /metrics and health alone, of \"default\""),
            ("metrics", Kind::Text, "basic"),
            (
                "warning-apply-duration",
                Kind::Duration,
                "an apply that takes longer is counted and logged (default 100ms)",
            ),
            ("version", Kind::Switch, "print the version and exit"),
            ("help", Kind::Switch, "print this and exit"),
        ],
    ),
];

/// Flags of etcd that a store of one member can take without acting on them. Each one given is named in a warning.
const WITHOUT_EFFECT: &[(&str, Kind)] = &[
    ("initial-election-tick-advance", Kind::Switch),
    ("max-snapshots", Kind::Number),
    ("max-wals", Kind::Number),
    ("backend-bbolt-freelist-type", Kind::Text),
    ("backend-batch-interval", Kind::Duration),
    ("backend-batch-limit", Kind::Number),
    ("socket-reuse-port", Kind::Switch),
    ("socket-reuse-address", Kind::Switch),
    ("raft-read-timeout", Kind::Duration),
    ("raft-write-timeout", Kind::Duration),
    ("feature-gates", Kind::Text),
    ("v2-deprecation", Kind::Text),
    ("peer-skip-client-san-verification", Kind::Switch),
    ("client-cert-file", Kind::Text),
    ("client-key-file", Kind::Text),
    ("self-signed-cert-validity", Kind::Number),
    ("auth-token", Kind::Text),
    ("auth-token-ttl", Kind::Number),
    ("bcrypt-cost", Kind::Number),
    ("enable-pprof", Kind::Switch),
    ("enable-grpc-gateway", Kind::Switch),
    ("enable-log-rotation", Kind::Switch),
    ("log-rotation-config-json", Kind::Text),
    ("warning-unary-request-duration", Kind::Duration),
    ("enable-distributed-tracing", Kind::Switch),
    ("distributed-tracing-address", Kind::Text),
    ("distributed-tracing-service-name", Kind::Text),
    ("distributed-tracing-instance-id", Kind::Text),
    ("distributed-tracing-sampling-rate", Kind::Number),
    ("corrupt-check-time", Kind::Duration),
    ("compact-hash-check-time", Kind::Duration),
    ("experimental-initial-corrupt-check", Kind::Switch),
    ("compaction-batch-limit", Kind::Number),
    ("compaction-sleep-interval", Kind::Duration),
    ("downgrade-check-time", Kind::Duration),
    ("bootstrap-defrag-threshold-megabytes", Kind::Number),
    ("memory-mlock", Kind::Switch),
    ("unsafe-no-fsync", Kind::Switch),
    ("discovery-dial-timeout", Kind::Duration),
    ("discovery-request-timeout", Kind::Duration),
    ("discovery-keepalive-time", Kind::Duration),
    ("discovery-keepalive-timeout", Kind::Duration),
    ("discovery-insecure-transport", Kind::Switch),
    ("discovery-insecure-skip-tls-verify", Kind::Switch),
    ("discovery-cert", Kind::Text),
    ("discovery-key", Kind::Text),
    ("discovery-cacert", Kind::Text),
    ("discovery-user", Kind::Text),
    ("discovery-password", Kind::Text),
    ("discovery-srv-name", Kind::Text),
    ("discovery-fallback", Kind::Text),
    ("discovery-proxy", Kind::Text),
];

/// Flags of etcd that must not be passed over in silence, because whoever sets them relies on them; and the values that ask
/// for nothing.
const NOT_BUILT: &[(&str, Kind, &[&str])] = &[
    ("wal-dir", Kind::Text, &[""]),
    ("peer-cert-allowed-cn", Kind::Text, &[""]),
    ("peer-cert-allowed-hostname", Kind::Text, &[""]),
    ("peer-crl-file", Kind::Text, &[""]),
    ("allowed-cn", Kind::Text, &[""]),
    ("allowed-hostname", Kind::Text, &[""]),
    ("peer-allowed-cn", Kind::Text, &[""]),
    ("peer-allowed-hostname", Kind::Text, &[""]),
    ("client-crl-file", Kind::Text, &[""]),
    ("client-cert-allowed-hostname", Kind::Text, &[""]),
    ("discovery", Kind::Text, &[""]),
    ("discovery-token", Kind::Text, &[""]),
    ("discovery-endpoints", Kind::Text, &[""]),
    ("discovery-srv", Kind::Text, &[""]),
];

/// What stands before the name of a flag that etcd once tried out. Kubernetes' tests still use
/// `--experimental-watch-progress-notify-interval`.
const TRIED_OUT: &str = "experimental-";

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
    /// If there are any, the URLs above serve gRPC alone.
    pub listen_client_http_urls: Vec<Url>,
    pub advertise_client_urls: Vec<String>,
    pub tenant_listen: Vec<(String, Url)>,
    /// What stands behind the tenant in a server name.
    pub cell_domain: Option<String>,
    pub listen_admin_urls: Vec<Url>,
    /// The CA that signs certificates of tenants.
    pub issuer: Option<IssuerFiles>,
    pub tls: Option<TlsFiles>,
    /// With clients and members.
    pub tls_protocol: TlsProtocol,
    /// Cipher suites that were asked for and add nothing: worth a warning.
    pub suites_without_effect: Vec<String>,
    /// `None`: see [`crate::disk`].
    pub disk_reserve_bytes: Option<u64>,
    pub force_new_cluster: bool,
    pub quota_backend_bytes: i64,
    pub max_request_bytes: usize,
    pub max_txn_ops: usize,
    pub progress_period: Duration,
    pub auto_compaction: Option<AutoCompaction>,
    pub heartbeat_interval: Duration,
    pub election_timeout: Duration,
    /// What the ids of a new data directory are made from.
    pub advertise_peer_urls: Vec<String>,
    pub cluster_token: String,
    /// URLs that other members use; none: the member is alone.
    pub listen_peer_urls: Vec<Url>,
    pub initial_cluster: InitialCluster,
    pub cluster_state: ClusterState,
    pub peer_tls: Option<PeerTlsFiles>,
    pub strict_reconfig_check: bool,
    pub max_learners: usize,
    pub pre_vote: bool,
    pub slow_apply: Duration,
    pub snapshot_count: u64,
    pub snapshot_catchup_entries: u64,
    pub log: LogSettings,
    pub access: HttpAccess,
    /// URLs of listeners that answer no gRPC.
    pub listen_metrics_urls: Vec<Url>,
    pub connections: ConnectionLimits,
    /// Flags that were given and mean nothing here: worth a warning.
    pub without_effect: Vec<&'static str>,
    /// Set variables, or keys of the configuration file, that name no flag: worth a warning.
    pub unknown_variables: Vec<String>,
}

/// What is behind `https://` and `unixs://` URLs.
#[derive(Clone, Debug)]
pub enum TlsFiles {
    Files {
        cert_file: PathBuf,
        key_file: PathBuf,
        /// Who signs the certificates of clients, which must then show one.
        trusted_ca_file: Option<PathBuf>,
    },
    /// A certificate made at start, which clients cannot check: `--auto-tls`.
    Auto,
}

impl TlsFiles {
    /// Whether clients must show a certificate.
    pub fn client_cert_auth(&self) -> bool {
        match self {
            TlsFiles::Files { trusted_ca_file, .. } => trusted_ca_file.is_some(),
            TlsFiles::Auto => false,
        }
    }
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
    match given.values.get("config-file").filter(|path| !path.is_empty()) {
        Some(path) => {
            let (instead, unknown) = Given::of_file(Path::new(path))?;
            let mut flags = instead.check(unknown)?;
            let ignored = given.values.keys().filter(|name| **name != "config-file");
            flags.without_effect.extend(ignored.chain((!given.tenant_listen.is_empty()).then_some(&"tenant-listen")));
            Ok(Parsed::Run(Box::new(flags)))
        }
        None => Ok(Parsed::Run(Box::new(given.check(unknown_variables)?))),
    }
}

/// What `--help` prints.
pub fn usage() -> String {
    let mut text =
        "Usage: tenured [flags]\n\nEvery flag can be set as ETCD_<NAME> too. etcd's other flags are taken with a\n\
                    warning where nothing depends on them, and refused by name where something does.\n"
            .to_string();
    for (group, flags) in FLAGS {
        text.push_str(&format!("\n{group}:\n"));
        text.extend(flags.iter().map(|(name, _, help)| format!("  --{name}\n        {help}\n")));
    }
    text
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
            let Some((name, kind)) = known(name) else {
                return Err(FlagError(format!("flag provided but not defined: -{name}")));
            };
            let value = match value {
                Some(value) => value,
                None if kind == Kind::Switch => "true".to_string(),
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
            // An empty one says nothing, as in etcd.
            let Some(name) = variable.strip_prefix("ETCD_").filter(|_| !value.is_empty()) else { continue };
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

    /// What a configuration file says, and its keys that mean nothing here.
    fn of_file(path: &Path) -> Result<(Self, Vec<String>), FlagError> {
        let mut given = Given::default();
        let mut unknown = Vec::new();
        for (key, value) in
            config_file::read(path).map_err(|error| FlagError(format!("configuration file: {error}")))?
        {
            match known(&key) {
                Some(("config-file", _)) | None => unknown.push(key),
                Some(("tenant-listen", _)) => given.tenant_listen.extend(value.split(',').map(str::to_string)),
                // Go's durations in JSON.
                Some((name, Kind::Duration)) if value.parse::<u64>().is_ok() => given.set(name, format!("{value}ns")),
                Some((name, _)) => given.set(name, value),
            }
        }
        Ok((given, unknown))
    }

    fn is_set(&self, name: &str) -> Result<bool, FlagError> {
        let Some(value) = self.values.get(name) else { return Ok(false) };
        parse_switch(value).ok_or_else(|| bad(name, value, "want true or false"))
    }

    /// Also of flags that have no effect: a value that is none is a mistake all the same.
    fn check_kinds(&self) -> Result<(), FlagError> {
        for (name, value) in &self.values {
            let kind = known(name).map_or(Kind::Text, |(_, kind)| kind);
            match kind {
                Kind::Switch if parse_switch(value).is_none() => return Err(bad(name, value, "want true or false")),
                Kind::Number if value.parse::<i64>().is_err() => return Err(bad(name, value, "want a number")),
                Kind::Duration if parse_duration(value).is_none() => {
                    return Err(bad(name, value, "want a duration such as 5s or 10m"));
                }
                Kind::Switch | Kind::Number | Kind::Duration | Kind::Text => {}
            }
        }
        Ok(())
    }

    /// A list between commas; `None` if it is to be all (`*`) or nothing is said.
    fn listed(&self, name: &str) -> Option<Vec<String>> {
        let list = self.values.get(name).filter(|list| !list.is_empty())?;
        let items: Vec<String> = list.split(',').map(str::trim).map(str::to_string).collect();
        (!items.iter().any(|item| item == "*")).then_some(items)
    }

    fn one_of<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Result<T, FlagError> {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let value = self.text(name, names[0]);
        let chosen = choices.iter().find(|(name, _)| *name == value);
        chosen.map(|(_, choice)| *choice).ok_or_else(|| bad(name, &value, &format!("want {}", names.join(" or "))))
    }

    fn log(&self) -> Result<LogSettings, FlagError> {
        let level = self.text("log-level", "info");
        if !["debug", "info", "warn", "error", "dpanic", "panic", "fatal"].contains(&level.as_str()) {
            return Err(bad("log-level", &level, "want debug, info, warn, error, panic or fatal"));
        }
        self.one_of("logger", &[("zap", ())])?;
        let format = self.one_of("log-format", &[("json", LogFormat::Json), ("console", LogFormat::Console)])?;
        let outputs = self.text("log-outputs", "default");
        let outputs = outputs.split(',').map(|output| match output.trim() {
            "" | "systemd/journal" => Err(bad("log-outputs", output, "want default, stderr, stdout or a file")),
            "default" | "stderr" | "/dev/stderr" => Ok(LogOutput::Stderr),
            "stdout" | "/dev/stdout" => Ok(LogOutput::Stdout),
            path => Ok(LogOutput::File(path.into())),
        });
        Ok(LogSettings { level, format, outputs: outputs.collect::<Result<_, _>>()? })
    }

    fn access(&self) -> Result<HttpAccess, FlagError> {
        let origins = self.listed("cors");
        for origin in origins.iter().flatten() {
            Url::parse(origin).map_err(|error| bad("cors", origin, &error.to_string()))?;
        }
        Ok(HttpAccess { origins, hosts: self.listed("host-whitelist") })
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

    /// A write travels between members as one command of the log, which has a bound.
    fn max_request_bytes(&self) -> Result<usize, FlagError> {
        let bytes = self.number("max-request-bytes", MAX_REQUEST_BYTES)?;
        if bytes > REQUEST_BYTES_BOUND {
            let want = format!("want at most {REQUEST_BYTES_BOUND}");
            return Err(bad("max-request-bytes", &bytes.to_string(), &want));
        }
        Ok(bytes)
    }

    /// Refuses what is not built and asked for; answers what is given without having an effect.
    fn check_unused(&self) -> Result<Vec<&'static str>, FlagError> {
        for (name, _, harmless) in NOT_BUILT {
            if let Some(value) = self.values.get(name).filter(|value| !harmless.contains(&value.as_str())) {
                return Err(FlagError(format!("flag -{name} is not supported yet (value {value:?})")));
            }
        }
        let given = |name: &&'static str| self.values.contains_key(name);
        let extensive = self.one_of("metrics", &[("basic", None), ("extensive", Some("metrics"))])?;
        Ok(WITHOUT_EFFECT.iter().map(|(name, _)| *name).filter(given).chain(extensive).collect())
    }

    fn connection_limits(&self) -> Result<ConnectionLimits, FlagError> {
        let default = ConnectionLimits::default();
        Ok(ConnectionLimits {
            streams_max: match self.number("max-concurrent-streams", 0)? {
                0 => default.streams_max,
                // etcd's default.
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
        self.check_kinds()?;
        let without_effect = self.check_unused()?;
        let name = self.text("name", "default");
        let tls = self.tls()?;
        let peer_tls = self.peer_tls()?;
        let (tls_protocol, suites_without_effect) = self.tls_protocol()?;
        let listen = self.text("listen-client-urls", "http://localhost:2379");
        let listen_client_urls = self.urls("listen-client-urls", &listen, tls.is_some())?;
        let http = self.text("listen-client-http-urls", "");
        let listen_client_http_urls = self.urls("listen-client-http-urls", &http, tls.is_some())?;
        let listen_metrics_urls =
            self.urls("listen-metrics-urls", &self.text("listen-metrics-urls", ""), tls.is_some())?;
        let advertise = self.values.get("advertise-client-urls").map_or(listen.as_str(), String::as_str);
        let advertise_client_urls = advertise.split(',').map(str::to_string).collect();
        let tenant_listen =
            self.tenant_listen.iter().map(|pair| tenant_listen(pair, tls.is_some())).collect::<Result<_, _>>()?;
        let initial_cluster = self.initial_cluster()?;
        let listen_peer_urls = self.urls("listen-peer-urls", &self.text("listen-peer-urls", ""), peer_tls.is_some())?;
        if let Some(url) = listen_peer_urls.iter().find(|url| matches!(url.scheme(), "unix" | "unixs")) {
            return Err(bad("listen-peer-urls", url.as_str(), "members listen on http or https"));
        }
        if initial_cluster.len() > 1 && listen_peer_urls.is_empty() {
            let needed = "--listen-peer-urls is needed where --initial-cluster names several members";
            return Err(FlagError(needed.to_string()));
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
            listen_client_http_urls,
            advertise_client_urls,
            tenant_listen,
            cell_domain: Some(self.text("cell-domain", "").to_ascii_lowercase()).filter(|domain| !domain.is_empty()),
            listen_admin_urls: self.listen_admin_urls(tls.as_ref())?,
            issuer: self.issuer()?,
            tls,
            tls_protocol,
            suites_without_effect,
            disk_reserve_bytes: match self.values.contains_key("disk-reserve-bytes") {
                true => Some(self.number("disk-reserve-bytes", 0)?),
                false => None,
            },
            force_new_cluster: self.is_set("force-new-cluster")?,
            quota_backend_bytes: self.number("quota-backend-bytes", 0)?,
            max_request_bytes: self.max_request_bytes()?,
            max_txn_ops: self.number("max-txn-ops", MAX_TXN_OPS)?,
            progress_period: self.progress_period()?,
            auto_compaction: self.auto_compaction()?,
            heartbeat_interval,
            election_timeout,
            advertise_peer_urls: self.advertise_peer_urls()?,
            cluster_token: self.text("initial-cluster-token", CLUSTER_TOKEN_DEFAULT),
            listen_peer_urls,
            initial_cluster,
            cluster_state: self
                .one_of("initial-cluster-state", &[("new", ClusterState::New), ("existing", ClusterState::Existing)])?,
            peer_tls,
            strict_reconfig_check: self.switch("strict-reconfig-check", true)?,
            max_learners: self.number("max-learners", 1)?,
            pre_vote: self.switch("pre-vote", true)?,
            slow_apply: self.duration("warning-apply-duration", Duration::from_millis(100))?,
            snapshot_count: self.number("snapshot-count", 0)?,
            snapshot_catchup_entries: self.number("snapshot-catchup-entries", 5_000)?,
            log: self.log()?,
            access: self.access()?,
            listen_metrics_urls,
            connections: self.connection_limits()?,
            without_effect,
            unknown_variables,
            name,
        })
    }

    /// Over TLS with certificates alone: whoever gets in may do everything.
    fn listen_admin_urls(&self, tls: Option<&TlsFiles>) -> Result<Vec<Url>, FlagError> {
        const NAME: &str = "listen-admin-urls";
        let text = self.text(NAME, "");
        let urls = self.urls(NAME, &text, tls.is_some())?;
        match urls.iter().find(|url| url.scheme() != "https") {
            Some(url) => Err(bad(NAME, url.as_str(), "want https: DATA-DIR/admin.sock is there for this machine")),
            None if !urls.is_empty() && !tls.is_some_and(TlsFiles::client_cert_auth) => {
                Err(bad(NAME, &text, "administrators are known by certificates of --trusted-ca-file"))
            }
            None => Ok(urls),
        }
    }

    fn issuer(&self) -> Result<Option<IssuerFiles>, FlagError> {
        let file = |name| self.values.get(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        match (file("issuer-cert-file"), file("issuer-key-file")) {
            (Some(cert_file), Some(key_file)) => Ok(Some(IssuerFiles { cert_file, key_file })),
            (None, None) => Ok(None),
            (Some(_), None) | (None, Some(_)) => {
                Err(FlagError("--issuer-cert-file and --issuer-key-file must both be given, or neither".to_string()))
            }
        }
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

    /// A bare number is hours, or revisions.
    fn auto_compaction(&self) -> Result<Option<AutoCompaction>, FlagError> {
        const NAME: &str = "auto-compaction-retention";
        let is_periodic = self.one_of("auto-compaction-mode", &[("periodic", true), ("revision", false)])?;
        let text = self.text(NAME, "0");
        let number = text.parse::<u32>();
        if text.is_empty() || number == Ok(0) {
            return Ok(None);
        }
        match (is_periodic, number) {
            (true, Ok(hours)) => Ok(Some(AutoCompaction::Periodic(Duration::from_secs(3_600) * hours))),
            (true, Err(_)) => match parse_duration(&text) {
                Some(Duration::ZERO) => Ok(None),
                Some(retention) => Ok(Some(AutoCompaction::Periodic(retention))),
                None => Err(bad(NAME, &text, "want hours, or a duration such as 5m or 10h")),
            },
            (false, Ok(revisions)) => Ok(Some(AutoCompaction::Revisions(i64::from(revisions)))),
            (false, Err(_)) => Err(bad(NAME, &text, "want a number of revisions")),
        }
    }

    /// A switch that may be on when nothing is said.
    fn switch(&self, name: &str, default: bool) -> Result<bool, FlagError> {
        if self.values.contains_key(name) { self.is_set(name) } else { Ok(default) }
    }

    fn advertise_peer_urls(&self) -> Result<Vec<String>, FlagError> {
        const NAME: &str = "initial-advertise-peer-urls";
        let text = self.text(NAME, PEER_URL_DEFAULT);
        let urls = text.split(',').map(|url| {
            let url = url.trim().to_string();
            check_member_url(&url).map(|()| url).map_err(|error| bad(NAME, &text, &error.to_string()))
        });
        urls.collect()
    }

    /// `NAME=URL` pairs; a name that stands again has several URLs.
    fn initial_cluster(&self) -> Result<InitialCluster, FlagError> {
        const NAME: &str = "initial-cluster";
        let text = self.text(NAME, "");
        let mut members = InitialCluster::new();
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (name, url) = pair.split_once('=').ok_or_else(|| bad(NAME, &text, "want NAME=URL"))?;
            check_member_url(url).map_err(|error| bad(NAME, &text, &error.to_string()))?;
            match members.iter_mut().find(|(known, _)| known == name) {
                Some((_, urls)) => urls.push(url.to_string()),
                None => members.push((name.to_string(), vec![url.to_string()])),
            }
        }
        Ok(members)
    }

    fn peer_tls(&self) -> Result<Option<PeerTlsFiles>, FlagError> {
        let client_cert_auth = self.is_set("peer-client-cert-auth")?;
        let file = |name| self.values.get(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let trusted_ca_file = file("peer-trusted-ca-file");
        match (file("peer-cert-file"), file("peer-key-file")) {
            (Some(cert_file), Some(key_file)) => {
                if client_cert_auth && trusted_ca_file.is_none() {
                    return Err(FlagError("--peer-client-cert-auth needs --peer-trusted-ca-file".to_string()));
                }
                let client = match (file("peer-client-cert-file"), file("peer-client-key-file")) {
                    (Some(cert_file), Some(key_file)) => Some((cert_file, key_file)),
                    (None, None) => None,
                    (Some(_), None) | (None, Some(_)) => {
                        let both = "--peer-client-cert-file and --peer-client-key-file must both be given, or neither";
                        return Err(FlagError(both.to_string()));
                    }
                };
                Ok(Some(PeerTlsFiles::Files { cert_file, key_file, trusted_ca_file, client }))
            }
            // Certificates made at start are signed by nobody, and cleartext shows none.
            (None, None) if client_cert_auth || trusted_ca_file.is_some() => {
                let name = if client_cert_auth { "client-cert-auth" } else { "trusted-ca-file" };
                Err(FlagError(format!("--peer-{name} needs --peer-cert-file and --peer-key-file")))
            }
            (None, None) => Ok(self.is_set("peer-auto-tls")?.then_some(PeerTlsFiles::Auto)),
            (Some(_), None) | (None, Some(_)) => {
                Err(FlagError("--peer-cert-file and --peer-key-file must both be given, or neither".to_string()))
            }
        }
    }

    fn tls_protocol(&self) -> Result<(TlsProtocol, Vec<String>), FlagError> {
        let suites = self.values.get("cipher-suites").map(|list| list.split(',').map(str::trim).collect::<Vec<_>>());
        let (min, max) = (self.text("tls-min-version", ""), self.text("tls-max-version", ""));
        let (protocol, without_effect) =
            TlsProtocol::new(suites.as_deref(), &min, &max).map_err(|error| FlagError(error.to_string()))?;
        Ok((protocol, without_effect.into_iter().map(str::to_string).collect()))
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
                Ok(Some(TlsFiles::Files { cert_file, key_file, trusted_ca_file }))
            }
            (None, None) if client_cert_auth => {
                Err(FlagError("--client-cert-auth needs --cert-file and --key-file".to_string()))
            }
            // Its clients would be anybody.
            (None, None) if trusted_ca_file.is_some() && self.is_set("auto-tls")? => {
                Err(FlagError("--trusted-ca-file needs --cert-file and --key-file".to_string()))
            }
            (None, None) => Ok(self.is_set("auto-tls")?.then_some(TlsFiles::Auto)),
            (Some(_), None) | (None, Some(_)) => {
                Err(FlagError("--cert-file and --key-file must both be given, or neither".to_string()))
            }
        }
    }
}

/// The name of a flag as it is kept, and what its value is.
fn known(name: &str) -> Option<(&'static str, Kind)> {
    let exactly = |name: &str| {
        let acting = FLAGS.iter().flat_map(|(_, flags)| *flags).map(|(known, kind, _)| (*known, *kind));
        let not_built = NOT_BUILT.iter().map(|(known, kind, _)| (*known, *kind));
        let mut all = acting.chain(WITHOUT_EFFECT.iter().copied()).chain(not_built);
        all.find(|(known, _)| *known == name)
    };
    exactly(name).or_else(|| exactly(name.strip_prefix(TRIED_OUT)?))
}

fn parse_switch(value: &str) -> Option<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
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
        "https" if flag.contains("peer") => {
            return Err(bad(flag, text, "TLS needs --peer-cert-file and --peer-key-file"));
        }
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
        assert_eq!(run(&[], &[("ETCD_NAME", ""), ("ETCD_CIPHER_SUITES", "")]).unwrap().name, "default");
        assert_eq!(run(&["--name=flag"], &[("ETCD_NAME", "env")]).unwrap().name, "flag");
        let alias = ["--experimental-watch-progress-notify-interval", "1s"];
        assert_eq!(run(&alias, &[]).unwrap().progress_period, Duration::from_secs(1));
        let retention = |text| run(&["--auto-compaction-retention", text], &[]).unwrap().auto_compaction;
        assert_eq!(["0", "0s", ""].map(retention), [None; 3]);
        let hours = Some(AutoCompaction::Periodic(Duration::from_secs(7_200)));
        assert_eq!(["2", "2h", "120m"].map(retention), [hours; 3]);
        let flags = ["--auto-compaction-mode=revision", "--auto-compaction-retention=2"];
        assert_eq!(run(&flags, &[]).unwrap().auto_compaction, Some(AutoCompaction::Revisions(2)));
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
                &["--auto-compaction-retention=a"],
                "invalid value \"a\" for flag -auto-compaction-retention: want hours, or a duration such as 5m or 10h",
            ),
            (
                &["--auto-compaction-mode=revision", "--auto-compaction-retention=1h"],
                "invalid value \"1h\" for flag -auto-compaction-retention: want a number of revisions",
            ),
            (&["--auto-tls", "--client-cert-auth"], "--client-cert-auth needs --cert-file and --key-file"),
            (&["--auto-tls", "--trusted-ca-file=c"], "--trusted-ca-file needs --cert-file and --key-file"),
            (&["--config-file=/nonexistent/a.yaml"], "configuration file: read /nonexistent/a.yaml: No such file"),
            (&["--disk-reserve-bytes=-1"], "invalid value \"-1\" for flag -disk-reserve-bytes: want a number"),
            (&["--initial-cluster=nonsense"], "invalid value \"nonsense\" for flag -initial-cluster: want NAME=URL"),
            (&["--initial-cluster=a=ftp://h:1"], "URL scheme must be http, https, unix, or unixs: ftp://h:1"),
            (&["--initial-cluster=a=http://h"], "URL address does not have the form \"host:port\": http://h"),
            (&["--initial-advertise-peer-urls=http://h:1/p"], "URL must not contain a path: http://h:1/p"),
            (&["--listen-peer-urls=unix://a:1"], "members listen on http or https"),
            (
                &[
                    "--initial-cluster=a=http://h:1,b=http://h:2",
                    "--name=a",
                    "--initial-advertise-peer-urls=http://h:1",
                ],
                "--listen-peer-urls is needed where --initial-cluster names several members",
            ),
            (&["--cipher-suites=RC5"], "unexpected TLS cipher suite \"RC5\""),
            (&["--tls-min-version=TLS1.1"], "unexpected TLS version \"TLS1.1\" (must be one of: TLS1.2, TLS1.3)"),
            (&["--peer-cert-allowed-cn=a"], "flag -peer-cert-allowed-cn is not supported yet (value \"a\")"),
            (
                &["--peer-cert-file=c", "--peer-key-file=k", "--peer-client-cert-file=c"],
                "--peer-client-cert-file and --peer-client-key-file must both be given, or neither",
            ),
            (&["--listen-admin-urls=http://h:1"], "DATA-DIR/admin.sock is there for this machine"),
            (
                &["--listen-admin-urls=https://h:1", "--cert-file=c", "--key-file=k"],
                "administrators are known by certificates of --trusted-ca-file",
            ),
            (&["--issuer-key-file=k"], "--issuer-cert-file and --issuer-key-file must both be given, or neither"),
            (&["--initial-cluster-state=old"], "for flag -initial-cluster-state: want new or existing"),
            (&["--peer-key-file=k"], "--peer-cert-file and --peer-key-file must both be given, or neither"),
            (&["--listen-peer-urls=https://127.0.0.1:1"], "TLS needs --peer-cert-file and --peer-key-file"),
            (&["--peer-client-cert-auth"], "--peer-client-cert-auth needs --peer-cert-file and --peer-key-file"),
            (
                &["--peer-auto-tls", "--peer-trusted-ca-file=c"],
                "--peer-trusted-ca-file needs --peer-cert-file and --peer-key-file",
            ),
            (
                &["--peer-cert-file=c", "--peer-key-file=k", "--peer-client-cert-auth"],
                "--peer-client-cert-auth needs --peer-trusted-ca-file",
            ),
            (
                &["--max-request-bytes=15728641"],
                "invalid value \"15728641\" for flag -max-request-bytes: want at most 15728640",
            ),
            (&["--max-txn-ops=x"], "invalid value \"x\" for flag -max-txn-ops: want a number"),
            (&["--client-cert-auth=maybe"], "invalid value \"maybe\" for flag -client-cert-auth: want true or false"),
            (&["--cert-file=c"], "--cert-file and --key-file must both be given, or neither"),
            (&["--watch-progress-notify-interval=1ms"], "want at least 100ms"),
            (&["--listen-client-urls=https://127.0.0.1:1"], "TLS needs --cert-file and --key-file"),
            (&["--listen-client-urls=http://127.0.0.1"], "want host:port"),
            (&["--log-level=loud"], "want debug, info, warn, error, panic or fatal"),
            (&["--log-format=xml"], "invalid value \"xml\" for flag -log-format: want json or console"),
            (&["--log-outputs=systemd/journal"], "want default, stderr, stdout or a file"),
            (&["--cors=nonsense"], "invalid value \"nonsense\" for flag -cors"),
            (&["--pre-vote=maybe"], "invalid value \"maybe\" for flag -pre-vote: want true or false"),
            (&["--snapshot-count=x"], "invalid value \"x\" for flag -snapshot-count: want a number"),
            (&["--warning-apply-duration=5"], "want a duration such as 5s or 10m"),
        ] {
            let error = run(arguments, &[]).unwrap_err();
            assert!(error.contains(text) && !error.contains('\n'), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn etcds_other_flags_are_taken_where_nothing_depends_on_them() {
        let arguments = [
            "--initial-cluster=default=http://h:1",
            "-v2-deprecation=x",
            "--auto-tls=false",
            "--cors=*",
            "--bcrypt-cost",
            "4",
        ];
        assert_eq!(run(&arguments, &[]).unwrap().without_effect, ["v2-deprecation", "bcrypt-cost"]);
        let limits = run(&["--max-concurrent-streams=7", "--grpc-keepalive-min-time=1s"], &[]).unwrap().connections;
        assert_eq!((limits.streams_max, limits.ping_interval_min), (Some(7), Duration::from_secs(1)));
        let access = run(&["--cors=http://a.example:80", "--host-whitelist=a, b"], &[]).unwrap().access;
        assert_eq!(access.origins.unwrap(), ["http://a.example:80"]);
        assert_eq!(access.hosts.unwrap(), ["a", "b"]);
        assert_eq!(run(&["--metrics=extensive"], &[]).unwrap().without_effect, ["metrics"]);
    }

    #[test]
    fn members_of_a_cluster_are_etcds() {
        let arguments = [
            "--initial-cluster=a=http://h:1,b=http://h:2,a=http://g:1",
            "--initial-cluster-state=existing",
            "--pre-vote=false",
            "--peer-auto-tls",
            "--listen-peer-urls=https://h:1",
        ];
        let flags = run(&arguments, &[]).unwrap();
        let url = |text: &str| text.to_string();
        let expected =
            vec![(url("a"), vec![url("http://h:1"), url("http://g:1")]), (url("b"), vec![url("http://h:2")])];
        assert_eq!((flags.initial_cluster, flags.cluster_state), (expected, ClusterState::Existing));
        assert!(!flags.pre_vote && flags.strict_reconfig_check && matches!(flags.peer_tls, Some(PeerTlsFiles::Auto)));
    }

    #[test]
    fn a_configuration_file_stands_for_all_flags() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("etcd.yaml");
        std::fs::write(
            &path,
            "name: m1\nwatch-progress-notify-interval: 5000000000\ngrpc-keepalive-min-time: 1s\nproxy: off\n\
             force-new-cluster: true\ntenant-listen: [a=http://127.0.0.1:1, b=http://127.0.0.1:2]\n\
             client-transport-security: {auto-tls: true}\nlisten-client-urls: https://127.0.0.1:1\n",
        )
        .unwrap();
        let file = format!("--config-file={}", path.display());
        let flags = run(&[&file, "--name=m2"], &[("ETCD_DATA_DIR", "elsewhere")]).unwrap();
        assert_eq!((flags.name.as_str(), flags.data_dir.to_str()), ("m1", Some("m1.tenure")));
        assert_eq!(flags.progress_period, Duration::from_secs(5));
        assert_eq!(flags.connections.ping_interval_min, Duration::from_secs(1));
        assert_eq!((flags.tenant_listen.len(), flags.force_new_cluster), (2, true));
        assert!(matches!(flags.tls, Some(TlsFiles::Auto)));
        assert_eq!((flags.unknown_variables, flags.without_effect), (vec!["proxy".into()], vec!["data-dir", "name"]));
        let path = path.display().to_string();
        assert_eq!(run(&[], &[("ETCD_CONFIG_FILE", &path)]).unwrap().name, "m1");
        std::fs::write(&path, "name: m1\nmax-txn-ops: many\n").unwrap();
        assert!(run(&[&file], &[]).unwrap_err().contains("invalid value \"many\" for flag -max-txn-ops"));
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
