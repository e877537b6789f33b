//! Addresses other than 127.0.0.1: where one listens, and where the others connect to.

use std::io::Write;

use crate::support::{Program, last_port, proxy, registered, server};

#[test]
fn a_server_that_its_proxy_cannot_reach_says_so_at_the_start() {
    let (_proxy, port) = proxy(&[]);
    let (server, _) = server("1", "PP_1", port, &["-host", "127.0.0.2"]);
    assert_eq!(
        server.warning("will not reach"),
        format!(
            "server: the reverse proxy at 127.0.0.1:{port} will not reach this server: it connects to \
             127.0.0.1, and the server listens on 127.0.0.2 only; start it with -host 127.0.0.1, or \
             -host 0.0.0.0 for all addresses"
        )
    );
}

#[test]
fn a_server_that_its_proxy_reaches_says_nothing() {
    let proxy = proxy(&["-host", "[::]"]);
    for host in ["127.0.0.1", "0.0.0.0", "::", "[::]"] {
        let server = registered(host, "PP_1", &proxy, &["-host", host]);
        let warnings = server.err();
        assert!(!warnings.iter().any(|line| line.contains("reach this server")), "{warnings:#?}");
    }
}

#[test]
fn an_ipv6_address_may_be_given_in_brackets() {
    for host in ["[::1]", "::1"] {
        let proxy = Program::start("revproc", &["-port", "0", "-host", host]);
        let port = last_port(&proxy.line("Running the reverse proxy on port "));
        let revproc = format!("[::1]:{port}");
        let _server = Program::start(
            "server",
            &["-id", "1", "-pp", "PP_1", "-listen", "0", "-host", host, "-revproc", &revproc],
        );
        proxy.line("Receiving setup message from server id 1 ");
        let mut client = Program::start(
            "client",
            &["-id", "50", "-revproc", &revproc, "-pkt", "packets/hello.json"],
        );
        assert!(client.end().success(), "{}", client.report());
    }
}

/// A link-local address of this machine, with its scope, if it has one that may be bound.
fn link_local() -> Option<String> {
    let addresses = std::fs::read_to_string("/proc/net/if_inet6").ok()?;
    addresses.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (digits, interface) = (fields.first()?, fields.get(5)?);
        let address = std::net::Ipv6Addr::from_bits(u128::from_str_radix(digits, 16).ok()?);
        let address = format!("{address}%{interface}");
        let is_ours =
            digits.starts_with("fe80") && std::net::TcpListener::bind((&*address, 0)).is_ok();
        is_ours.then_some(address)
    })
}

#[test]
fn a_server_at_a_link_local_address_is_reached() {
    let Some(host) = link_local() else {
        // Not by println, which a test that passes is not heard by.
        let _ = writeln!(std::io::stderr(), "skipped: this machine has no link-local address");
        return;
    };
    let token = std::env::temp_dir().join(format!("token-of-addresses-{}", std::process::id()));
    std::fs::write(&token, "secret").unwrap();
    let common = ["-host", &host, "-token-file", token.to_str().unwrap()];
    let proxy = Program::start("revproc", &[&["-port", "0"], &common[..]].concat());
    let port = last_port(&proxy.line("Running the reverse proxy on port "));
    let revproc = format!("[{host}]:{port}");
    let options = ["-id", "1", "-pp", "PP_1", "-listen", "0", "-revproc", &revproc];
    let server = Program::start("server", &[&options, &common[..]].concat());
    proxy.line("Receiving setup message from server id 1 ");
    let mut client = Program::start(
        "client",
        &["-id", "50", "-revproc", &revproc, "-pkt", "packets/hello.json"],
    );
    assert!(client.end().success(), "{}\n{}", client.report(), proxy.report());
    assert!(!server.err().iter().any(|line| line.contains("reach this server")));
    std::fs::remove_file(&token).unwrap();
}
