//! The workers of `examples/`, which others are to copy.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use revproc::cli::terminal::Terminal;
use revproc::net::endpoint::LOOPBACK;
use revproc::net::listener;
use revproc::protocol::{Id, hash};
use revproc::server::{Message, Server, Settings, Stop};
use serde_json::Value;

use crate::support::{BOUND, Peer, Program, Signal, message, message_with, proxy, proxy_on};

/// The example in Rust, built as this test is.
fn rust_worker() -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    let profile = own.parent().and_then(Path::parent).expect("target/PROFILE/deps");
    let target = profile.parent().expect("target/PROFILE");
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--example", "worker", "--locked", "--quiet", "--target-dir"]).arg(target);
    if profile.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success(), "{build:?}");
    profile.join("examples/worker")
}

/// Starts Python with the example; `None` where there is none.
fn python_worker(proxy: u16) -> Option<Program> {
    let version = Command::new("python3").arg("--version").stdout(Stdio::null()).status();
    if !version.is_ok_and(|status| status.success()) {
        eprintln!("skipped: python3 is not installed");
        return None;
    }
    let mut command = Command::new("python3");
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/worker.py");
    command.arg(example).arg(proxy.to_string());
    let program = Program::run(command);
    program.line("registered for upper");
    Some(program)
}

/// Sends messages at once, on one connection, and checks that each has its answer, in order.
fn assert_works(proxy: u16) {
    let mut client = Peer::connect(proxy);
    let payloads: Vec<_> = (0..100).map(|number| format!("grüße {number} \\n\u{1f30d}")).collect();
    let messages = payloads.iter().map(|payload| message("50", "upper", payload));
    client.send(messages.collect::<Vec<_>>().join("\n \n"));
    for payload in payloads {
        let payload = payload.replace("\\n", "\n");
        let ack = client.packet();
        assert_eq!(ack["result"], payload.to_uppercase(), "{ack}");
        assert_eq!((&ack["payload"], &ack["destid"]), (&hash(&payload).into(), &50.into()));
    }
}

/// The reply to one message of this payload, with these further fields.
fn reply(proxy: u16, payload: &str, more: &str) -> Value {
    let mut client = Peer::connect(proxy);
    client.send(message_with("\"a client\"", "upper", payload, more));
    client.packet()
}

#[test]
fn the_worker_in_rust_works_and_ends_in_order() {
    let proxy = proxy(&["-quiet"]);
    let mut command = Command::new(rust_worker());
    command.arg(proxy.1.to_string());
    let mut worker = Program::run(command);
    worker.warning("worker: registered with the reverse proxy");
    assert_works(proxy.1);
    let refusal = reply(proxy.1, "", r#""msgid": "m-1""#);
    assert_eq!((&refusal["type"], &refusal["code"]), (&3.into(), &"failed".into()), "{refusal}");
    assert_eq!(refusal["payload"], "there is nothing to write in upper case");
    worker.line("Received a message from client a client msgid m-1 payload: ");
    worker.warning("worker: refused the message of client a client (failed): there is nothing");
    worker.signal(Signal::TERM);
    assert!(worker.end().success(), "{}", worker.report());
}

#[test]
fn a_handler_that_panics_fails_its_message_and_no_other() {
    let proxy = proxy(&["-quiet"]);
    let id = Id::from_text("1").into_owned();
    let endpoint = proxy.1.to_string().parse().unwrap();
    let settings =
        Settings { at_once: Some(1), ..Settings::new(id, Id::from_text("upper"), vec![endpoint]) };
    let work = |message: &Message<'_>| match message.payload {
        "none" => Ok(None),
        "bytes" => Ok(Some(vec![0xff])),
        "long" => Ok(Some(vec![b'x'; 8 << 20])),
        // A panic, whose trace nobody has to see.
        _ => resume_unwind(Box::new("it is odd")),
    };
    let socket = listener::bind(LOOPBACK, 0).unwrap();
    let server = Server::start_with(work, socket, settings, Terminal::new("server", true)).unwrap();
    proxy.0.line("Receiving setup message from server id 1 privacy policy upper");
    let mut client = Peer::connect(proxy.1);
    let messages = ["bytes", "odd", "none", "long", "bytes"];
    client.send(messages.map(|payload| message("50", "upper", payload)).concat());
    let replies = messages.map(|_| client.packet());
    for (reply, payload) in replies.iter().zip(messages) {
        match payload {
            "none" => assert!(reply["type"] == 2 && reply["result"].is_null(), "{reply}"),
            "bytes" => assert_eq!(
                (&reply["result"], &reply["encoding"]),
                (&"/w==".into(), &"base64".into())
            ),
            _ => assert_eq!(reply["code"], "failed", "{reply}"),
        }
    }
    assert_eq!(replies[1]["payload"], "the server's work panicked: it is odd");
    let too_long = "its result is longer than a packet of 4194304 bytes (-max-packet)";
    assert_eq!(replies[3]["payload"], too_long);
    server.stopper().send(Stop::Told).unwrap();
    server.run().unwrap();
}

#[test]
fn a_server_whose_work_does_not_end_does_not_say_that_it_has_stopped_in_order() {
    let settings = Settings {
        stop_timeout: Duration::from_millis(100),
        ..Settings::new(Id::from_text("1"), Id::from_text("upper"), vec![])
    };
    let (begun, begins) = channel();
    let (goes_on, is_over) = channel::<()>();
    let (begun, is_over) = (Mutex::new(begun), Mutex::new(is_over));
    let work = move |_: &Message<'_>| {
        begun.lock().unwrap().send(()).unwrap();
        let _ = is_over.lock().unwrap().recv_timeout(BOUND);
        Ok(None)
    };
    let socket = listener::bind(LOOPBACK, 0).unwrap();
    let server = Server::start_with(work, socket, settings, Terminal::new("server", true)).unwrap();
    let mut client = Peer::connect(server.address().port());
    client.send(message("50", "upper", "x"));
    begins.recv_timeout(BOUND).unwrap();
    server.stopper().send(Stop::Told).unwrap();
    let error = server.run().unwrap_err();
    assert_eq!(error, "stopped; messages still at work after 0.1 s, which were refused or cut: 1");
    drop(goes_on);
}

#[test]
fn the_worker_in_python_works_side_by_side_and_comes_back_to_its_proxy() {
    let mut first = proxy(&["-quiet"]);
    let Some(worker) = python_worker(first.1) else { return };
    thread::scope(|scope| {
        (0..4).for_each(|_| drop(scope.spawn(|| assert_works(first.1))));
    });
    let large = "x".repeat(1 << 20);
    assert_eq!(reply(first.1, &large, r#""once": true"#)["result"], large.to_uppercase());
    // Python converts no integer of more than 4300 digits, and reads no deeper than it may recurse.
    let long = format!(r#""x": {}"#, "9".repeat(5000));
    assert_eq!(reply(first.1, "long", &long)["result"], "LONG");
    let deep = format!(r#""x": {}{}"#, "[".repeat(100_000), "]".repeat(100_000));
    let refusal = reply(first.1, "deep", &deep);
    assert_eq!(
        (&refusal["code"], &refusal["payload"]),
        (&"bad-packet".into(), &"nested too deep".into())
    );
    assert_works(first.1);
    assert!(worker.err().is_empty(), "{}", worker.report());
    first.0.kill();
    let second = proxy_on(first.1, &["-quiet"]);
    let count = |out: &[String]| out.iter().filter(|line| line.starts_with("registered")).count();
    worker.wait("its registration", |out, _| (count(out) == 2).then_some(()));
    assert_works(second.1);
}
