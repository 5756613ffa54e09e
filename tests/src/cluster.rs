//! Several `tenured` as one cell.

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc;

use crate::server::program;

/// One member, running or not. It keeps its addresses and its data.
pub struct Member {
    arguments: Vec<String>,
    pub client: SocketAddr,
    /// What the others reach it by.
    pub peer_url: String,
    pub data_dir: PathBuf,
    child: Option<Child>,
}

/// Members of one cell; killed when dropped.
pub struct Cluster {
    pub members: Vec<Member>,
}

impl Cluster {
    /// Starts `count` members on data directories below `dir` and waits until all are ready.
    pub fn start(count: usize, dir: &Path, flags: &[&str]) -> Cluster {
        let mut cluster = Self::new("http", count, dir, flags);
        cluster.start_all();
        cluster
    }

    /// Members that do not run yet, with peers on this scheme.
    pub fn new(scheme: &str, count: usize, dir: &Path, flags: &[&str]) -> Cluster {
        let peers = free_addresses(count).into_iter().map(|peer| format!("{scheme}://{peer}"));
        let members = free_addresses(count).into_iter().zip(peers).enumerate().map(|(at, (client, peer_url))| Member {
            arguments: vec![format!("--name=m{at}")],
            client,
            peer_url,
            data_dir: dir.join(format!("m{at}")),
            child: None,
        });
        let mut cluster = Cluster { members: members.collect() };
        let initial = cluster.initial();
        for member in &mut cluster.members {
            member.set_up(&initial, flags);
        }
        cluster
    }

    /// Starts all and waits until all are ready.
    pub fn start_all(&mut self) {
        let ready: Vec<_> = self.members.iter_mut().map(Member::spawn).collect();
        ready.into_iter().for_each(wait);
    }

    /// `--initial-cluster` of all of them.
    fn initial(&self) -> String {
        let pairs = self.members.iter().enumerate().map(|(at, member)| format!("m{at}={}", member.peer_url));
        pairs.collect::<Vec<_>>().join(",")
    }
}

/// Counts the ports that were looked at, for all tests of the process: none is given twice.
static NEXT_PORT: AtomicU16 = AtomicU16::new(0);

/// Addresses that nobody listens on, with ports below those that the system gives to outgoing connections: one of these could
/// take a port while its member is down.
fn free_addresses(count: usize) -> Vec<SocketAddr> {
    const FIRST: u16 = 10_000;
    const PORTS: u16 = 20_000;
    // Test programs that run beside each other begin at different places.
    let offset = std::process::id().wrapping_mul(1_499) % u32::from(PORTS);
    let offset = u16::try_from(offset).unwrap();
    let candidates = (0..PORTS).map(|_| {
        let next = NEXT_PORT.fetch_add(1, Ordering::Relaxed) % PORTS;
        SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST + (offset + next) % PORTS))
    });
    let free: Vec<_> = candidates.filter(|address| TcpListener::bind(address).is_ok()).take(count).collect();
    assert_eq!(free.len(), count, "ports are free");
    free
}

fn wait(ready: mpsc::Receiver<()>) {
    ready.recv().expect("the member says that it is ready");
}

impl Member {
    fn set_up(&mut self, initial_cluster: &str, flags: &[&str]) {
        self.arguments.extend([
            format!("--data-dir={}", self.data_dir.display()),
            format!("--listen-client-urls=http://{}", self.client),
            format!("--advertise-client-urls=http://{}", self.client),
            format!("--listen-peer-urls={}", self.peer_url),
            format!("--initial-advertise-peer-urls={}", self.peer_url),
            format!("--initial-cluster={initial_cluster}"),
        ]);
        self.arguments.extend(flags.iter().map(ToString::to_string));
    }

    /// Starts it with further flags, which must make it refuse; gives the line that it ends with.
    pub fn refusal(&self, flags: &[&str]) -> String {
        let output = Command::new(program()).args(&self.arguments).args(flags).output().unwrap();
        assert!(!output.status.success(), "it must not start");
        last_line(&String::from_utf8_lossy(&output.stderr))
    }

    /// Waits until it ends by itself; gives whether in good order.
    pub fn wait_for_end(&mut self) -> bool {
        self.child.take().unwrap().wait().unwrap().success()
    }

    /// Starts it with further flags, this time only, and waits until it is ready.
    pub fn start_with(&mut self, flags: &[&str]) {
        let arguments = self.arguments.clone();
        self.arguments.extend(flags.iter().map(ToString::to_string));
        self.start();
        self.arguments = arguments;
    }

    /// Starts it with further flags, this time only, and waits until it has tried to reach a peer; it must not get ready.
    pub async fn start_unready(&mut self, flags: &[&str]) {
        let arguments = self.arguments.clone();
        self.arguments.extend(flags.iter().map(ToString::to_string));
        let (sender, tried) = tokio::sync::oneshot::channel();
        self.spawn_until("lost the connection to a peer", move || {
            let _ = sender.send(());
        });
        self.arguments = arguments;
        tried.await.expect("it tries to reach its peers");
    }

    fn spawn(&mut self) -> mpsc::Receiver<()> {
        let (sender, ready) = mpsc::channel();
        // Whoever waited may have given up.
        self.spawn_until("ready to serve client requests", move || {
            let _ = sender.send(());
        });
        ready
    }

    /// Starts it, and calls when it has said this.
    fn spawn_until(&mut self, text: &'static str, said: impl FnOnce() + Send + 'static) {
        let mut child = Command::new(program()).args(&self.arguments).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        // Reads on to the end, so that the member never waits for us.
        std::thread::spawn(move || {
            let mut said = Some(said);
            for line in lines.map_while(Result::ok) {
                eprintln!("{line}");
                if line.contains(text)
                    && let Some(said) = said.take()
                {
                    said();
                }
            }
        });
        self.child = Some(child);
    }

    /// Starts it again and waits until it is ready: until it has a leader and has caught up.
    pub fn start(&mut self) {
        wait(self.spawn());
    }

    /// SIGKILL; nothing of the process is left on return.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM; returns when it has ended, and whether it did so in good order.
    pub fn stop(&mut self) -> bool {
        let Some(mut child) = self.child.take() else { return false };
        signal(&child, "TERM");
        child.wait().unwrap().success()
    }

    /// SIGSTOP, or SIGCONT.
    pub fn pause(&self, paused: bool) {
        if let Some(child) = &self.child {
            signal(child, if paused { "STOP" } else { "CONT" });
        }
    }
}

/// What a program says last, which is why it ended.
fn last_line(text: &str) -> String {
    text.lines().last().unwrap_or_default().to_string()
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().unwrap();
    assert!(sent.success(), "kill -{name}");
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}
