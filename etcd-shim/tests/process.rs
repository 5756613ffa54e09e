//! `tenured` as a process: what it prints, what it refuses, how it ends, and that tenants do not see each other over HTTP.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

struct Server {
    child: Child,
    /// In the order of the listeners.
    addresses: Vec<SocketAddr>,
    _data: tempfile::TempDir,
}

impl Server {
    /// Starts on free ports and waits for the ready line.
    fn start(tenants: &[&str]) -> Server {
        let data = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tenured"));
        command.arg("--data-dir").arg(data.path().join("d")).args(["-listen-client-urls=http://127.0.0.1:0"]);
        for tenant in tenants {
            command.args(["--tenant-listen", &format!("{tenant}=http://127.0.0.1:0")]);
        }
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut addresses = Vec::new();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        loop {
            let line = lines.next().expect("a ready line").unwrap();
            if let Some((_, rest)) = line.split_once("\"address\":\"") {
                addresses.push(rest.split('"').next().unwrap().parse().unwrap());
            }
            if line.contains("ready to serve client requests") {
                break;
            }
        }
        // Keep reading, so that the server never waits for us.
        std::thread::spawn(move || lines.for_each(drop));
        Server { child, addresses, _data: data }
    }

    fn get(&self, listener: usize, path: &str) -> String {
        let mut stream = TcpStream::connect(self.addresses[listener]).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn serves_health_on_every_listener_and_ends_on_sigterm() {
    let mut server = Server::start(&["acme", "globex"]);
    assert_eq!(server.addresses.len(), 3);
    for listener in 0..3 {
        assert!(server.get(listener, "/health").ends_with(r#"{"health":"true","reason":""}"#));
        assert!(server.get(listener, "/readyz?verbose").contains("[+]linearizable_read ok\n"));
        assert!(server.get(listener, "/metrics").contains("etcd_debugging_mvcc_current_revision 1\n"));
    }
    assert!(server.get(0, "/nope").contains("404 page not found"));
    let pid = server.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(server.child.wait().unwrap().success(), "SIGTERM ends cleanly");
}

#[test]
fn what_is_wrong_is_one_line_and_exit_1() {
    let scratch = tempfile::tempdir().unwrap();
    for arguments in [&["--nope"][..], &["--max-txn-ops=many"], &["--tenant-listen=Bad=http://127.0.0.1:0"]] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_tenured")).args(arguments).current_dir(scratch.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1, "{arguments:?}");
    }
}

#[test]
fn version_is_printed_as_etcd_prints_it() {
    let output = Command::new(env!("CARGO_BIN_EXE_tenured")).arg("--version").output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(printed.starts_with("etcd Version: 3."), "{printed}");
}
