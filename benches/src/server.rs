//! Servers as processes: started on fresh data, watched, ended.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// Longest time for a server to answer after its start.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// What kind of program serves, for its flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tenured,
    Etcd,
    Floor,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Tenured => "tenured",
            Kind::Etcd => "etcd",
            Kind::Floor => "floor",
        }
    }
}

/// How a server is to run.
#[derive(Clone, Debug)]
pub struct Setup {
    pub kind: Kind,
    pub program: PathBuf,
    pub data_dir: PathBuf,
    /// More than one: for tenured, each has a listener of its own (cleartext) or a certificate (TLS).
    pub tenants: usize,
    /// Certificates made by [`crate::tls::make`].
    pub tls_dir: Option<PathBuf>,
}

/// A place in a cell of several members.
#[derive(Clone, Debug)]
struct Seat {
    name: String,
    /// `--initial-cluster`.
    cluster: String,
}

/// A running server; killed when dropped.
pub struct Server {
    setup: Setup,
    child: Child,
    port: u16,
    peer_port: u16,
    seat: Option<Seat>,
}

/// A port that was free a moment ago. Outgoing connections take theirs from above 30,000.
fn free_port() -> anyhow::Result<u16> {
    for _ in 0..1000 {
        let port = rand::random_range(12_000..30_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port")
}

/// The loopback address of a tenant's own listener.
fn tenant_host(tenant: usize) -> String {
    format!("127.1.{}.{}", tenant / 250, tenant % 250 + 1)
}

/// The name of a tenant, where it has one.
pub fn tenant_name(tenant: usize) -> String {
    format!("bench-{tenant:04}")
}

impl Server {
    /// Starts a server and waits until it takes connections.
    ///
    /// # Errors
    /// If it ends, or takes too long.
    pub fn start(setup: Setup) -> anyhow::Result<Server> {
        let (port, peer_port) = (free_port()?, free_port()?);
        let child = launch(&setup, port, peer_port, None)?;
        let mut server = Server { setup, child, port, peer_port, seat: None };
        server.wait()?;
        Ok(server)
    }

    /// Starts a cell of so many members, each on a directory of its own below the setup's, and waits until all take connections.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start_cell(setup: &Setup, members: usize) -> anyhow::Result<Vec<Server>> {
        let mut ports = Vec::new();
        for number in 1..=members {
            ports.push((format!("m{number}"), free_port()?, free_port()?));
        }
        let pairs = ports.iter().map(|(name, _, peer_port)| format!("{name}=http://127.0.0.1:{peer_port}"));
        let cluster = pairs.collect::<Vec<_>>().join(",");
        let mut servers = Vec::new();
        for (name, port, peer_port) in ports {
            let setup = Setup { data_dir: setup.data_dir.join(&name), ..setup.clone() };
            let seat = Some(Seat { name, cluster: cluster.clone() });
            let child = launch(&setup, port, peer_port, seat.as_ref())?;
            servers.push(Server { setup, child, port, peer_port, seat });
        }
        for server in &mut servers {
            server.wait()?;
        }
        Ok(servers)
    }

    /// SIGKILL; nothing of the process is left on return.
    ///
    /// # Errors
    /// If the system does not say how it ended.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts it on the same data and addresses, without waiting.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn launch_again(&mut self) -> anyhow::Result<()> {
        self.child = launch(&self.setup, self.port, self.peer_port, self.seat.as_ref())?;
        Ok(())
    }

    /// Ends the server as an operator would, and starts it on the same data. Answers how long it took until it answered.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn restart(&mut self) -> anyhow::Result<Duration> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        self.child.wait()?;
        let from = Instant::now();
        self.launch_again()?;
        self.wait()?;
        Ok(from.elapsed())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `host:port` of each tenant.
    pub fn addresses(&self) -> Vec<String> {
        let own_listeners = self.setup.kind == Kind::Tenured && self.setup.tls_dir.is_none() && self.setup.tenants > 1;
        if own_listeners {
            (0..self.setup.tenants).map(|tenant| format!("{}:{}", tenant_host(tenant), self.port)).collect()
        } else {
            vec![format!("127.0.0.1:{}", self.port)]
        }
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        let from = Instant::now();
        let address = self.addresses().pop().context("an address")?;
        let tls = self.setup.tls_dir.is_some();
        while !(if tls { std::net::TcpStream::connect(&address).is_ok() } else { answers(&address) }) {
            if let Some(status) = self.child.try_wait()? {
                let log = std::fs::read_to_string(log_path(&self.setup.data_dir)).unwrap_or_default();
                let end: Vec<&str> = log.lines().rev().take(3).collect();
                bail!("{} ended: {status}: {}", self.setup.kind.name(), end.join(" | "));
            }
            if from.elapsed() > START_TIMEOUT {
                bail!("{} does not answer at {address}", self.setup.kind.name());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// Whether HTTP is answered there: a server may listen before it serves.
fn answers(address: &str) -> bool {
    use std::io::{Read, Write};
    let Ok(mut stream) = std::net::TcpStream::connect(address) else { return false };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(60)));
    // The start of HTTP/2, with no settings: the server's own come back once it serves.
    let hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    stream.write_all(hello).is_ok() && stream.read_exact(&mut [0; 9]).is_ok()
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log_path(data_dir: &Path) -> PathBuf {
    data_dir.with_extension("log")
}

fn launch(setup: &Setup, port: u16, peer_port: u16, seat: Option<&Seat>) -> anyhow::Result<Child> {
    let mut command = Command::new(&setup.program);
    let scheme = if setup.tls_dir.is_some() { "https" } else { "http" };
    let client_url = format!("{scheme}://127.0.0.1:{port}");
    let peer_url = format!("http://127.0.0.1:{peer_port}");
    if setup.kind == Kind::Floor {
        command.args(["floor", "--listen", &format!("127.0.0.1:{port}")]);
    } else {
        command.arg("--data-dir").arg(&setup.data_dir);
        command.args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url]);
        command.args(["--quota-backend-bytes", "17179869184"]);
    }
    if let Some(tls) = &setup.tls_dir {
        command.arg("--cert-file").arg(tls.join("server.crt")).arg("--key-file").arg(tls.join("server.key"));
        if setup.tenants > 1 {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(tls.join("ca.crt"));
        }
    }
    if let Some(Seat { name, cluster }) = seat {
        command.args(["--name", name, "--initial-cluster", cluster]);
        command.args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url]);
    }
    match setup.kind {
        Kind::Etcd if seat.is_none() => {
            command.args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url]);
            command.args(["--initial-cluster", &format!("default={peer_url}")]);
        }
        Kind::Tenured if setup.tenants > 1 => {
            for tenant in 0..setup.tenants {
                let host = tenant_host(tenant);
                command.args(["--tenant-listen", &format!("{}=http://{host}:{port}", tenant_name(tenant))]);
            }
        }
        Kind::Tenured | Kind::Etcd | Kind::Floor => {}
    }
    std::fs::create_dir_all(setup.data_dir.parent().context("a data directory inside another")?)?;
    let log = std::fs::File::create(log_path(&setup.data_dir))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("start {}", setup.program.display()))
}
