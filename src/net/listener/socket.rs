//! Sockets that listen, and how many connections they can have.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::net::connection::SEND_TIMEOUT;
use crate::net::endpoint::at_first_address;

/// A thread that waited this long for a connection ends, unless only a few wait. Accepted sockets
/// inherit it as their read timeout, which saves a system call on each.
pub const WAIT: Duration = Duration::from_secs(5);

/// What the kernel may hold for us while all threads are busy (it takes the lower one of this and
/// `net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// Listens on `host`:`port`; port 0 takes any free one.
///
/// # Errors
///
/// If the host has no address, or the system does not let us listen there.
pub fn bind(host: &str, port: u16) -> io::Result<TcpListener> {
    at_first_address(host, port, bind_address)
}

/// As [`TcpListener::bind`], whose backlog of 128 is too short here, and with the options that accepted
/// sockets are to have: on Linux they inherit them.
fn bind_address(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let (kind, protocol) = (SocketType::STREAM, Some(ipproto::TCP));
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, protocol)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(WAIT))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(SEND_TIMEOUT))?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Allows this process as many open files as the system lets it have: each connection takes one.
pub fn raise_file_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    // If that is not allowed, the limit stays as it is, and the connections are fewer.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised);
}

/// The default limit on connections: half of the files that this process may open, since each
/// connection may need one more to a server, less what else is open.
pub fn default_max_connections() -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let files = files.and_then(|files| usize::try_from(files).ok()).unwrap_or(usize::MAX);
    (files.saturating_sub(16) / 2).clamp(1, 16_384)
}
