//! Load that is not measured itself, but felt by what is: made by processes of their own, which get what the others leave of the processors
//! ([`process::only_when_idle`]). As threads of the process that measures they would be felt by its clients, not by the server.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::Context as _;
use serde_json::Value;

use crate::load::Load;
use crate::process;

/// A process that drives a server with a load. What it is refused, or cut off from, is its own trouble.
pub(crate) struct Noise {
    workload: String,
    child: Child,
    said: BufReader<ChildStdout>,
}

/// Longer than any measurement.
const SECONDS_MAX: &str = "3600";

impl Noise {
    /// Begins with a load whose keys are there already. `bench` is this program.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub(crate) fn begin(bench: &Path, address: &str, load: &Load) -> anyhow::Result<Noise> {
        let workload = load.workload.name();
        // The program adds the workload's name itself.
        let prefix = load.prefix.strip_suffix(&format!("{workload}/")).context("keys of another workload")?;
        let mut command = Command::new(bench);
        command.args([
            "run",
            &workload,
            "--filled",
            "--json",
            "--announce",
            "--prefix",
            prefix,
            "--endpoints",
            address,
        ]);
        command.args(["--warm-up", "0", "--duration", SECONDS_MAX]);
        let numbers = [
            ("--clients", load.clients),
            ("--connections", load.connections as u64),
            ("--keys", load.keys),
            ("--value-bytes", load.value_bytes as u64),
            ("--watchers", load.watchers),
        ];
        for (name, number) in numbers {
            command.args([name, &number.to_string()]);
        }
        if let Some(rate) = load.rate {
            command.args(["--rate", &rate.to_string()]);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // A process has the priority of the thread that starts it.
        let begun = std::thread::spawn(move || {
            if let Err(error) = process::only_when_idle() {
                eprintln!("the noise competes with what is measured: {error}");
            }
            command.spawn()
        });
        let begun = begun.join().map_err(|_| anyhow::anyhow!("starting the noise panicked"))?;
        let mut child = begun.context("start the noise")?;
        let stdout = child.stdout.take().context("what the noise says")?;
        Ok(Noise { workload, child, said: BufReader::new(stdout) })
    }

    /// Waits until all its connections and watches are open.
    ///
    /// # Errors
    /// If it ended before.
    pub(crate) fn stand(&mut self) -> anyhow::Result<()> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        anyhow::ensure!(line.trim_end() == STANDING, "the noise {} did not come to stand", self.workload);
        Ok(())
    }

    /// Ends it. Answers what it measured of itself since it stood, as `run --json` prints it; `None` if it was cut off before.
    pub(crate) fn end(mut self) -> Option<Value> {
        drop(self.child.stdin.take());
        let mut rest = Vec::new();
        self.said.read_to_end(&mut rest).ok()?;
        serde_json::from_slice(&rest).ok()
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What `run --announce` says when its load stands.
pub const STANDING: &str = "standing";
