//! What the operating system says of a process: CPU time, memory, bytes written. From `/proc`, so on Linux only.

use std::fs;
use std::time::{Duration, Instant};

/// CPU time and bytes written of a process since it started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// User and system time of all threads, dead ones included. Counted in ticks of 10 ms.
    pub cpu: Duration,
    /// Bytes sent to the disk (not to its caches).
    pub written_bytes: u64,
}

/// # Errors
/// If there is no such process, or it is another user's.
pub fn usage(pid: u32) -> anyhow::Result<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything; user and system ticks are the 12th and 13th field behind it.
    let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
    let mut fields = behind.split_ascii_whitespace().skip(11).map_while(|field| field.parse::<u64>().ok());
    let ticks = fields.next().unwrap_or(0) + fields.next().unwrap_or(0);
    let ticks_per_second = rustix::param::clock_ticks_per_second();
    let written_bytes = fs::read_to_string(format!("/proc/{pid}/io")).map_or(0, |io| line(&io, "write_bytes:"));
    Ok(Usage { cpu: Duration::from_millis(ticks * 1000 / ticks_per_second), written_bytes })
}

/// Largest resident memory since [`reset_peak`], in bytes.
pub fn peak_rss_bytes(pid: u32) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/status")).map_or(0, |status| line(&status, "VmHWM:") * 1024)
}

/// Resident memory now, in bytes.
pub fn rss_bytes(pid: u32) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/status")).map_or(0, |status| line(&status, "VmRSS:") * 1024)
}

/// Lets [`peak_rss_bytes`] start again from what is resident now. Where this is not allowed the peak stays that of the
/// process's whole life.
pub fn reset_peak(pid: u32) {
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// How long [`settle`] waits at most.
const SETTLE_MAX: Duration = Duration::from_secs(20);

/// Waits until the process has done next to nothing for a second: what it has put off, it has done. Within bounds.
pub fn settle(pid: u32) {
    let began = Instant::now();
    while let Ok(before) = usage(pid)
        && began.elapsed() < SETTLE_MAX
    {
        std::thread::sleep(Duration::from_secs(1));
        let busy = usage(pid).is_ok_and(|after| {
            after.cpu - before.cpu > Duration::from_millis(50) || after.written_bytes - before.written_bytes > 1 << 20
        });
        if !busy {
            return;
        }
    }
}

/// CPU time of the calling thread, which is the whole load generator's while it generates.
pub fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// From now on the calling thread runs only where a processor has nothing else to do, as if it were on another machine. (A client that
/// makes a flood is otherwise one more flood, of the processors that server and other clients are on.)
///
/// # Errors
/// The system's.
pub fn only_when_idle() -> std::io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the pointer is to a value that lives for the call, which reads it; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn line(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value.and_then(|value| value.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_its_own_process() {
        let started = usage(std::process::id()).unwrap().cpu;
        let mut spun = 0u64;
        while usage(std::process::id()).unwrap().cpu == started {
            spun += 1;
        }
        assert!(spun > 0);
        // In this order: other tests grow meanwhile.
        let rss_bytes = rss_bytes(std::process::id());
        assert!(rss_bytes > 0 && peak_rss_bytes(std::process::id()) >= rss_bytes);
    }
}
