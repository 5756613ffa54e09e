//! Load that is not measured itself, but felt by what is: made by processes of their own, which get what the others leave of the processors
//! ([`process::only_when_idle`]). As threads of the process that measures they would be felt by its clients, not by the server.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use crate::load::Load;
use crate::process;

/// A process that drives a server with a load, until its time is over or it is dropped. What it is refused, or cut off from, is its own trouble.
pub(crate) struct Noise(Option<Child>);

impl Noise {
    /// Begins at once, for so long; the keys of the load are there already. `bench` is this program.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub(crate) fn begin(bench: &Path, address: &str, load: &Load, duration: Duration) -> anyhow::Result<Noise> {
        let workload = load.workload.name();
        // The program adds the workload's name itself.
        let prefix = load.prefix.strip_suffix(&format!("{workload}/")).context("keys of another workload")?;
        let mut command = Command::new(bench);
        command.args(["run", &workload, "--filled", "--json", "--prefix", prefix, "--endpoints", address]);
        command.args(["--warm-up", "0", "--duration", &duration.as_secs_f64().to_string()]);
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
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        // A process has the priority of the thread that starts it.
        let begun = std::thread::spawn(move || {
            if let Err(error) = process::only_when_idle() {
                eprintln!("the noise competes with what is measured: {error}");
            }
            command.spawn()
        });
        let begun = begun.join().map_err(|_| anyhow::anyhow!("starting the noise panicked"))?;
        Ok(Noise(Some(begun.context("start the noise")?)))
    }

    /// Waits until its time is over. Answers how many operations it made.
    ///
    /// # Errors
    /// If it failed.
    pub(crate) fn operations(mut self) -> anyhow::Result<u64> {
        let child = self.0.take().context("it was ended")?;
        let output = child.wait_with_output().context("wait for the noise")?;
        anyhow::ensure!(output.status.success(), "the noise ended with {}", output.status);
        let measured: Value = serde_json::from_slice(&output.stdout).context("what the noise printed")?;
        measured.get("operations").and_then(Value::as_u64).context("how much noise there was")
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
