//! `tenured` as a child process.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::child;

/// A server gives requests up after two election timeouts and five seconds, by default seven in all, which a busy machine's disk
/// may take for one write. A member that is alone elects itself at once, whatever this is.
const PATIENT: &str = "--election-timeout=50000";

/// A running server; killed with SIGKILL when dropped.
pub struct Server {
    child: Child,
    addresses: Vec<SocketAddr>,
}

/// Cargo puts a workspace's programs beside the directory of its test programs.
pub(crate) fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("tenured");
    assert!(program.exists(), "{} is missing: test the whole workspace, as `make test` does", program.display());
    program
}

impl Server {
    /// Starts on a data directory, with a listener on a free port for each tenant, and waits until it is ready.
    pub fn start(data_dir: &Path, tenants: &[&str]) -> Server {
        Self::start_with_flags(&[], data_dir, tenants)
    }

    /// As [`Server::start`], with further flags.
    pub fn start_with_flags(flags: &[&str], data_dir: &Path, tenants: &[&str]) -> Server {
        let mut command = Command::new(program());
        // A later one counts.
        command.arg(PATIENT).args(flags);
        Self::spawn(command, data_dir, tenants)
    }

    /// SIGSTOP, or SIGCONT.
    pub fn pause(&self, paused: bool) {
        child::signal(&self.child, if paused { "STOP" } else { "CONT" });
    }

    /// As [`Server::start`], with at most this many files and connections open.
    pub fn start_with_files(files_max: u32, data_dir: &Path, tenants: &[&str]) -> Server {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -n {files_max} && exec \"$0\" \"$@\"")]).arg(program()).arg(PATIENT);
        Self::spawn(command, data_dir, tenants)
    }

    /// As [`Server::start`], by a service manager that listens on this socket.
    pub fn start_managed(socket: &Path, data_dir: &Path, tenants: &[&str]) -> Server {
        let mut command = Command::new(program());
        command.arg(PATIENT).env("NOTIFY_SOCKET", socket);
        Self::spawn(command, data_dir, tenants)
    }

    /// What a server says that does not start on this data directory.
    pub fn refusal(data_dir: &Path) -> String {
        let mut command = Command::new(program());
        command.arg("--data-dir").arg(data_dir).args(["--listen-client-urls=http://127.0.0.1:0", PATIENT]);
        command.stderr(Stdio::piped());
        let mut child = child::spawn(command);
        let lines = child::lines_of(child.stderr.take().unwrap());
        let said: Vec<String> = std::iter::from_fn(|| lines.next()).collect();
        assert!(!child.wait().unwrap().success(), "it started: {said:?}");
        said.join("\n")
    }

    fn spawn(mut command: Command, data_dir: &Path, tenants: &[&str]) -> Server {
        // The listener of `default` is not wanted, but cannot be left out.
        command.arg("--data-dir").arg(data_dir).arg("--listen-client-urls=http://127.0.0.1:0");
        for tenant in tenants {
            command.args(["--tenant-listen", &format!("{tenant}=http://127.0.0.1:0")]);
        }
        command.stderr(Stdio::piped());
        let mut server = Server { child: child::spawn(command), addresses: Vec::new() };
        let lines = child::lines_of(server.child.stderr.take().unwrap());
        loop {
            let line = lines.next().expect("the server says that it is ready");
            if let Some((_, rest)) = line.split_once("\"address\":\"") {
                server.addresses.push(rest.split('"').next().unwrap().parse().unwrap());
            }
            if line.contains("ready to serve client requests") {
                return server;
            }
        }
    }

    /// Where the tenant at this place of the list listens.
    pub fn address(&self, tenant: usize) -> SocketAddr {
        self.addresses[tenant + 1]
    }

    /// Where the admin API listens, if a flag says that it does on TCP: told before all others.
    pub fn admin_address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// SIGKILL; nothing of the process is left on return.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Bytes of memory resident now.
    pub fn resident_bytes(&self) -> u64 {
        self.status_kib("VmRSS:") << 10
    }

    /// The most bytes of memory that were resident since [`Server::forget_peak`].
    pub fn peak_bytes(&self) -> u64 {
        self.status_kib("VmHWM:") << 10
    }

    /// Starts measuring the peak anew.
    pub fn forget_peak(&self) {
        // 5: proc(5), "reset the peak resident set size".
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }

    fn status_kib(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}
