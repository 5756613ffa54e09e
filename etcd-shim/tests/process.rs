//! `tenured` as a process: what it prints, what it refuses, how it ends, and that tenants do not see each other over HTTP.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rustix::process::{Signal, set_parent_process_death_signal};

/// For how long requests may run on when a server is told to end, as etcd has it.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(7);

struct Server {
    child: Child,
    /// In the order of the listeners.
    addresses: Vec<SocketAddr>,
    /// What it says after it is ready, until its end.
    log: Receiver<String>,
    _data: tempfile::TempDir,
}

impl Server {
    /// Starts on free ports and waits for the ready line.
    fn start(tenants: &[&str]) -> Server {
        let listeners = tenants.iter().map(|tenant| format!("--tenant-listen={tenant}=http://127.0.0.1:0"));
        Self::start_with(&listeners.collect::<Vec<_>>(), &[])
    }

    fn start_with(flags: &[String], variables: &[(&str, &str)]) -> Server {
        let data = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tenured"));
        command.arg("--data-dir").arg(data.path().join("d")).args(["-listen-client-urls=http://127.0.0.1:0"]);
        command.args(flags).envs(variables.iter().copied());
        // A test that is killed takes its servers along, and so does one that ends: the system ends them with its thread.
        // SAFETY: between fork and exec only a system call is made.
        unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
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
        let (sender, log) = std::sync::mpsc::channel();
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(sender.send(line))));
        Server { child, addresses, log, _data: data }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    /// An HTTP/2 connection with a watch on it that the server has answered. The client never ends it.
    fn open_watch(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.addresses[0]).unwrap();
        stream.write_all(WATCH).unwrap();
        let mut received = Vec::new();
        while !received.windows(CREATED.len()).any(|bytes| bytes == CREATED) {
            let mut buffer = [0; 4096];
            let len = stream.read(&mut buffer).unwrap();
            assert!(len > 0, "closed: {}", received.escape_ascii());
            received.extend_from_slice(&buffer[..len]);
        }
        stream
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
    server.signal("-TERM");
    assert!(server.child.wait().unwrap().success(), "SIGTERM ends cleanly");
}

/// Preface, empty SETTINGS, HEADERS of `POST /etcdserverpb.Watch/Watch` with the content type of gRPC, and DATA that creates a
/// watch on the key `k`.
const WATCH: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\
    \x00\x00\x40\x01\x04\x00\x00\x00\x01\
    \x83\x86\x04\x19/etcdserverpb.Watch/Watch\x01\x01h\x0f\x10\x10application/grpc\x00\x02te\x08trailers\
    \x00\x00\x0a\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x05\x0a\x03\x0a\x01k";

/// `created` in the answer.
const CREATED: &[u8] = b"\x18\x01";

#[test]
fn a_watch_that_goes_on_does_not_hold_up_the_end_for_ever() {
    let mut server = Server::start(&[]);
    let mut watch = server.open_watch();
    server.signal("-TERM");
    assert!(server.child.wait().unwrap().success());
    let mut rest = Vec::new();
    // The kernel may report the end as a reset.
    let _ = watch.read_to_end(&mut rest);
}

#[test]
fn whoever_asks_twice_does_not_wait_for_clients() {
    loop {
        let mut server = Server::start(&[]);
        let _watch = server.open_watch();
        let began = Instant::now();
        server.signal("-INT");
        // It has heard the first then, and listens for the second.
        assert!(server.log.iter().any(|line| line.contains("stopping")));
        server.signal("-TERM");
        assert!(server.child.wait().unwrap().success());
        let took = began.elapsed();
        let log: Vec<String> = server.log.iter().collect();
        if log.iter().any(|line| line.contains("cut the requests that still run")) {
            return;
        }
        // On a machine that stalled it may have cut them by itself, and shows nothing.
        assert!(took >= DRAIN_TIMEOUT, "{took:?}: {log:#?}");
    }
}

#[test]
fn flags_come_from_the_environment_too() {
    let flags = ["--pre-vote=false", "-experimental-watch-progress-notify-interval=1s"].map(str::to_string);
    let server = Server::start_with(&flags, &[("ETCD_QUOTA_BACKEND_BYTES", "123456"), ("ETCD_BCRYPT_COST", "4")]);
    assert!(server.get(0, "/metrics").contains("etcd_server_quota_backend_bytes 123456\n"));
}

#[test]
fn what_is_wrong_is_one_line_and_exit_1() {
    let scratch = tempfile::tempdir().unwrap();
    for arguments in [
        &["--nope"][..],
        &["--max-txn-ops=many"],
        &["--tenant-listen=Bad=http://127.0.0.1:0"],
        &["--listen-client-urls=ftp://127.0.0.1:0"],
        &["--wal-dir=elsewhere"],
        &["--election-timeout=1"],
    ] {
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
