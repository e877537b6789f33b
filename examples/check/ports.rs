//! Who listens on a port, and who is about to connect to one.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, connect, socket, sockopt};

use crate::hindrance;

/// Returns whether somebody listens on a port. Who listens is not disturbed: the handshake's last
/// segment is held back, and the connection reset, so that nothing is there to be accepted.
pub fn listens(port: u16) -> bool {
    let try_it = || {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        sockopt::set_tcp_quickack(&socket, false)?;
        sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
        connect(&socket, &SocketAddr::from(([127, 0, 0, 1], port)))
    };
    try_it().inspect_err(|error| hindrance::note_if_scarce(&(*error).into())).is_ok()
}

/// Returns whether somebody is about to connect to a port that does not answer.
pub fn is_connecting_to(port: u16) -> bool {
    let address = format!(":{port:04X}");
    let note = |error: &_| hindrance::note(format_args!("/proc/net/tcp: {error}"));
    let table = fs::read_to_string("/proc/net/tcp").inspect_err(note).unwrap_or_default()
        + &fs::read_to_string("/proc/net/tcp6").unwrap_or_default();
    // The columns: number, local address and port, remote ones, state, of which 02 is SYN-SENT.
    table.lines().any(|line| {
        let mut columns = line.split_ascii_whitespace().skip(2);
        columns.next().is_some_and(|remote| remote.ends_with(&address))
            && columns.next() == Some("02")
    })
}
