//! The three command lines: options, messages, exit codes, and the lines on the terminal.

use std::fs;
use std::io::Write;
use std::process::Command;

use revproc::protocol::hash;

use crate::support::http::watched;
use crate::support::peers::Reserved;
use crate::support::{
    Peer, Program, Signal, binary, client, message_with, proxy, registered, server,
};

/// A command line that is wrong, or one that the system says no to.
struct Wrong<'a> {
    line: &'a str,
    /// The first line on standard error, after the program's name.
    says: String,
    code: i32,
}

fn usage<'a>(line: &'a str, says: &str) -> Wrong<'a> {
    Wrong { line, says: says.to_owned(), code: 2 }
}

/// Runs the program, which must say so, print nothing else and end.
fn refuses(wrong: &Wrong<'_>) {
    let (name, arguments) = wrong.line.split_once(' ').unwrap_or((wrong.line, ""));
    let arguments: Vec<_> = arguments.split_whitespace().collect();
    let mut program = Program::start(name, &arguments);
    let status = program.end();
    let err = program.err();
    assert_eq!(err[0], format!("{name}: {}", wrong.says), "{}", program.report());
    assert_eq!(status.code(), Some(wrong.code), "{}", program.report());
    assert!(program.out().is_empty(), "{}", program.report());
}

#[test]
fn a_stray_word_is_told_with_what_it_may_have_been_meant_for() {
    for (line, tip) in [
        (
            "revproc 2100",
            "a value follows its option, as in -port 2100; put one with spaces in quotes",
        ),
        (
            "client -id 50 -revproc 1 -pp P -text hello world",
            "a value follows its option, as in -id 5; put one with spaces in quotes",
        ),
        (
            "server -id 1 -pp P -listen 0 -revproc 1 tr a-z A-Z",
            "a value follows its option, as in -id 5; put one with spaces in quotes, and -- in front of a command",
        ),
    ] {
        let mut words = line.split(' ');
        let name = words.next().unwrap();
        let mut program = Program::start(name, &words.collect::<Vec<_>>());
        assert_eq!(program.end().code(), Some(2), "{}", program.report());
        assert!(program.err().contains(&format!("  tip: {tip}")), "{}", program.report());
    }
}

#[test]
fn a_wrong_command_line_is_told_with_the_option_and_exits_with_2() {
    let port = "a port is a number from 1 to 65535, or 0 for any free one";
    let endpoint = "give a port from 1 to 65535, or HOST:PORT";
    let size = "give bytes such as 65536, or 64K, or 4M; from 256 bytes to 1G";
    let duration = "give seconds such as 5 or 2.5, or 300ms, or 2m; a day at most";
    for wrong in [
        usage("revproc -port 70000", &format!("invalid value '70000' for '-port <PORT>': {port}")),
        usage("revproc -port http", &format!("invalid value 'http' for '-port <PORT>': {port}")),
        usage("revproc --port=", &format!("invalid value '' for '-port <PORT>': {port}")),
        usage("revproc -port", "a value is required for '-port <PORT>' but none was supplied"),
        usage("revproc", "the following required arguments were not provided:"),
        usage("revproc -port 0 -prot 1", "unexpected argument '-prot' found"),
        usage("revproc -port 0 1", "unexpected argument '1' found"),
        usage(
            "revproc -port 0 -port 0",
            "the argument '-port <PORT>' cannot be used multiple times",
        ),
        usage(
            "revproc -port 0 -max-packet 1",
            &format!("invalid value '1' for '-max-packet <SIZE>': {size}"),
        ),
        usage(
            "revproc -port 0 -reply-timeout soon",
            &format!("invalid value 'soon' for '-reply-timeout <TIME>': {duration}"),
        ),
        usage(
            "revproc -port 0 -idle-timeout 0",
            "invalid value '0' for '-idle-timeout <TIME>': a timeout must be at least 1ms",
        ),
        usage(
            "revproc -port 0 -tries 0",
            "invalid value '0' for '-tries <N>': give a whole number from 1 to 1000000",
        ),
        usage(
            "revproc -port 0 -max-connections 100000000",
            "invalid value '100000000' for '-max-connections <N>': give a whole number from 1 to 1000000",
        ),
        usage(
            "server -id 1 -pp P -listen 127.0.0.1:2106 -revproc 1",
            "invalid value '127.0.0.1:2106' for '-listen <LPORT>': give the port alone, 2106, and the \
             address with -host 127.0.0.1",
        ),
        usage(
            "client -id 1 -revproc http://127.0.0.1:2100 -pkt x",
            "invalid value 'http://127.0.0.1:2100' for '-revproc <PORT>': leave out \"http://\": give \
             127.0.0.1:2100, as HOST:PORT or a port",
        ),
        usage(
            "revproc -port 0 -token-file /nowhere",
            "could not read the token file /nowhere: no such file or directory",
        ),
        usage("client -id= -revproc 1 -pkt x", "invalid value '' for '-id <ID>': it is empty"),
        usage("server -id 1 -pp= -listen 0", "invalid value '' for '-pp <PPID>': it is empty"),
        usage(
            &format!("server -id {} -pp P -listen 0", "x".repeat(257)),
            &format!(
                "invalid value '{}' for '-id <ID>': it has 257 bytes; 256 are allowed",
                "x".repeat(257)
            ),
        ),
        usage(
            "client -id 1 -revproc ::1 -pkt x",
            "invalid value '::1' for '-revproc <PORT>': give an IPv6 address in brackets, as [ADDR]:PORT",
        ),
        usage(
            "server -id 1 -pp P -listen 0",
            "the following required arguments were not provided:",
        ),
        usage(
            "server -id 1 -pp P -listen 70000 -revproc 1",
            &format!("invalid value '70000' for '-listen <LPORT>': {port}"),
        ),
        usage(
            "server -id 1 -pp P -listen 0 -revproc 70000",
            &format!("invalid value '70000' for '-revproc <RPPORT>': {endpoint}"),
        ),
        usage(
            "server -id 1 -pp P -listen 0 -revproc 0",
            &format!("invalid value '0' for '-revproc <RPPORT>': {endpoint}"),
        ),
        usage(
            "server -id 1 -pp P -listen 0 -revproc :1",
            &format!("invalid value ':1' for '-revproc <RPPORT>': {endpoint}"),
        ),
        usage(
            "client -id 1 -revproc localhost: -pkt x",
            &format!("invalid value 'localhost:' for '-revproc <PORT>': {endpoint}"),
        ),
        usage("client -id 1 -revproc 1", "the following required arguments were not provided:"),
        usage(
            "client -id 1 -revproc 1 -pkt nowhere.json",
            "could not read nowhere.json: no such file or directory",
        ),
        usage("client -id 1 -revproc 1 -pkt packets", "could not read packets: is a directory"),
        usage(
            "client -id 1 -revproc 1 -pp P",
            "the following required arguments were not provided:",
        ),
        usage(
            "client -id 1 -revproc 1 -text x",
            "the following required arguments were not provided:",
        ),
        usage(
            "client -id 1 -revproc 1 -pkt x -pp P -text x",
            "the argument '-pkt <PKTFILE>...' cannot be used with:",
        ),
        usage(
            "client -id 1 -revproc 1 -pp P -text x -timeout 1.5",
            "invalid value '1.5' for '-timeout <TIME>': give whole seconds, from 1, such as 20 or 2m",
        ),
        usage(
            "client -id 1 -revproc 1 -pp P -text x -msgid=",
            "invalid value '' for '-msgid <ID>': it is empty",
        ),
        usage(
            &format!("client -id 1 -revproc 1 -pp P -text x -msgid {}", "é".repeat(129)),
            &format!(
                "invalid value '{}' for '-msgid <ID>': it has 258 bytes; 256 are allowed",
                "é".repeat(129)
            ),
        ),
        usage(
            "client -id 1 -revproc 1 -msgid m -pkt packets/hello.json packets/hello.json",
            "-msgid is one message's number, but there are 2; give each packet a \"msgid\" of its own",
        ),
        usage(
            "client -id 1 -revproc 1 -pkt /dev/zero",
            "/dev/zero has more than 256 MiB; split it into several files",
        ),
        usage(
            "revproc -port 0 -token-file /dev/zero",
            "the first line of the token file /dev/zero, which is the token, is longer than 4096 bytes",
        ),
    ] {
        refuses(&wrong);
    }
}

#[test]
fn each_option_that_is_missing_is_named() {
    for (name, options) in [
        ("revproc", ["-port <PORT>"].as_slice()),
        ("server", &["-id <ID>", "-pp <PPID>", "-listen <LPORT>", "-revproc <RPPORT>"]),
        ("client", &["-id <ID>", "-revproc <PORT>", "-pkt <PKTFILE>..."]),
    ] {
        let mut program = Program::start(name, &[]);
        assert_eq!(program.end().code(), Some(2));
        let err = program.err();
        for option in options {
            assert!(err.contains(&format!("  {option}")), "{option}: {err:#?}");
        }
    }
}

#[test]
fn an_option_of_another_program_is_told_by_its_name_here() {
    for (line, tip) in [
        ("client -id 1 -port 2100 -pkt x", "-revproc"),
        ("server -id 1 -pp P -port 2100 -revproc 1", "-listen"),
        ("revproc -listen 2100", "-port"),
        ("client -id 1 -revproc 2100 -reply-timeout 2 -pkt x", "-timeout"),
    ] {
        let arguments: Vec<_> = line.split(' ').collect();
        let mut program = Program::start(arguments[0], &arguments[1..]);
        assert_eq!(program.end().code(), Some(2));
        let err = program.err();
        assert!(err[0].contains("unexpected argument '-"), "{err:#?}");
        let expected = format!("  tip: a similar argument exists: '{tip}'");
        assert!(err.contains(&expected), "{err:#?}");
    }
}

#[test]
fn a_port_for_the_proxy_and_its_page_is_told_with_both_options() {
    let reserved = Reserved::any();
    let line = format!("revproc -port {0} -status {0}", reserved.port);
    let says = format!(
        "-port and -status both ask for port {}; choose another one with -status, or 0 for any free one",
        reserved.port
    );
    refuses(&usage(&line, &says));
}

#[test]
fn a_host_name_that_is_not_known_is_told() {
    let mut client = Program::start(
        "client",
        &["-id", "1", "-revproc", "nohost.invalid:2100", "-pkt", "packets/hello.json"],
    );
    assert_eq!(client.end().code(), Some(1));
    let out = client.out();
    let begin = "Message not delivered: could not connect to the reverse proxy at \
                 nohost.invalid:2100: the host name was not found: ";
    assert!(out[0].starts_with(begin), "{out:#?}");
    assert!(out[0].ends_with(" (is it written right?)"), "{out:#?}");
    let mut proxy = Program::start("revproc", &["-port", "0", "-host", "nohost.invalid"]);
    assert_eq!(proxy.end().code(), Some(1));
    let err = proxy.err();
    assert!(err[0].ends_with(" (is it written right? see -host)"), "{err:#?}");
}

#[test]
fn a_reply_timeout_that_the_messages_time_cuts_short_is_told_at_the_start_and_in_the_refusal() {
    let limits = ["-reply-timeout", "60", "-message-timeout", "1", "-max-timeout", "1"];
    let (proxy, port) = proxy(&limits);
    assert_eq!(
        proxy.warning("-reply-timeout"),
        "revproc: -reply-timeout is 60 s, but a message has 1 s in all, which -message-timeout sets; \
         raise that, too, or give messages a time of their own (the client's -timeout)"
    );
    let silent = Reserved::any().listen();
    let mut setup = Peer::connect(port);
    setup.send(format!(
        r#"{{"type": 1, "id": 1, "privPolyId": "PP_1", "listenport": {}}}"#,
        silent.local_addr().unwrap().port()
    ));
    assert_eq!(setup.packet()["payload"], "registered");
    for (more, source) in [
        (r#""once": false"#, "-message-timeout of revproc"),
        (r#""timeout": 1"#, "its own timeout"),
        (r#""timeout": 2"#, "-max-timeout of revproc"),
    ] {
        let mut peer = Peer::connect(port);
        peer.send(message_with("50", "PP_1", "x", more));
        let refusal = peer.packet();
        let reason = refusal["payload"].as_str().unwrap();
        assert!(
            reason.ends_with(&format!("; the 1 s of the message are over ({source})")),
            "{reason}"
        );
    }
}

#[test]
fn a_port_that_is_taken_is_told_with_the_option_and_exits_with_1() {
    let (_proxy, port) = proxy(&[]);
    let taken = |option| {
        format!(
            "could not listen on 127.0.0.1 port {port}: address already in use (another program \
             listens there; choose another with {option}, or 0 for any free one)"
        )
    };
    let line = format!("revproc -port {port}");
    refuses(&Wrong { line: &line, says: taken("-port"), code: 1 });
    let line = format!("server -id 1 -pp P -listen {port} -revproc {port}");
    refuses(&Wrong { line: &line, says: taken("-listen"), code: 1 });
}

#[test]
fn an_address_that_is_not_this_machines_is_told_and_exits_with_1() {
    // An address for documentation, which no machine has.
    let says = "could not listen on 192.0.2.1 port 0: cannot assign requested address (this \
                machine has no such address; see -host)";
    let line = "revproc -port 0 -host 192.0.2.1";
    refuses(&Wrong { line, says: says.to_owned(), code: 1 });
}

/// One of our programs as a user without special rights, if this test can become one.
fn without_rights(name: &str) -> Option<Command> {
    if !rustix::process::geteuid().is_root() {
        return Some(Command::new(binary(name)));
    }
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let can = Command::new("setpriv").args(nobody).arg(binary(name)).arg("-help").output();
    if !can.is_ok_and(|output| output.status.success()) {
        return None;
    }
    let mut command = Command::new("setpriv");
    command.args(nobody).arg(binary(name));
    Some(command)
}

#[test]
fn a_port_that_takes_special_rights_is_told_with_the_option_and_exits_with_1() {
    // Some systems let everybody have every port.
    let limit = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let is_free = limit.is_ok_and(|limit| limit.trim() == "0");
    let Some(mut command) = without_rights("revproc").filter(|_| !is_free) else {
        // Not by println, which a test that passes is not heard by.
        let _ = writeln!(std::io::stderr(), "skipped: every port may be listened on here");
        return;
    };
    command.args(["-port", "1"]);
    let mut program = Program::run(command);
    assert_eq!(program.end().code(), Some(1), "{}", program.report());
    let says = "revproc: could not listen on 127.0.0.1 port 1: permission denied (ports below 1024 \
                take special rights; choose a higher one with -port)";
    assert_eq!(program.err(), [says]);
}

#[test]
fn help_names_every_option_with_one_dash_and_goes_to_standard_output() {
    for (name, options) in [
        (
            "revproc",
            "-port <PORT>; -host <ADDR>; -quiet; -timestamps; -max-packet <SIZE>; -max-memory <SIZE>; \
             -max-connections <N>; -max-per-address <N>; -max-servers <N>; -max-policies <N>; -connect-timeout <TIME>; \
             -reply-timeout <TIME>; -message-timeout <TIME>; -max-timeout <TIME>; -tries <N>; -idle-timeout <TIME>; \
             -packet-timeout <TIME>; -stop-timeout <TIME>; -stop-delay <TIME>; -per-server <N>; -status <PORT>; -token-file <FILE>",
        ),
        (
            "server",
            "-id <ID>; -pp <PPID>; -listen <LPORT>; -revproc <RPPORT>; -host <ADDR>; -quiet; -timestamps; \
             -strings; -max-packet <SIZE>; -max-connections <N>; -idle-timeout <TIME>; \
             -packet-timeout <TIME>; -token-file <FILE>; -at-once <N>; -run-timeout <TIME>; \
             -stop-timeout <TIME>",
        ),
        (
            "client",
            "-id <ID>; -revproc <PORT>; -pkt <PKTFILE>...; -pp <PPID>; -text <TEXT>; -timeout <TIME>; \
             -once; -msgid <ID>; -result; -quiet; -timestamps; -wait <TIME>; -max-packet <SIZE>",
        ),
    ] {
        for help in ["-help", "--help", "-h"] {
            let mut program = Program::start(name, &[help]);
            assert_eq!(program.end().code(), Some(0));
            let out = program.out();
            let lines = out.iter().filter(|line| line.trim().starts_with('-'));
            let named: Vec<_> = lines.filter_map(|line| line.trim().split("  ").next()).collect();
            assert_eq!(named.join("; "), format!("{options}; -h, -help; -V, -version"));
            // A command's own words come behind two dashes alone.
            let out = out.concat().replace("[-- <COMMAND>...]", "");
            assert!(!out.contains("--"), "{out}");
            assert!(program.err().is_empty(), "{}", program.report());
        }
    }
}

#[test]
fn the_version_is_the_packages() {
    for name in ["revproc", "server", "client"] {
        for version in ["-version", "--version", "-V"] {
            let mut program = Program::start(name, &[version]);
            assert_eq!(program.end().code(), Some(0));
            assert_eq!(program.out(), [format!("{name} {}", env!("CARGO_PKG_VERSION"))]);
        }
    }
}

#[test]
fn options_have_one_dash_or_two_and_their_values_follow_or_come_with_an_equals_sign() {
    let proxy = Program::start("revproc", &["--port=0", "--quiet"]);
    let port = proxy.line("Running the reverse proxy on port ");
    let port = port.rsplit(' ').next().unwrap();
    let equals = format!("-revproc={port}");
    let server = Program::start("server", &["--id", "1", "-pp=PP_1", "--listen=0", &equals]);
    server.line("Connecting to the reverse proxy");
    proxy.line("Receiving setup message from server id 1 privacy policy PP_1 ");
    for revproc in [[&equals, "-quiet"], ["--revproc", port]] {
        let arguments = [["-id=7", "--pkt=packets/hello.json"], revproc].concat();
        let mut client = Program::start("client", &arguments);
        assert_eq!(client.end().code(), Some(0), "{}", client.report());
    }
}

#[test]
fn a_proxy_can_be_on_another_host_and_the_first_that_answers_is_taken() {
    let (proxy, port) = proxy(&["-host", "127.0.0.1"]);
    let nobody = Reserved::any();
    let at_host = format!("127.0.0.1:{port}");
    let server = Program::start(
        "server",
        &["-id", "1", "-pp", "PP_1", "-listen", "0", "-revproc", &at_host],
    );
    server.line(&format!("Connecting to the reverse proxy on port {port}"));
    proxy.line("Receiving setup message from server id 1 privacy policy PP_1 ");
    let (status, out, _) = client(nobody.port, &["packets/hello.json"], &["-revproc", &at_host]);
    assert_eq!(status.code(), Some(0), "{out:#?}");
    assert!(out[0].ends_with(&format!(" running on port {port}")), "{out:#?}");
}

#[test]
fn a_server_that_is_started_before_its_proxy_waits_and_says_so() {
    let reserved = Reserved::any();
    let (server, server_port) = server("1", "PP_1", reserved.port, &[]);
    let waits = server.warning("trying again");
    assert_eq!(
        waits,
        format!(
            "server: could not connect to the reverse proxy at 127.0.0.1:{}: connection refused \
             (is revproc running there?); trying again until it is there",
            reserved.port
        )
    );
    let proxy = Program::start("revproc", &["-port", &reserved.port.to_string()]);
    proxy.line(&format!(
        "Receiving setup message from server id 1 privacy policy PP_1 port {server_port}"
    ));
    assert_eq!(server.complaints(), [waits], "it says so once");
    let (status, out, _) = client(reserved.port, &["packets/hello.json"], &[]);
    assert_eq!(status.code(), Some(0), "{out:#?}");
}

#[test]
fn a_client_says_once_how_to_start_a_server_of_its_policy() {
    let (_proxy, port) = proxy(&[]);
    let (status, out, err) = client(port, &["packets/hello.json"; 2], &[]);
    assert_eq!(status.code(), Some(1));
    let refused = "Message not delivered: no server serves privacy policy \"PP_1\"";
    assert_eq!(out.iter().filter(|line| *line == refused).count(), 2, "{out:#?}");
    let advice = format!("client: start one: server -id 1 -pp PP_1 -listen 0 -revproc {port}");
    assert_eq!(err, [advice]);
}

#[test]
fn a_client_at_the_status_page_is_told_so() {
    let watched = watched(&[]);
    let (status, out, _) = client(watched.status, &["packets/hello.json"], &["-wait", "20"]);
    assert_eq!(status.code(), Some(1));
    let expected = format!(
        "Message not delivered: what listens at 127.0.0.1:{} is no reverse proxy: this is HTTP, not a \
         JSON packet (is that the port of its -status page?)",
        watched.status
    );
    assert_eq!(out.last().unwrap(), &expected);
}

#[test]
fn a_client_names_the_option_that_its_waiting_ends_by() {
    let silent = Reserved::any().listen();
    let port = silent.local_addr().unwrap().port();
    let (status, out, _) = client(port, &["packets/hello.json"], &["-timeout", "1"]);
    assert_eq!(status.code(), Some(1));
    let expected = format!(
        "Message not delivered: the reverse proxy at 127.0.0.1:{port} gave no answer within 6 s \
         (-timeout)"
    );
    assert_eq!(out.last().unwrap(), &expected);
}

#[test]
fn a_client_can_wait_for_its_proxy_and_a_server() {
    let reserved = Reserved::any();
    let port = reserved.port.to_string();
    let arguments = ["-id", "50", "-revproc", &port, "-pkt", "packets/hello.json", "-wait", "20"];
    let mut client = Program::start("client", &arguments);
    client.warning("connection refused (is revproc running there?); trying again");
    let proxy = (Program::start("revproc", &["-port", &port]), reserved.port);
    proxy.0.warning("refused the message of client 50 (no-server)");
    let _server = registered("1", "PP_1", &proxy, &[]);
    assert_eq!(client.end().code(), Some(0), "{}", client.report());
    assert_eq!(client.out().last().unwrap(), "Hash of payload is correct");
}

/// What the homework's terminals show, with this test's ports and payload.
#[test]
fn the_terminals_show_the_homeworks_lines_in_order() {
    let proxy = proxy(&[]);
    let (server, listen) = server("100", "PP_1", proxy.1, &[]);
    proxy.0.line("Receiving setup message");
    let (_, out, err) = client(proxy.1, &["packets/hello.json"], &[]);
    let (port, hash) = (proxy.1, hash("hello"));
    assert_eq!(
        out,
        [
            &format!(
                "Sending message hello to privacy policy PP_1 through reverse proxy running on port {port}"
            ),
            &format!("Receiving a response from the server 100 payload: {hash}"),
            "Hash of payload is correct",
        ]
    );
    server.line("Sending a response");
    assert_eq!(
        server.out(),
        [
            "Server running with id 100",
            "Server serving privacy policy PP_1",
            &format!("Listening on port {listen}"),
            &format!("Connecting to the reverse proxy on port {port}"),
            "Received a message from client 50 payload: hello",
            &format!("Sending a response to the client 50 payload: {hash}"),
        ]
    );
    proxy.0.line("Forwarding a data message to client");
    assert_eq!(
        proxy.0.out(),
        [
            &format!("Running the reverse proxy on port {port}"),
            &format!(
                "Receiving setup message from server id 100 privacy policy PP_1 port {listen}"
            ),
            "Received a data message from client 50 privacy policy PP_1 payload: hello",
            "Forwarding a data message to server id 100 payload: hello",
            &format!("Received a data message from server id 100 payload: {hash}"),
            &format!("Forwarding a data message to client id 50 payload: {hash}"),
        ]
    );
    assert_eq!(
        [err, server.complaints(), proxy.0.err()].concat(),
        [""; 0],
        "nothing to complain of"
    );
}

#[test]
fn quiet_leaves_out_the_lines_about_single_messages() {
    let mut proxy = proxy(&["-quiet"]);
    let mut server = registered("1", "PP_1", &proxy, &["-quiet"]);
    let (status, out, err) = client(proxy.1, &["packets/hello.json"], &["-quiet"]);
    assert_eq!(status.code(), Some(0));
    assert_eq!([out, err].concat(), [""; 0]);
    for program in [&mut server, &mut proxy.0] {
        program.signal(Signal::TERM);
        assert_eq!(program.end().code(), Some(0), "{}", program.report());
        assert!(!program.out().iter().any(|line| line.contains("payload")), "{}", program.report());
    }
    assert_eq!(server.out().len(), 4, "{}", server.report());
    assert_eq!(proxy.0.out().len(), 2, "{}", proxy.0.report());
}

#[test]
fn each_line_has_the_time_in_front_where_that_is_asked_for() {
    let mut proxy = proxy(&["-timestamps"]);
    let mut server = registered("100", "PP_1", &proxy, &["-timestamps"]);
    let mut messages = Command::new(binary("client"));
    messages.args(["-id", "50", "-revproc", &proxy.1.to_string(), "-timestamps", "-pkt"]);
    messages.args(["packets/hello.json", "packets/homework.json"]);
    let mut client = Program::run(messages);
    assert_eq!(client.end().code(), Some(1));
    for program in [&mut server, &mut proxy.0] {
        program.signal(Signal::TERM);
        program.end();
    }
    for (program, lines, complaints) in [(&client, 5, 1), (&server, 6, 2), (&proxy.0, 7, 2)] {
        let said = [program.out(), program.err()];
        assert!(said[0].len() >= lines && said[1].len() >= complaints, "{}", program.report());
        for line in said.iter().flatten() {
            let (time, rest) = line.split_once("Z ").unwrap_or_else(|| panic!("no time: {line}"));
            let shape: String =
                time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
            assert_eq!(shape, "0000-00-00T00:00:00.000", "{line}");
            assert!(rest.starts_with(|c: char| c.is_ascii_alphabetic()), "{line}");
        }
        let are_in_order = said.iter().all(|lines| lines.is_sorted_by_key(|line| &line[..24]));
        assert!(are_in_order, "{}", program.report());
    }
}
