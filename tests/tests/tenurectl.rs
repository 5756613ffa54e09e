//! `tenurectl` as an operator uses it, on real servers: one on this machine found without a flag, and a fleet of two cells.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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
    assert!(operator.said("tenant usage default").starts_with("PREFIX"));
    let top = operator.said("top --once --interval 0.1 --sort stored");
    assert!(top.starts_with("CELL") && top.contains("acme") && top.contains("default"), "{top}");
    assert!(operator.said("cell status").contains("leader"));

    let issue = operator.refused("tenant credentials acme --out acme");
    assert!(issue.contains("--issuer-cert-file"), "what to do next: {issue}");
    assert!(operator.refused("tenant get globex").contains("no cell has a tenant \"globex\""));
    assert!(operator.refused("tenant delete acme").contains("say --yes"));
    operator.said("tenant delete acme --yes");
    assert!(!operator.said("tenant list").contains("acme"));
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

    // A cell that is away is left out, with a warning.
    west.kill();
    let made = operator.run("tenant create t9");
    assert!(made.status.success() && String::from_utf8_lossy(&made.stderr).contains("warning: "), "{made:?}");
    assert!(String::from_utf8_lossy(&made.stdout).contains("east"));
    operator.said("cell remove west");
    assert!(!operator.said("cell list").contains("west"));
}
