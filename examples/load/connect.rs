//! Connections, and where they come from.

use std::io;
use std::iter::Cycle;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, ipproto, sockopt};

use super::Mode;

/// The ports that fresh connections come from, one after another. They are below those that the
/// kernel hands out, which it would no longer hand out to others once they were bound here.
const SOURCE_PORTS: RangeInclusive<u16> = 1024..=32767;

/// Where a client's fresh connections come from: an address of its own, one port after another.
///
/// At thousands of connections a second the kernel's search for a port, among all those that wait
/// for late segments, would come to cost more than anything that is to be measured.
pub struct Sources {
    address: Ipv4Addr,
    ports: Cycle<RangeInclusive<u16>>,
}

impl Sources {
    /// None where connections are kept, or where addresses are not there for the taking.
    pub fn new(client: usize, mode: Mode, target: SocketAddr) -> Option<Self> {
        let is_plenty = target.is_ipv4() && target.ip().is_loopback();
        let client = u32::try_from(client).ok().filter(|_| mode.fresh && is_plenty)?;
        // A network for each process, so that several of them can run at once.
        let network = 1 + std::process::id() % 200;
        let address = Ipv4Addr::from_bits((127 << 24 | network << 16) + client);
        Some(Sources { address, ports: SOURCE_PORTS.cycle() })
    }

    fn bind(&mut self, socket: &OwnedFd) -> io::Result<()> {
        // Lets a port be taken whose last connection ended a while ago.
        sockopt::set_socket_reuseaddr(socket, true)?;
        for port in self.ports.by_ref().take(SOURCE_PORTS.len()) {
            match rustix::net::bind(socket, &SocketAddr::new(IpAddr::V4(self.address), port)) {
                Err(rustix::io::Errno::ADDRINUSE) => {}
                result => return Ok(result?),
            }
        }
        Err(io::ErrorKind::AddrInUse.into())
    }
}

/// Connects with all time limits set beforehand; the one for sending is also connect's.
pub fn connect(
    address: SocketAddr,
    sources: Option<&mut Sources>,
    timeout: Duration,
) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket(family, SocketType::STREAM, Some(ipproto::TCP))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(timeout))?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    if let Some(sources) = sources {
        sources.bind(&socket)?;
    }
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}

pub fn is_open(connection: &TcpStream) -> bool {
    let peeked = connection.set_nonblocking(true).and_then(|()| connection.peek(&mut [0]));
    matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}
