//! Those who do harm by being many, and a system that gives no more.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

use super::{Outcome, POLICY, Run, comes};
use crate::support::load::Account;
use crate::support::{Peer, Program, binary, last_port, message, registered, server};

/// The proxy's share of a core while it cannot accept.
const STARVED_CPU: f64 = 0.05;

/// Many connections that send a byte a second, beside clients who must not notice.
pub fn slow(run: &Run) -> Outcome {
    let mut outcome = Outcome::default();
    // Both ends of every connection are on this machine, and programs inherit the limit.
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files })
        .expect("a process may use what it is allowed to");
    let proxy = run.proxy(0);
    let _server = registered("1", POLICY, &proxy, &["-quiet"]);
    let load = run.load(proxy.1);
    let mut crowd = crowd(proxy.1, run.crowd);
    let begun = Instant::now();
    while begun.elapsed() < run.packet_timeout {
        // One that was closed meanwhile is what is wanted.
        crowd.iter_mut().for_each(|stream| drop(stream.write_all(b"{")));
        thread::sleep(Duration::from_secs(1));
    }
    // The last ones began a little later.
    let end = begun + run.packet_timeout + Duration::from_secs(1) + run.slack;
    let open = crowd.iter().filter(|stream| !ends(stream, end)).count();
    outcome.expect(open == 0, || format!("{open} slow connections are still open"));
    outcome.expect_all_acked(load.finish(), Duration::from_secs(1) + run.slack);
    outcome.stop(proxy.0);
    outcome
}

/// A proxy that may open 64 files gets many connections; another may suddenly open no more at all.
pub fn descriptors(run: &Run) -> Outcome {
    let mut outcome = Outcome::default();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 64; exec \"$0\" \"$@\""]).arg(binary("revproc"));
    command.args(["-port", "0", "-quiet"]);
    let program = Program::run(command);
    let port = last_port(&program.line("Running the reverse proxy on port "));
    let proxy = (program, port);
    let _server = registered("1", POLICY, &proxy, &["-quiet"]);
    let mut early = Peer::connect(port);
    ask(&mut outcome, &mut early);
    let many = crowd(port, run.crowd);
    let share = cpu_share(&proxy.0, run.length);
    outcome.expect(share < STARVED_CPU, || format!("{share:.3} of a core with a crowd"));
    ask(&mut outcome, &mut early);
    drop(many);
    ask(&mut outcome, &mut Peer::connect(port));

    let other = run.proxy(0);
    let _server = registered("1", POLICY, &other, &["-quiet"]);
    let pid = Pid::from_raw(other.0.pid().cast_signed());
    let files = getrlimit(Resource::Nofile);
    let none = Rlimit { current: Some(3), ..files };
    prlimit(pid, Resource::Nofile, none).expect("our child's limit is ours to set");
    // Threads that wait in `accept` have a descriptor each already.
    let some = crowd(other.1, 20);
    other.0.warning("could not accept a connection");
    let share = cpu_share(&other.0, run.length);
    outcome.expect(share < STARVED_CPU, || format!("{share:.3} of a core with no descriptors"));
    let said = other.0.err().iter().filter(|line| line.contains("could not accept")).count();
    let most = 2 + run.length.as_secs() as usize;
    outcome.expect(said <= most, || format!("{said} lines about it in {:?}", run.length));
    drop(some);
    prlimit(pid, Resource::Nofile, files).expect("as before");
    ask(&mut outcome, &mut Peer::connect(other.1));

    let Account { sent, acked, .. } = outcome.account;
    outcome.expect(sent == acked, || format!("{acked} acks of {sent} messages"));
    outcome
}

/// One message more, and its ack.
fn ask(outcome: &mut Outcome, client: &mut Peer) {
    client.send(message("50", POLICY, "x"));
    outcome.account.sent += 1;
    outcome.account.acked += u64::from(client.packet()["type"] == 2);
}

/// Programs whose standard output and error take nothing.
pub fn stdout(run: &Run) -> Outcome {
    let mut outcome = Outcome::default();
    let full = || File::options().write(true).open("/dev/full").expect("Linux has it");
    let (reader, broken) = std::io::pipe().expect("a pipe");
    drop(reader);
    let (_stuck_reader, stuck) = std::io::pipe().expect("a pipe");
    let outputs: [(&str, [Stdio; 2]); 3] = [
        ("full", [full().into(), full().into()]),
        ("broken", [broken.try_clone().expect("a descriptor").into(), broken.into()]),
        ("stuck", [stuck.try_clone().expect("a descriptor").into(), stuck.into()]),
    ];
    let share = run.length / 3;
    for (name, [out, err]) in outputs {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        drop(listener);
        let child = Command::new(binary("revproc"))
            .args(["-port", &port.to_string()])
            .stdout(out)
            .stderr(err)
            .spawn()
            .expect("the proxy starts");
        let mut proxy = Mute(child);
        let listens =
            comes(Duration::from_secs(10), || TcpStream::connect(("127.0.0.1", port)).is_ok());
        outcome.expect(listens, || format!("with its output {name}, the proxy does not listen"));
        let server = server("1", POLICY, port, &["-quiet"]);
        let serves = comes(Duration::from_secs(10), || {
            let mut client = Peer::connect(port);
            client.send(message("50", POLICY, "x"));
            client.packet()["type"] == 2
        });
        outcome.expect(serves, || format!("with its output {name}, the proxy does not serve"));
        let load = run.load(port);
        thread::sleep(share);
        let account = load.finish();
        let complaints = account.complaints();
        outcome.broken.extend(complaints.iter().map(|said| format!("output {name}: {said}")));
        outcome.account.add(account);
        let running = proxy.0.try_wait().expect("our child").is_none();
        outcome.expect(running, || format!("with its output {name}, the proxy ended"));
        drop(server);
    }
    outcome
}

/// A program that is not listened to, killed when dropped.
struct Mute(Child);

impl Drop for Mute {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn crowd(port: u16, size: usize) -> Vec<TcpStream> {
    let connect = |_| TcpStream::connect(("127.0.0.1", port)).expect("the backlog is long enough");
    (0..size).map(connect).collect()
}

/// Whether the peer closes the connection before `end`.
fn ends(mut stream: &TcpStream, end: Instant) -> bool {
    let mut unwanted = [0; 1024];
    loop {
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left)).expect("not nothing");
        match stream.read(&mut unwanted) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

/// The share of a core that a program takes for a while.
fn cpu_share(program: &Program, length: Duration) -> f64 {
    // Fields 14 and 15 of `stat`, counted from behind the name; in hundredths of a second.
    let used = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", program.pid())).expect("it runs");
        let fields = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace();
        fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
    };
    let before = used();
    thread::sleep(length);
    (used() - before) / length.as_secs_f64()
}
