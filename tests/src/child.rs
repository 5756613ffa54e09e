//! Programs that the tests start, none of which outlives the tests.

use std::io::{self, BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStderr, Command};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

/// Bounds what should long be over; it judges nothing.
const PATIENCE: Duration = Duration::from_secs(300);

type Order = (Command, Sender<io::Result<Child>>);

/// The thread that starts all programs: the system ends a program with the thread that started it, and this one lives as long as the
/// process.
static STARTER: LazyLock<Mutex<Sender<Order>>> = LazyLock::new(|| {
    let (sender, orders) = channel::<Order>();
    std::thread::spawn(move || {
        for (mut command, reply) in orders {
            // Who asked waits.
            let _ = reply.send(command.spawn());
        }
    });
    Mutex::new(sender)
});

/// Starts a program that the system kills when this process ends, however that ends: Drop does not run in a test that is killed.
pub(crate) fn spawn(mut command: Command) -> Child {
    let parent = std::process::id();
    // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            die_with_parent()?;
            // It may have ended before the system was told.
            if std::os::unix::process::parent_id() == parent { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
        });
    }
    let (reply, child) = channel();
    STARTER.lock().unwrap().send((command, reply)).unwrap();
    child.recv().unwrap().unwrap()
}

fn die_with_parent() -> io::Result<()> {
    unsafe extern "C" {
        fn prctl(option: i32, ...) -> i32;
    }
    const PR_SET_PDEATHSIG: i32 = 1;
    const SIGKILL: u64 = 9;
    // SAFETY: it takes numbers.
    match unsafe { prctl(PR_SET_PDEATHSIG, SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Raises this process' limit of open files to what it may have: its tests run beside each other, some with hundreds of connections.
/// A limit is the process', not a test's: so it is only ever raised, and a program that is to have a lower one sets it for itself.
pub fn raise_files_limit() {
    #[repr(C)]
    struct Limit {
        current: u64,
        maximum: u64,
    }
    unsafe extern "C" {
        fn getrlimit(resource: i32, limit: *mut Limit) -> i32;
        fn setrlimit(resource: i32, limit: *const Limit) -> i32;
    }
    const RLIMIT_NOFILE: i32 = 7;
    let mut limit = Limit { current: 0, maximum: 0 };
    // SAFETY: the pointer is to a value of the layout that the system's headers have for 64 bits.
    let raised = unsafe {
        getrlimit(RLIMIT_NOFILE, &mut limit) == 0 && {
            limit.current = limit.maximum;
            setrlimit(RLIMIT_NOFILE, &limit) == 0
        }
    };
    assert!(raised, "raise the limit of open files: {}", io::Error::last_os_error());
}

/// What a program says, line by line, as it is said. Read to its end, so that the program never waits for us.
pub(crate) fn lines_of(stderr: ChildStderr) -> Lines {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            eprintln!("{line}");
            // Whoever waited may have heard enough.
            let _ = sender.send(line);
        }
    });
    Lines(lines)
}

/// See [`lines_of`].
pub(crate) struct Lines(Receiver<String>);

impl Lines {
    /// The next line; none if the program has ended.
    pub(crate) fn next(&self) -> Option<String> {
        use std::sync::mpsc::RecvTimeoutError;
        match self.0.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the program says nothing any more"),
        }
    }
}

/// Sends a signal, by its name without `SIG`.
pub(crate) fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().unwrap();
    assert!(sent.success(), "kill -{name}");
}
