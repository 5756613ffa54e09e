//! Several `tenured` as one cell.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
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
    /// Where it listens for clients since it got ready: `client`, then those of `--tenant-listen`.
    pub addresses: Vec<SocketAddr>,
    child: Option<Child>,
    /// What its newest process says.
    said: Option<Lines>,
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
                addresses: Vec::new(),
                child: None,
                said: None,
                _claims: [client_claim, peer_claim],
            }
        });
        let mut cluster = Cluster { members: members.collect() };
        let initial = cluster.initial_cluster(count);
        for member in &mut cluster.members {
            member.set_up(&initial, flags);
        }
        cluster
    }

    /// Starts all and waits until all are ready.
    pub fn start_all(&mut self) {
        self.members.iter_mut().for_each(Member::spawn);
        self.members.iter_mut().for_each(Member::wait_until_ready);
    }

    /// `--initial-cluster` of the first so many of them.
    pub fn initial_cluster(&self, count: usize) -> String {
        let pairs = self.members[..count].iter().enumerate().map(|(at, member)| format!("m{at}={}", member.peer_url));
        format!("--initial-cluster={}", pairs.collect::<Vec<_>>().join(","))
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

impl Member {
    fn set_up(&mut self, initial_cluster: &str, flags: &[&str]) {
        self.arguments.extend([
            format!("--data-dir={}", self.data_dir.display()),
            format!("--listen-client-urls=http://{}", self.client),
            format!("--advertise-client-urls=http://{}", self.client),
            format!("--listen-peer-urls={}", self.peer_url),
            format!("--initial-advertise-peer-urls={}", self.peer_url),
            initial_cluster.to_string(),
        ]);
        self.arguments.extend(flags.iter().map(ToString::to_string));
    }

    /// A value of its metrics, by name and labels.
    pub fn metric(&self, name: &str) -> f64 {
        let mut stream = TcpStream::connect(self.client).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let value = answer.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {answer}"))
    }

    /// Starts it with further flags, which must make it refuse; gives the one line that it says why in.
    pub fn refusal(&mut self, flags: &[&str]) -> String {
        self.spawn_with(flags);
        self.failure()
    }

    /// Waits until it fails by itself; gives the one line that it says why in.
    pub fn failure(&mut self) -> String {
        let Ended { in_good_order, said } = self.wait_for_end();
        assert!(!in_good_order, "it must not end well: {said:?}");
        let mut told: Vec<String> = said.into_iter().filter(|line| !is_ordinary(line)).collect();
        assert_eq!(told.len(), 1, "one line says why: {told:?}");
        told.remove(0)
    }

    /// Waits until it ends by itself.
    pub fn wait_for_end(&mut self) -> Ended {
        let said = self.said.take().unwrap();
        // Until it says nothing any more: it has ended, or closed its output.
        let said = std::iter::from_fn(|| said.next()).collect();
        Ended { in_good_order: self.child.take().unwrap().wait().unwrap().success(), said }
    }

    /// Waits for a line that contains this.
    pub fn wait_for(&self, text: &str) {
        let said = self.said.as_ref().expect("it was started");
        while !said.next().unwrap_or_else(|| panic!("the member ended before it said {text:?}")).contains(text) {}
    }

    /// Waits until it has a leader and has caught up.
    pub fn wait_until_ready(&mut self) {
        let said = self.said.as_ref().expect("it was started");
        self.addresses.clear();
        loop {
            let line = said.next().expect("the member says that it is ready");
            if let Some((_, rest)) = line.split_once("\"address\":\"") {
                self.addresses.push(rest.split('"').next().unwrap().parse().unwrap());
            }
            if line.contains("ready to serve client requests") {
                return;
            }
        }
    }

    /// Starts it with further flags, this time only, and waits until it is ready.
    pub fn start_with(&mut self, flags: &[&str]) {
        self.spawn_with(flags);
        self.wait_until_ready();
    }

    /// Starts it with further flags, this time only, and waits until it has tried to reach a peer; it must not get ready.
    pub fn start_unready(&mut self, flags: &[&str]) {
        self.spawn_with(flags);
        self.wait_for("lost the connection to a peer");
    }

    /// Starts it with further flags, this time only; it need not get ready.
    pub fn spawn_with(&mut self, flags: &[&str]) {
        let arguments = self.arguments.clone();
        self.arguments.extend(flags.iter().map(ToString::to_string));
        self.spawn();
        self.arguments = arguments;
    }

    /// From its next start on it is not given these any more, by their names.
    pub fn forget_flags(&mut self, names: &[&str]) {
        let is_one = |flag: &String| {
            let name = flag.trim_start_matches('-').split('=').next().unwrap_or_default();
            names.contains(&name)
        };
        self.arguments.retain(|flag| !is_one(flag));
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

    fn spawn(&mut self) {
        let mut command = self.command();
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let child = self.child.insert(child::spawn(command));
        self.said = Some(child::lines_of(child.stderr.take().unwrap()));
    }

    /// Starts it again and waits until it is ready: until it has a leader and has caught up.
    pub fn start(&mut self) {
        self.spawn();
        self.wait_until_ready();
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
        child::signal(&child, "TERM");
        child.wait().unwrap().success()
    }

    /// SIGSTOP, or SIGCONT.
    pub fn pause(&self, paused: bool) {
        if let Some(child) = &self.child {
            child::signal(child, if paused { "STOP" } else { "CONT" });
        }
    }
}

/// How a member ended that was not told to.
pub struct Ended {
    pub in_good_order: bool,
    /// All that it said since somebody listened last.
    pub said: Vec<String>,
}

/// A line of the log that tells of no error.
fn is_ordinary(line: &str) -> bool {
    line.starts_with('{') && !line.contains("\"level\":\"error\"")
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}
