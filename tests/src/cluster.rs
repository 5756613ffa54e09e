//! Several `tenured` as one cell.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use crate::child::{self, Lines};
use crate::server::program;

/// One member, running or not. It keeps its addresses and its data.
pub struct Member {
    arguments: Vec<String>,
    told: Told,
    pub client: SocketAddr,
    /// What the others reach it by.
    pub peer_url: String,
    pub data_dir: PathBuf,
    child: Option<Child>,
    _claims: [Claim; 2],
}

/// How a member is told its flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    OnTheCommandLine,
    /// `ETCD_*` alone.
    InVariables,
    /// `--config-file` alone.
    InAFile,
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
        let members = (0..count).map(|at| {
            let [(client, client_claim), (peer, peer_claim)] = [free_address(), free_address()];
            Member {
                arguments: vec![format!("--name=m{at}")],
                told: Told::OnTheCommandLine,
                client,
                peer_url: format!("{scheme}://{peer}"),
                data_dir: dir.join(format!("m{at}")),
                child: None,
                _claims: [client_claim, peer_claim],
            }
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
        let said: Vec<_> = self.members.iter_mut().map(Member::spawn).collect();
        said.iter().for_each(wait_until_ready);
    }

    /// `--initial-cluster` of all of them.
    fn initial(&self) -> String {
        let pairs = self.members.iter().enumerate().map(|(at, member)| format!("m{at}={}", member.peer_url));
        pairs.collect::<Vec<_>>().join(",")
    }
}

/// Counts the ports that were looked at, for all tests of the process: none is given twice.
static NEXT_PORT: AtomicU16 = AtomicU16::new(0);

/// Keeps a port for a member also while that is down: the same port of another address of this machine, held as long as the
/// member is. What other test programs hold is not free for this one.
type Claim = TcpListener;

/// Below the ports that the system gives to outgoing connections, one of which could take a port while its member is down.
fn ports() -> Range<u16> {
    let outgoing = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let first_outgoing: u16 = outgoing.split_whitespace().next().unwrap().parse().unwrap();
    10_000..first_outgoing.clamp(11_000, 30_000)
}

/// An address that nobody listens on.
fn free_address() -> (SocketAddr, Claim) {
    let ports = ports();
    let count = ports.end - ports.start;
    // Test programs that run beside each other begin at different places.
    let offset = u16::try_from(std::process::id().wrapping_mul(1_499) % u32::from(count)).unwrap();
    let mut candidates = (0..count).map(|_| {
        let next = NEXT_PORT.fetch_add(1, Ordering::Relaxed) % count;
        ports.start + (offset + next) % count
    });
    let free = candidates.find_map(|port| {
        let claim = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 2), port)).ok()?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        TcpListener::bind(address).ok().map(|_| (address, claim))
    });
    free.expect("a port is free")
}

/// Waits for a line that contains this.
fn wait_for(said: &Lines, text: &str) {
    while !said.next().unwrap_or_else(|| panic!("the member ended before it said {text:?}")).contains(text) {}
}

fn wait_until_ready(said: &Lines) {
    wait_for(said, "ready to serve client requests");
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
        let mut command = Command::new(program());
        command.args(&self.arguments).args(flags).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = child::spawn(command).wait_with_output().unwrap();
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
    pub fn start_unready(&mut self, flags: &[&str]) {
        let arguments = self.arguments.clone();
        self.arguments.extend(flags.iter().map(ToString::to_string));
        let said = self.spawn();
        self.arguments = arguments;
        wait_for(&said, "lost the connection to a peer");
    }

    /// From its next start on.
    pub fn tell(&mut self, told: Told) {
        self.told = told;
    }

    fn command(&self) -> Command {
        let mut command = Command::new(program());
        let flags =
            || self.arguments.iter().map(|flag| flag.trim_start_matches('-').split_once('=').expect("--NAME=VALUE"));
        match self.told {
            Told::OnTheCommandLine => {
                command.args(&self.arguments);
            }
            Told::InVariables => {
                let variable = |name: &str| format!("ETCD_{}", name.replace('-', "_").to_uppercase());
                command.envs(flags().map(|(name, value)| (variable(name), value)));
            }
            Told::InAFile => {
                let path = self.data_dir.with_extension("yaml");
                let lines: String = flags().map(|(name, value)| format!("{name}: '{value}'\n")).collect();
                std::fs::write(&path, lines).unwrap();
                command.arg(format!("--config-file={}", path.display()));
            }
        }
        command
    }

    fn spawn(&mut self) -> Lines {
        let mut command = self.command();
        command.stderr(Stdio::piped());
        let child = self.child.insert(child::spawn(command));
        child::lines_of(child.stderr.take().unwrap())
    }

    /// Starts it again and waits until it is ready: until it has a leader and has caught up.
    pub fn start(&mut self) {
        wait_until_ready(&self.spawn());
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
