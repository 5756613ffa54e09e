//! `tenurectl` where there is no cell: what it makes by itself, and what it says when it cannot go on.

#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn tenurectl(dir: &std::path::Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tenurectl"))
        .args(arguments)
        .current_dir(dir)
        .env("TENURECTL_CONFIG", dir.join("cells.json"))
        .output()
        .unwrap()
}

fn fails(dir: &std::path::Path, arguments: &[&str], code: i32) -> String {
    let output = tenurectl(dir, arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn what_goes_wrong_is_one_line_that_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    for (arguments, text) in [
        (&["tenant", "list"][..], "no member of cell \"local\" is reached: reach unix:./default.tenure/admin.sock: "),
        (
            &["tenant", "list", "--endpoint", "http://a:1"],
            "endpoint \"http://a:1\": want unix:PATH or https://HOST:PORT",
        ),
        (&["tenant", "list", "--endpoint", "https://a:1"], "https://a:1 needs --cacert, --cert and --key"),
        (&["tenant", "list", "--cell", "east"], "there is no cell \"east\": tenurectl cell list shows those there are"),
        (
            &["tenant", "create", "acme", "--leases", "many"],
            "--leases: \"many\": want a number such as 500, 20M or 8GiB",
        ),
        (&["tenant", "create", "acme", "--label", "x"], "label \"x\": want NAME=VALUE"),
        (&["tenant", "rotate", "acme"], "--out DIR: where are the credentials that are to be renewed?"),
        (&["cell", "add", "east"], "where is it? --endpoint https://HOST:2382, with --cacert, --cert and --key"),
        (&["cell", "init", "--out", "c", "--member", "m1"], "--member \"m1\": want NAME=HOST[,HOST]"),
    ] {
        let said = fails(dir.path(), arguments, 1);
        assert!(said.starts_with("tenurectl: ") && said.trim_end().lines().count() == 1, "{said:?}");
        assert!(said.contains(text), "{arguments:?}: {said}");
    }
    for arguments in [&[][..], &["tenant"], &["tenant", "create"], &["tenant", "revoke", "a"], &["-o", "xml", "top"]] {
        fails(dir.path(), arguments, 2);
    }
}

#[test]
fn a_cell_is_made_once() {
    let dir = tempfile::tempdir().unwrap();
    let init =
        ["cell", "init", "--out", "cell", "--domain", "etcd.example", "--member", "m1=10.0.0.1", "--member", "m2=b"];
    let output = tenurectl(dir.path(), &init);
    assert!(output.status.success(), "{output:?}");
    let commands = String::from_utf8(output.stdout).unwrap();
    assert_eq!(commands.lines().count(), 2);
    assert!(commands.lines().all(|line| line.starts_with("tenured --name m")), "{commands}");
    let key = std::fs::metadata(dir.path().join("cell/ca.key")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&key.permissions()) & 0o777, 0o600);
    let said = fails(dir.path(), &init, 1);
    assert!(said.contains("is there already: --add-members signs for further members"), "{said}");
}

#[test]
fn shells_complete() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let output = tenurectl(dir.path(), &["completion", shell]);
        assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("credentials"), "{shell}");
    }
}
