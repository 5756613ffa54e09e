//! `tenurectl` as an operator uses it, on real servers: one on this machine found without a flag, and a fleet of two cells.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use saphyr::LoadableYamlNode as _;
use serde_json::Value;
use tenure_tests::server::Server;

struct Operator {
    dir: tempfile::TempDir,
}

impl Operator {
    fn new() -> Self {
        Operator { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, line: &str) -> Output {
        let test = std::env::current_exe().unwrap();
        // Where cargo puts the programs of the workspace.
        let program = test.ancestors().nth(2).unwrap().join("tenurectl");
        let mut command = Command::new(program);
        command.args(line.split(' ')).current_dir(self.dir.path()).env("TENURECTL_CONFIG", self.path("cells.json"));
        command.output().unwrap()
    }

    fn said(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn data(&self, line: &str) -> Value {
        let said = self.said(&format!("{line} -o json"));
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{line}: {error}: {said}"))
    }

    /// Starts a cell with certificates of its own and a CA that signs tenants'; answers where its admin API listens.
    fn cell(&self) -> (Server, String) {
        self.said("cell init --out cell --member m1=127.0.0.1");
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.path("cell").join(name).display());
        let flags = [
            file("cert-file", "m1/server.crt"),
            file("key-file", "m1/server.key"),
            file("trusted-ca-file", "ca.crt"),
            file("issuer-cert-file", "ca.crt"),
            file("issuer-key-file", "ca.key"),
            "--listen-admin-urls=https://127.0.0.1:0".to_string(),
        ];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let server = Server::start_with_flags(&flags, &self.path("default.tenure"), &[]);
        let endpoint = format!("https://{}", server.admin_address());
        (server, endpoint)
    }

    fn refused(&self, line: &str) -> String {
        let output = self.run(line);
        assert_eq!(output.status.code(), Some(1), "{line}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

fn serve(dir: &Path) -> Server {
    Server::start(dir, &[])
}

#[test]
fn a_tenant_is_operated_from_the_command_line() {
    let operator = Operator::new();
    let _server = serve(&operator.path("default.tenure"));
    let made = operator.said("tenant create acme --leases 500 --stored-bytes 8GiB --label team=blue");
    assert!(made.starts_with("CELL") && made.contains("acme") && made.contains("8.0 GiB"), "{made}");
    let again = operator.run("tenant create acme");
    assert!(String::from_utf8_lossy(&again.stderr).contains("was there already, and is as it was"), "{again:?}");

    let limits = operator.said("tenant limits acme --leases default --watchers none -o json");
    let squeezed: String = limits.split_whitespace().collect();
    assert!(squeezed.contains(r#""limits":{"stored_bytes":8589934592,"watchers":0}"#), "{limits}");
    let table = operator.said("tenant limits acme");
    assert!(table.lines().any(|line| line.split_whitespace().eq(["watchers", "none", "tenant"])), "{table}");
    let labels = operator.said("tenant labels acme env=prod team- -o yaml");
    assert!(labels.contains("\"env\": \"prod\"") && !labels.contains("team"), "{labels}");
    assert!(operator.said("tenant list --label env=prod").contains("acme"));
    assert!(!operator.said("tenant list --label env=test").contains("acme"));

    for (word, state) in [("read-only", "read-only"), ("suspend", "suspended"), ("resume", "active")] {
        let changed = operator.said(&format!("tenant {word} acme"));
        assert!(changed.lines().nth(1).unwrap().split_whitespace().any(|cell| cell == state), "{changed}");
    }
    assert!(operator.said("tenant usage default").starts_with("CELL"));
    let top = operator.said("top --once --interval 0.1 --sort stored");
    assert!(top.starts_with("CELL") && top.contains("acme") && top.contains("default"), "{top}");
    let resources = operator.said("top --once --interval 0.1 --resources --sort stored");
    assert!(resources.lines().next().unwrap().ends_with("MOST KEYS"), "{resources}");
    assert!(operator.said("cell status").contains("leader"));

    let issue = operator.refused("tenant credentials acme --out acme");
    assert!(issue.contains("--issuer-cert-file"), "what to do next: {issue}");
    assert!(operator.refused("tenant get globex").contains("no cell has a tenant \"globex\""));
    assert!(operator.refused("tenant delete acme").contains("say --yes"));
    let gone = operator.data("tenant delete acme --yes");
    assert_eq!((&gone["cell"], &gone["state"]), (&"local".into(), &"deleting".into()), "{gone}");
    assert!(!operator.said("tenant list").contains("acme"));
    // Whoever had no answer may say it again.
    let again = operator.run("tenant delete acme --yes");
    assert!(
        again.status.success() && String::from_utf8_lossy(&again.stderr).contains("nothing to delete"),
        "{again:?}"
    );
    assert_eq!(operator.data("tenant delete acme --yes")["state"], "gone");
    // Until its space is given back it can be seen.
    loop {
        let list = operator.data("tenant list --deleting");
        let Some(acme) = list.as_array().unwrap().iter().find(|row| row["name"] == "acme") else { break };
        assert_eq!((&acme["id"], &acme["state"]), (&gone["id"], &"deleting".into()), "{list}");
    }
}

#[test]
fn a_new_tenant_goes_where_there_is_room() {
    let operator = Operator::new();
    let _east = serve(&operator.path("east"));
    let west = serve(&operator.path("west"));
    for cell in ["east", "west"] {
        let socket = operator.path(cell).join("admin.sock");
        operator.said(&format!("cell add {cell} --endpoint unix:{}", socket.display()));
    }
    assert!(
        operator.refused("cell add east --endpoint unix:nowhere").contains("no member of cell \"east\" is reached")
    );
    let list = operator.said("cell list");
    assert!(list.contains("east") && list.contains("west"), "{list}");
    // Each new one makes its cell the fuller one.
    let homes: Vec<String> = (0..4)
        .map(|number| {
            let made = operator.said(&format!("tenant create t{number}"));
            made.lines().nth(1).unwrap().split_whitespace().next().unwrap().to_string()
        })
        .collect();
    assert_eq!(homes.iter().filter(|home| *home == "east").count(), 2, "{homes:?}");
    let (home, other) = if homes[0] == "east" { ("east", "west") } else { ("west", "east") };
    let elsewhere = operator.refused(&format!("tenant create t0 --cell {other}"));
    assert!(elsewhere.contains(&format!("tenant \"t0\" is in cell \"{home}\" already")), "{elsewhere}");
    assert_eq!(operator.said("tenant list").lines().count(), 1 + 2 + 4, "those of both, and both defaults");
    // Both have it: neither is meant.
    let both = operator.refused("tenant revoke default --serial 4a0b");
    assert!(both.contains("say which with --cell"), "{both}");
    let socket = operator.path("east").join("admin.sock");
    operator.said(&format!("cell add east --endpoint unix:{}", socket.display()));
    assert!(
        operator.refused(&format!("cell add west --endpoint unix:{}", socket.display())).contains("is there already")
    );

    // A cell that is away may have a tenant of that name; whoever says the cell goes on without it, with a warning.
    west.kill();
    let unknown = operator.refused("tenant create t9");
    assert!(unknown.contains("is in cell \"west\" is not known") && unknown.contains("--cell NAME"), "{unknown}");
    // Nor is anything done to a tenant, or told of one, that may be another cell's.
    let (mine, lost): (Vec<_>, Vec<_>) = (0..4).partition(|number| homes[*number] == "east");
    for line in [
        format!("tenant get t{}", mine[0]),
        format!("tenant suspend t{}", lost[0]),
        format!("tenant delete t{} --yes", lost[0]),
        "tenant revoke default --serial 4a0b".to_string(),
        "tenant limits t9".to_string(),
    ] {
        let refused = operator.refused(&line);
        assert!(refused.contains("is not known") && refused.lines().count() == 1, "{line}: {refused}");
    }
    assert!(operator.said(&format!("tenant get t{} --cell east", mine[0])).contains("east"));
    assert!(operator.refused("cell status").contains("which one? --cell NAME"));
    // What is printed of those that answer is not all.
    for line in ["tenant list", "cell list", "top --once --interval 0.05"] {
        let part = operator.run(line);
        assert_eq!(part.status.code(), Some(1), "{line}: {part:?}");
        assert!(String::from_utf8_lossy(&part.stdout).contains("east"), "{line}: {part:?}");
        assert!(String::from_utf8_lossy(&part.stderr).contains("is not all"), "{line}: {part:?}");
    }
    let made = operator.run("tenant create t9 --cell east");
    assert!(made.status.success() && String::from_utf8_lossy(&made.stderr).contains("warning: "), "{made:?}");
    assert!(String::from_utf8_lossy(&made.stdout).contains("east"));
    operator.said("cell remove west");
    operator.said("tenant revoke default --serial 4a0b");
    assert!(!operator.said("cell list").contains("west"));
}

/// Every command, in an order in which each can be given.
const COMMANDS: &[&str] = &[
    "cell list",
    "cell status",
    "cell limits --leases 700",
    "cell admin-credentials --out admin --force",
    "tenant create acme --label a=b",
    "tenant get acme",
    "tenant list",
    "tenant list --deleting",
    "tenant limits acme --watchers 5",
    "tenant labels acme c=d",
    "tenant suspend acme",
    "tenant read-only acme",
    "tenant resume acme",
    "tenant usage acme",
    "tenant credentials acme --out acme --force",
    "tenant credentials acme --format kubernetes",
    "tenant rotate acme --out acme",
    "tenant rotate acme --out acme --revoke-old",
    "tenant rotate acme --out acme --format kubernetes",
    "tenant revoke acme --serial 4a0b",
    "tenant revoke acme --all",
    "tenant revoke acme --all --before 2026-01-31T12:00:00Z",
    "tenant trusted-ca acme --file cell/ca.crt",
    "tenant trusted-ca acme --of-cell",
    "top --once --interval 0.05",
    "tenant delete acme --yes",
];

/// Those that print no data: what they make is files, or what a shell reads.
const WITHOUT_DATA: &[&str] = &["cell init", "cell add", "cell remove", "completion"];

/// The commands that `--help` names below this one.
fn below(operator: &Operator, command: &str) -> Vec<String> {
    let help = operator.said(format!("{command} --help").trim_start());
    let list = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(|name| format!("{command} {name}").trim_start().to_string()).collect()
}

/// The cells that are named in data: of the whole, or of each of its rows.
fn cells_in(data: &Value) -> BTreeSet<&str> {
    let rows = data.as_array().map_or(std::slice::from_ref(data), Vec::as_slice);
    rows.iter().map(|row| row.get("cell").or(row.get("name")).unwrap().as_str().unwrap()).collect()
}

#[test]
fn every_command_prints_for_people_and_for_programs() {
    let operator = Operator::new();
    let mut wanted: BTreeSet<String> = ["cell", "tenant"].iter().flat_map(|of| below(&operator, of)).collect();
    wanted.extend(below(&operator, "").into_iter().filter(|of| of != "cell" && of != "tenant"));
    let given = COMMANDS.iter().chain(WITHOUT_DATA).map(|line| {
        let words = if line.starts_with("cell") || line.starts_with("tenant") { 2 } else { 1 };
        line.split(' ').take(words).collect::<Vec<_>>().join(" ")
    });
    assert_eq!(given.collect::<BTreeSet<_>>(), wanted);

    let (_server, _) = operator.cell();
    operator.said("cell add east --endpoint unix:default.tenure/admin.sock");
    operator.said("tenant create globex");
    let mut tables = Vec::new();
    for format in ["json", "yaml", "table"] {
        for line in COMMANDS {
            let said = operator.said(&format!("{line} -o {format}"));
            let is_kubernetes = line.contains("kubernetes");
            match format {
                "json" => {
                    let data: Value =
                        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{line}: {error}: {said}"));
                    assert_eq!(cells_in(&data), BTreeSet::from(["east"]), "{line}: {said}");
                }
                "yaml" => {
                    let read =
                        saphyr::Yaml::load_from_str(&said).unwrap_or_else(|error| panic!("{line}: {error}: {said}"));
                    // Whoever rotates has the flags that the patch adds.
                    let documents = if is_kubernetes && !line.contains("rotate") { 2 } else { 1 };
                    assert_eq!(read.len(), documents, "{line}: {said}");
                    assert!(said.contains("east"), "{line}: {said}");
                }
                _ => tables.push((*line, said)),
            }
        }
    }
    for (line, table) in tables {
        let columns = table.lines().next().unwrap_or_default();
        match line.split(' ').nth(1).unwrap() {
            // What they made is said on the error output, so that nothing but a manifest is on this one.
            "rotate" => assert_eq!(table.is_empty(), !line.contains("kubernetes"), "{line}: {table}"),
            "admin-credentials" => assert_eq!(table, "", "{line}"),
            "credentials" => assert_eq!(table.is_empty(), line.contains("--out"), "{line}: {table}"),
            "status" => assert!(columns.starts_with("MEMBER"), "{line}: {table}"),
            "limits" => assert!(columns.starts_with("LIMIT"), "{line}: {table}"),
            "list" if line.starts_with("cell") => assert!(columns.starts_with("NAME"), "{line}: {table}"),
            _ => {
                assert!(columns.starts_with("CELL"), "{line}: {table}");
                assert!(table.lines().skip(1).all(|row| row.starts_with("east ")), "{line}: {table}");
            }
        }
    }
}

// The steps of docs/operations.md, "Certificates": at no moment is anybody shut out who has done as they say.
#[test]
fn one_ca_takes_the_place_of_another_while_the_cell_runs() {
    let operator = Operator::new();
    let (_server, endpoint) = operator.cell();
    operator.said("tenant create acme");
    let from = |by: &str, ca: &str| format!("--endpoint {endpoint} --cacert {ca} --cert {by}.crt --key {by}.key");
    let read = |name: &str| std::fs::read_to_string(operator.path(name)).unwrap();
    let write = |name: &str, text: &str| {
        // As files are replaced: whole, under their name.
        std::fs::write(operator.path("new"), text).unwrap();
        std::fs::rename(operator.path("new"), operator.path(name)).unwrap();
    };
    let list = |line: &str| operator.said(&format!("tenant list {line}"));
    operator.said("cell admin-credentials --out old");
    list(&from("old/admin", "old/ca.crt"));
    let (old, first) = (read("cell/ca.crt"), read("cell/admin.crt"));

    // 1. Another CA, and what it signs. 2. Everybody trusts both; the old one signs.
    operator.said("cell init --out next --member m1=127.0.0.1");
    let new = read("next/ca.crt");
    write("cell/ca.crt", &(old.clone() + &new));
    operator.said("tenant credentials acme --out acme");
    assert_eq!(read("acme/ca.crt"), old.clone() + &new, "clients are told of both");
    operator.said("cell admin-credentials --out both");
    list(&from("both/admin", "both/ca.crt"));

    // 3. Members show the new one's certificates, and sign with it.
    for file in ["m1/server.key", "m1/server.crt", "m1/peer.key", "m1/peer.crt"] {
        write(&format!("cell/{file}"), &read(&format!("next/{file}")));
    }
    write("cell/ca.key", &read("next/ca.key"));
    write("cell/ca.crt", &(new.clone() + &old));
    list(&from("both/admin", "both/ca.crt"));
    list(&from("next/admin", "next/ca.crt"));

    // 4. So do clients. 5. The old one is forgotten.
    operator.said("tenant rotate acme --out acme --revoke-old");
    assert_eq!(read("acme/ca.crt"), new.clone() + &old);
    operator.said("cell admin-credentials --out both --force");
    write("cell/ca.crt", &new);
    list(&from("both/admin", "both/ca.crt"));
    assert_eq!(read("cell/admin.crt"), first);
    let refused = operator.refused(&format!("tenant list {}", from("cell/admin", "next/ca.crt")));
    assert!(refused.contains("administrator's"), "{refused}");
}

#[test]
fn an_operator_decides_who_gets_in() {
    let operator = Operator::new();
    let (_server, endpoint) = operator.cell();
    operator.said("tenant create acme");
    let issued = operator.data("tenant credentials acme --out acme");
    let serial = issued["serial"].as_str().unwrap();
    assert!(issued["cell"] == "local" && operator.path("acme/client.key").exists(), "{issued}");

    operator.said(&format!("tenant revoke acme --serial {serial}"));
    let acme = operator.data("tenant get acme");
    assert_eq!(acme["revoked_serials"], serde_json::json!([serial]));
    assert_eq!(acme["credentials_valid_from"], "");
    let old = operator.data("tenant rotate acme --out acme --revoke-old");
    assert_ne!(old["serial"], issued["serial"]);
    // Pods have the old one until somebody applies the new one.
    let early = operator.refused("tenant rotate acme --out acme --format kubernetes --revoke-old");
    assert!(
        early.contains(&format!("tenurectl tenant revoke acme --serial {}", old["serial"].as_str().unwrap())),
        "{early}"
    );
    let revoked = operator.data("tenant revoke acme --all");
    let valid_from = revoked["credentials_valid_from"].as_str().unwrap().to_string();
    assert!(valid_from.ends_with('Z'), "{revoked}");
    // Repeated for an earlier moment it takes nothing back, and spares whoever came since.
    let again = operator.data("tenant revoke acme --all --before 2026-01-31T12:00:00Z");
    assert_eq!(again["credentials_valid_from"], valid_from);
    assert!(operator.refused("tenant revoke acme --all --before yesterday").contains("want a moment such as"));

    let trusted = operator.data("tenant trusted-ca acme --file cell/ca.crt");
    assert!(trusted["trusted_ca_pem"].as_str().unwrap().starts_with("-----BEGIN CERTIFICATE-----\n"), "{trusted}");
    let refused = operator.refused("tenant credentials acme --out acme --force");
    assert!(refused.contains("trusts a CA of its own: let that sign"), "{refused}");
    assert_eq!(operator.data("tenant trusted-ca acme --of-cell")["trusted_ca_pem"], "");
    std::fs::write(operator.path("none"), "\n").unwrap();
    assert!(operator.refused("tenant trusted-ca acme --file none").contains("say --of-cell"));

    let limits = operator.data("cell limits --leases 700 --requests-per-second 5K");
    assert_eq!((&limits["default_limits"]["leases"], &limits["cell"]), (&700.into(), &"local".into()), "{limits}");
    let acme = operator.data("tenant get acme");
    assert_eq!(
        (&acme["effective_limits"]["requests_per_second"], &acme["limits"]),
        (&5_000.into(), &serde_json::json!({}))
    );
    let limits = operator.data("cell limits --leases default");
    assert_eq!(limits["default_limits"]["requests_per_second"], 5_000);
    assert_ne!(limits["default_limits"]["leases"], 700);

    // From elsewhere, as an administrator; nobody else is one.
    let from = |by: &str, ca: &str| format!("--endpoint {endpoint} --cacert {ca} --cert {by}.crt --key {by}.key");
    assert!(operator.said(&format!("tenant get acme {}", from("cell/admin", "cell/ca.crt"))).contains("acme"));
    operator.said("tenant credentials acme --out acme --force");
    let tenant = operator.refused(&format!("tenant list {}", from("acme/client", "cell/ca.crt")));
    assert!(tenant.contains("administrator's certificate"), "{tenant}");
    operator.said("cell init --out other --member m1=127.0.0.1");
    let other = operator.refused(&format!("tenant list {}", from("cell/admin", "other/ca.crt")));
    assert!(other.contains("--cacert must be the CA that signed the member's certificate"), "{other}");
    let stranger = operator.refused(&format!("tenant list {}", from("other/admin", "cell/ca.crt")));
    assert!(stranger.contains("administrator's"), "{stranger}");
    let nobody = operator.refused("tenant list --endpoint unix:nowhere");
    assert!(nobody.contains("admin.sock in the --data-dir of a tenured that runs"), "{nobody}");
    for said in [tenant, other, stranger, nobody] {
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }

    // One whose key is lost is refused like a tenant's; `default` is the operator's.
    let admin = CertificateDer::from_pem_file(operator.path("cell/admin.crt")).unwrap();
    let (_, admin) = x509_parser::parse_x509_certificate(&admin).unwrap();
    let serial: String =
        admin.raw_serial().iter().skip_while(|byte| **byte == 0).map(|byte| format!("{byte:02x}")).collect();
    operator.said(&format!("tenant revoke default --serial {serial}"));
    let revoked = operator.refused(&format!("tenant list {}", from("cell/admin", "cell/ca.crt")));
    assert!(revoked.contains("whom it refused"), "{revoked}");
    operator.said("tenant list");

    // On the machine of a member another one is made in its place, beside the CA that is there.
    let ca = std::fs::read(operator.path("cell/ca.crt")).unwrap();
    assert!(operator.refused("cell admin-credentials --out cell").contains("admin.crt is there already: --force"));
    let made = operator.data("cell admin-credentials --out cell --user alice --force");
    assert_eq!(made["cell"], "local");
    assert_ne!(made["serial"].as_str().unwrap(), serial);
    assert_eq!(std::fs::read(operator.path("cell/ca.crt")).unwrap(), ca);
    assert!(operator.said(&format!("tenant list {}", from("cell/admin", "cell/ca.crt"))).contains("acme"));
    operator.said("cell admin-credentials --out alice --days 30");
    operator.said(&format!("tenant list {}", from("alice/admin", "alice/ca.crt")));
}
