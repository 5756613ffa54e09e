//! What is given to operators names metrics and flags that exist.
//!
//! Why: an alert on a metric that was renamed never fires, and nobody misses it. So every name in an expression of the alert rules and
//! of the dashboard is looked for in what a running server says. A flag that was renamed is missed at once, by a cell that does not
//! start: so what starts members is read as tenured reads it.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use saphyr::{LoadableYamlNode as _, Yaml};
use serde_json::Value;
use tenure_etcd_shim::flags::{Flags, Parsed, parse};
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_provisioner::cell_init::{self, Member, Start};
use tenure_tests::client::Connection;
use tenure_tests::cluster::Cluster;
use tenure_tests::server::Server;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Words of Prometheus' query language that stand where a metric could.
const WORDS: [&str; 16] = [
    "and",
    "or",
    "unless",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "bool",
    "offset",
    "inf",
    "nan",
    "le",
    "start",
    "end",
];

/// Metrics of an expression: words that are no function, no label and no keyword.
fn metrics_of(expression: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let (mut in_labels, mut in_list, mut rest) = (false, false, expression);
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
        if first == '"' {
            let end = rest[1..].find('"').map_or(rest.len(), |at| at + 2);
            rest = &rest[end..];
        } else if first.is_ascii_digit() {
            // A number, or a duration.
            rest = rest.trim_start_matches(|c: char| is_word(c) || c == '.');
        } else if is_word(first) {
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            let word = &rest[..end];
            rest = &rest[end..];
            // An aggregation may have its labels in front of what it aggregates.
            let next = rest.trim_start();
            let is_function = ["(", "by ", "by(", "without ", "without("].iter().any(|what| next.starts_with(what));
            if ["by", "without", "on", "ignoring", "group_left", "group_right"].contains(&word) {
                in_list = next.starts_with('(');
            } else if !in_labels && !in_list && !is_function && !WORDS.contains(&word) {
                found.insert(word.to_string());
            }
        } else {
            match first {
                '{' | '[' => in_labels = true,
                '}' | ']' => in_labels = false,
                ')' => in_list = false,
                _ => {}
            }
            rest = &rest[first.len_utf8()..];
        }
    }
    found
}

fn deploy(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)).unwrap()
}

fn alert_expressions() -> Vec<String> {
    let text = deploy("prometheus/alerts.yaml");
    let documents = Yaml::load_from_str(&text).unwrap();
    let groups = documents[0]["groups"].as_vec().unwrap();
    let rules = groups.iter().flat_map(|group| group["rules"].as_vec().unwrap());
    rules
        .map(|rule| {
            let name = rule["alert"].as_str().unwrap();
            for annotation in ["summary", "description"] {
                assert!(rule["annotations"][annotation].as_str().is_some_and(|text| !text.is_empty()), "{name}");
            }
            rule["expr"].as_str().unwrap().to_string()
        })
        .collect()
}

fn dashboard_expressions() -> Vec<String> {
    fn collect(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get("expr").and_then(Value::as_str).map(str::to_string));
                // label_values(METRIC, LABEL)
                let query =
                    map.get("definition").and_then(Value::as_str).and_then(|text| text.strip_prefix("label_values("));
                found.extend(query.and_then(|text| text.split(',').next()).map(str::to_string));
                map.values().for_each(|value| collect(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| collect(value, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let mut found = Vec::new();
    collect(&serde_json::from_str(&deploy("grafana/tenure.json")).unwrap(), &mut found);
    found
}

/// Every name that a scrape has a value for.
async fn scraped(address: std::net::SocketAddr) -> BTreeSet<String> {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let lines = body.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split(['{', ' ']).next()).map(str::to_string).collect()
}

#[test]
fn names_are_found_in_expressions() {
    let expression = r#"histogram_quantile(0.99, sum by (le, To) (rate(a_bucket{job=~"x",To!="b_total"}[5m]))) > 1e9 and c:d on (x) / (e > 0.5)"#;
    assert_eq!(metrics_of(expression).into_iter().collect::<Vec<_>>(), ["a_bucket", "c:d", "e"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_that_operators_are_given_exists() {
    let dir = tempfile::tempdir().unwrap();
    // Of several members, so that there are figures of peers, and of certificates.
    let certificates = dir.path().join("cell");
    cell_init::init(&certificates, None, &[Member::parse("m=127.0.0.1").unwrap()], Start::New).unwrap();
    let file = |flag: &str, name: &str| format!("--peer-{flag}-file={}", certificates.join(name).display());
    let flags = [file("cert", "m/peer.crt"), file("key", "m/peer.key"), file("trusted-ca", "ca.crt")];
    let mut cluster = Cluster::new("https", 3, dir.path(), &flags.each_ref().map(String::as_str));
    cluster.start_all();
    let address = cluster.members[0].client;
    let connection = Connection::open(address).await;
    let (_, status) = connection.bytes_of("/etcdserverpb.Maintenance/Status", &[]).await;
    assert_eq!(status.code(), tonic::Code::Ok);
    let known = scraped(address).await;
    let expressions: Vec<String> = alert_expressions().into_iter().chain(dashboard_expressions()).collect();
    assert!(expressions.len() > 30, "{expressions:?}");
    let is_known = |name: &String| name == "up" || known.contains(name);
    for expression in &expressions {
        let missing: Vec<String> = metrics_of(expression).into_iter().filter(|name| !is_known(name)).collect();
        assert!(missing.is_empty(), "{missing:?} of {expression:?} is no metric");
    }
    assert!(!is_known(&"tenure_tenant_stored_byte".to_string()), "what is misspelt is not known");
}

// Beside a real etcd's, or with several members that say the same, a rule must not fire for what it is not about, nor three times.
#[test]
fn alerts_are_about_tenure_and_fire_once() {
    const OURS: &str = r#"{job=~".*tenure.*""#;
    for expression in alert_expressions() {
        for name in metrics_of(&expression) {
            for (at, _) in expression.match_indices(&name) {
                assert!(expression[at + name.len()..].starts_with(OURS), "{name} in {expression}");
            }
            if name.starts_with("tenure_tenant_") || name.starts_with("tenure_other_") {
                let times = expression.matches("without (instance, pod").count();
                assert_eq!(times, expression.matches(OURS).count(), "{expression}");
            }
        }
    }
}

/// Flags that are all known and all do something.
fn parsed(arguments: Vec<String>, environment: Vec<(String, String)>) -> Flags {
    let Ok(Parsed::Run(flags)) = parse(arguments.clone(), environment.clone()).inspect_err(|error| panic!("{error}"))
    else {
        panic!("{arguments:?} {environment:?} start nothing");
    };
    assert_eq!((&flags.unknown_variables, &flags.without_effect), (&Vec::new(), &Vec::new()));
    *flags
}

/// A member of three that serves clients, members, metrics and administrators over TLS, and signs.
fn assert_serves_all(flags: &Flags) {
    let ports =
        [&flags.listen_client_urls, &flags.listen_peer_urls, &flags.listen_metrics_urls, &flags.listen_admin_urls]
            .map(|urls| urls.iter().map(|url| url.port().unwrap()).collect::<Vec<_>>());
    assert_eq!(ports, [[2379], [2380], [2381], [2382]]);
    assert!(flags.tls.as_ref().is_some_and(|tls| tls.client_cert_auth()) && flags.peer_tls.is_some());
    assert!(flags.issuer.is_some());
    assert_eq!(flags.initial_cluster.len(), 3);
}

#[test]
fn the_pods_of_kubernetes_are_given_flags_that_exist() {
    let text = deploy("kubernetes/base/statefulset.yaml");
    let documents = Yaml::load_from_str(&text).unwrap();
    let container = &documents[0]["spec"]["template"]["spec"]["containers"][0];
    let strings = |list: &Yaml<'_>, of: &dyn Fn(&Yaml<'_>) -> String| list.as_vec().unwrap().iter().map(of).collect();
    let args: Vec<String> = strings(&container["args"], &|arg| {
        arg.as_str().unwrap().replace("$(POD_NAME)", "tenure-1").replace("$(POD_NAMESPACE)", "cells")
    });
    assert!(args.iter().all(|arg| !arg.contains("$(")), "{args:?}");
    let flags = parsed(args.clone(), Vec::new());
    assert_serves_all(&flags);
    let ports: Vec<String> =
        strings(&container["ports"], &|port| port["containerPort"].as_integer().unwrap().to_string());
    assert_eq!(ports, ["2379", "2380", "2381", "2382"]);
    // Nothing else may be written or is there to be read.
    let mounts: Vec<String> = strings(&container["volumeMounts"], &|mount| mount["mountPath"].as_str().unwrap().into());
    let is_mounted = |path: &Path| mounts.iter().any(|mount| path.starts_with(mount));
    assert!(is_mounted(&flags.data_dir));
    // The CA that signs is one of those that are trusted, and not all of them while another takes its place.
    let trusts = |flag: &str| args.iter().find_map(|arg| arg.strip_prefix(flag)).unwrap().to_string();
    assert_eq!(trusts("--trusted-ca-file="), trusts("--peer-trusted-ca-file="));
    assert_ne!(trusts("--trusted-ca-file="), trusts("--issuer-cert-file="));
    let files = args.iter().filter_map(|arg| arg.split_once("-file=")).map(|(_, path)| PathBuf::from(path));
    files.for_each(|path| assert!(is_mounted(&path), "{path:?} is on no volume"));
}

#[test]
fn the_unit_of_systemd_is_given_flags_that_exist() {
    let (unit, environment) = (deploy("systemd/tenured.service"), deploy("systemd/tenured.env"));
    let setting = |name: &str| {
        unit.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_else(|| panic!("{name}"))
    };
    let mut words = setting("ExecStart").split_whitespace();
    assert_eq!(words.next(), Some("/usr/local/bin/tenured"));
    let variables = environment.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let pair = |line: &str| line.split_once('=').map(|(name, value)| (name.to_string(), value.to_string())).unwrap();
    let flags = parsed(words.map(str::to_string).collect(), variables.map(pair).collect());
    assert_serves_all(&flags);
    // The rest of the machine is read-only to it.
    assert!(flags.data_dir.starts_with(Path::new("/var/lib").join(setting("StateDirectory"))), "{:?}", flags.data_dir);
}

// A member that was removed while it was down would be started for ever otherwise, every two seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_removed_member_is_not_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(3, dir.path(), &["--strict-reconfig-check=false"]);
    let third = &mut cluster.members[2];
    let own: pb::StatusResponse = {
        let connection = Connection::open(third.client).await;
        connection.unary("/etcdserverpb.Maintenance/Status", &pb::StatusRequest {}).await.unwrap()
    };
    assert!(third.stop());
    let removal = pb::MemberRemoveRequest { id: own.header.unwrap().member_id };
    let connection = Connection::open(cluster.members[0].client).await;
    let removed = async {
        // The third may have led.
        loop {
            match connection.unary::<_, pb::MemberRemoveResponse>("/etcdserverpb.Cluster/MemberRemove", &removal).await
            {
                Ok(_) => return,
                Err(status) => assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}"),
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(300), removed).await.unwrap();
    let third = &cluster.members[2];
    let test = std::env::current_exe().unwrap();
    let ended = std::process::Command::new(test.ancestors().nth(2).unwrap().join("tenured"))
        .arg("--data-dir")
        .arg(&third.data_dir)
        .arg(format!("--listen-peer-urls={}", third.peer_url))
        .arg("--listen-client-urls=http://127.0.0.1:0")
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&ended.stderr).contains("permanently removed"), "{ended:?}");
    let code = ended.status.code().unwrap().to_string();
    let unit = deploy("systemd/tenured.service");
    assert!(unit.lines().any(|line| line == format!("RestartPreventExitStatus={code}")), "{code}");
    assert_ne!(code, "1", "which is every other failure's");
}

// A unit of `Type=notify`, as etcd's is with many distributions, is killed after a while by systemd if nothing tells that it serves.
#[test]
fn a_service_manager_hears_that_the_member_serves() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let _server = Server::start_managed(&path, &dir.path().join("data"), &[]);
    let mut told = [0; 64];
    let length = socket.recv(&mut told).unwrap();
    assert_eq!(&told[..length], b"READY=1");
}
