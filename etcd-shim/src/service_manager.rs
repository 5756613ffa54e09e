//! Tells systemd how far this process is (`sd_notify(3)`), as etcd does: units with `Type=notify` wait for it, and kill what says nothing.
//!
//! One datagram to the socket that the environment names; nothing where it names none. A library would bring more than these lines.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// It serves.
pub const READY: &str = "READY=1";

/// It was told to stop, and does.
pub const STOPPING: &str = "STOPPING=1";

/// Says it, if somebody wants to hear. What goes wrong is logged: whoever serves goes on.
pub fn tell(what: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else { return };
    let told = || {
        let address = match socket.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&socket)?,
        };
        UnixDatagram::unbound()?.send_to_addr(what.as_bytes(), &address)
    };
    if let Err(error) = told() {
        tracing::warn!(%error, "tell the service manager");
    }
}
