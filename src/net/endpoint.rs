//! Where a proxy is: a port, or a host and a port.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::time::Duration;

use crate::net::os_error::{is_local, reason};

/// The host of an endpoint that is only a port, and the one that is listened on by default.
pub const LOOPBACK: &str = "127.0.0.1";

/// A host and a port to connect to. Written as `PORT`, `HOST:PORT` or `[IPV6]:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// A name or an address, an IPv6 address without its brackets.
    pub host: String,
    /// From 1 to 65535.
    pub port: u16,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((scheme, rest)) = text.split_once("://") {
            let meant = rest.split('/').next().unwrap_or_default();
            return Err(format!("leave out \"{scheme}://\": give {meant}, as HOST:PORT or a port"));
        }
        let (host, port) = text.rsplit_once(':').unwrap_or((LOOPBACK, text));
        let in_brackets = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if in_brackets.is_none() && host.contains(':') {
            return Err("give an IPv6 address in brackets, as [ADDR]:PORT".to_owned());
        }
        let host = in_brackets.unwrap_or(host);
        match port.parse() {
            Ok(port) if port != 0 && !host.is_empty() => {
                Ok(Endpoint { host: host.to_owned(), port })
            }
            _ => Err("give a port from 1 to 65535, or HOST:PORT".to_owned()),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Endpoint {
    /// Connects to the first of the host's addresses that answers, within `timeout` each.
    ///
    /// # Errors
    ///
    /// The last address's, or that there is none.
    pub fn connect(&self, timeout: Duration) -> io::Result<TcpStream> {
        at_first_address(&self.host, self.port, |address| {
            let stream = TcpStream::connect_timeout(&address, timeout)?;
            // Where nobody listens on a port that the system gives to connections, it may connect
            // one to itself; that would keep the proxy from coming back there.
            if stream.local_addr()? == stream.peer_addr()? {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            Ok(stream)
        })
    }

    /// What to tell a person when the reverse proxy, which should be there, is not.
    pub fn not_reached(&self, error: &io::Error) -> String {
        let hint = if is_local(error) {
            "this host has nothing left for another one; see ulimit -n"
        } else if error.kind() == io::ErrorKind::NotFound {
            "is it written right?"
        } else {
            "is revproc running there?"
        };
        format!("could not connect to the reverse proxy at {self}: {} ({hint})", reason(error))
    }
}

/// Returns what `attempt` returns for the first of the host's addresses at which it succeeds. The host
/// may be a name.
///
/// # Errors
///
/// The last attempt's, or `NotFound` if the name is not known.
pub(crate) fn at_first_address<T>(
    host: &str,
    port: u16,
    mut attempt: impl FnMut(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    let addresses = (host, port).to_socket_addrs().map_err(|error| {
        if error.raw_os_error().is_some() {
            return error;
        }
        let full = error.to_string();
        let why = full.rsplit(": ").next().unwrap_or_default().to_lowercase();
        io::Error::new(io::ErrorKind::NotFound, format!("the host name was not found: {why}"))
    })?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in addresses {
        match attempt(address) {
            Ok(result) => return Ok(result),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether a connection to `address` reaches a socket that `listens` there.
pub(crate) fn is_reached(listens: IpAddr, address: IpAddr) -> bool {
    match listens.to_canonical() {
        // On Linux one socket takes both families, unless told otherwise.
        IpAddr::V6(every) if every.is_unspecified() => true,
        IpAddr::V4(every) if every.is_unspecified() => address.is_ipv4(),
        one => one == address,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn endpoint(host: &str, port: u16) -> Endpoint {
        Endpoint { host: host.to_owned(), port }
    }

    #[test]
    fn a_port_alone_is_on_this_host() {
        assert_eq!("2100".parse(), Ok(endpoint("127.0.0.1", 2100)));
    }

    #[test]
    fn what_is_said_of_a_proxy_that_was_not_reached_says_where_to_look() {
        let errors = [
            (io::ErrorKind::ConnectionRefused.into(), "is revproc running there?"),
            (rustix::io::Errno::MFILE.into(), "ulimit -n"),
            (io::ErrorKind::NotFound.into(), "is it written right?"),
        ];
        for (error, hint) in errors {
            let message = endpoint("127.0.0.1", 1).not_reached(&error);
            assert!(message.contains(hint), "{message}");
        }
    }

    #[test]
    fn endpoints_are_shown_as_they_are_written() {
        for (text, host, port) in [
            ("proxy.example:1", "proxy.example", 1),
            ("10.0.0.1:65535", "10.0.0.1", 65535),
            ("[::1]:2100", "::1", 2100),
        ] {
            let parsed: Endpoint = text.parse().unwrap();
            assert_eq!(parsed, endpoint(host, port));
            assert_eq!(parsed.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_endpoint_is_told_how_to_write_one() {
        for wrong in ["", "0", "65536", "-1", "host", "host:", "host:0", ":1", "[]:1", "1 "] {
            let error = wrong.parse::<Endpoint>().unwrap_err();
            assert_eq!(error, "give a port from 1 to 65535, or HOST:PORT", "{wrong:?}");
        }
        // Its last part is no port.
        for wrong in ["::1", "fe80::1:2100"] {
            let error = wrong.parse::<Endpoint>().unwrap_err();
            assert_eq!(error, "give an IPv6 address in brackets, as [ADDR]:PORT", "{wrong:?}");
        }
    }

    #[test]
    fn a_scheme_is_told_to_be_left_out() {
        for (wrong, meant) in [
            ("http://127.0.0.1:2100", "127.0.0.1:2100"),
            ("https://proxy.example:2100/page", "proxy.example:2100"),
            ("tcp://[::1]:2100", "[::1]:2100"),
        ] {
            let error = wrong.parse::<Endpoint>().unwrap_err();
            assert!(error.ends_with(&format!("give {meant}, as HOST:PORT or a port")), "{error}");
        }
    }

    #[test]
    fn connecting_goes_to_the_address_that_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        // The name may stand for an IPv6 address as well, on which nobody listens.
        let stream = endpoint("localhost", port).connect(Duration::from_secs(20)).unwrap();
        assert_eq!(stream.peer_addr().unwrap().port(), port);
    }

    #[test]
    fn a_failure_names_the_endpoint_and_a_remedy() {
        let error = io::Error::from_raw_os_error(rustix::io::Errno::CONNREFUSED.raw_os_error());
        assert_eq!(
            endpoint("::1", 5).not_reached(&error),
            "could not connect to the reverse proxy at [::1]:5: connection refused (is revproc \
             running there?)"
        );
    }

    #[test]
    fn a_server_is_reached_where_it_listens() {
        let reached = |listens: &str, address: &str| {
            is_reached(listens.parse().unwrap(), address.parse().unwrap())
        };
        for (listens, address) in [
            ("127.0.0.1", "127.0.0.1"),
            ("0.0.0.0", "192.0.2.1"),
            ("::", "192.0.2.1"),
            ("::", "fe80::1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
        ] {
            assert!(reached(listens, address), "{listens} {address}");
        }
        for (listens, address) in [
            ("127.0.0.1", "192.0.2.1"),
            ("127.0.0.1", "::1"),
            ("0.0.0.0", "::1"),
            ("::1", "127.0.0.1"),
            ("192.0.2.1", "192.0.2.2"),
        ] {
            assert!(!reached(listens, address), "{listens} {address}");
        }
    }
}
