//! A command as a server's work: what it returns, how it fails, and that nothing of it is left behind.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use revproc::protocol::hash;
use rustix::process::{Pid, kill_process};
use serde_json::{Value, json};

use crate::support::stopwatch::Stopwatch;
use crate::support::{
    BOUND, Peer, Program, Signal, binary, last_port, message, message_with, proxy, registered,
};

/// A server with a command, whose processes are known by the server's id.
struct Worker {
    program: Program,
    port: u16,
    id: String,
}

impl Worker {
    /// Starts a server that nobody else knows, with these options and the command after `--`.
    fn start(name: &str, arguments: &[&str]) -> Self {
        Self::run(Command::new(binary("server")), name, arguments)
    }

    /// As [`start`](Self::start); `command` is the server or what becomes it.
    fn run(mut command: Command, name: &str, arguments: &[&str]) -> Self {
        let id = format!("{name}-{}", std::process::id());
        // Nobody is there, which does not matter to its clients here.
        command.args(["-id", &id, "-pp", "P", "-listen", "0", "-revproc", "127.0.0.1:1"]);
        let program = Program::run({
            command.args(arguments);
            command
        });
        let port = last_port(&program.line("Listening on port "));
        program.warning("could not connect to the reverse proxy");
        Worker { program, port, id }
    }

    /// One whose command is a shell that gets its script as the payload.
    fn shell(name: &str, options: &[&str]) -> Self {
        Self::start(name, &[options, &["--", "sh"]].concat())
    }

    /// Sends a message on a connection of its own.
    fn send(&self, payload: &str, more: &str) -> Peer {
        let mut peer = Peer::connect(self.port);
        peer.send(packet(payload, more));
        peer
    }

    fn reply(&self, payload: &str) -> Value {
        self.send(payload, "").packet()
    }

    fn result(&self, payload: &str) -> String {
        let ack = self.reply(payload);
        assert_eq!((&ack["type"], &ack["payload"]), (&2.into(), &hash(payload).into()), "{ack}");
        assert!(ack["encoding"].is_null(), "{ack}");
        ack["result"].as_str().unwrap_or_else(|| panic!("{ack}")).to_owned()
    }

    /// The reason of a refusal as `failed`, which is on the server's terminal, too.
    fn failure(&self, payload: &str) -> String {
        let refusal = self.reply(payload);
        let reason = assert_refused(&refusal, "failed");
        self.program
            .warning(&format!("server: refused the message of client 50 (failed): {reason}"));
        reason
    }

    /// The processes of this server's commands, and what they were called with. Zombies do not run.
    fn processes(&self) -> Vec<(Pid, String)> {
        let marker = format!("REVPROC_SERVER={}\0", self.id);
        let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let folder = entry.ok()?.path();
            let environment = fs::read(folder.join("environ")).ok()?;
            let environment = String::from_utf8_lossy(&environment).into_owned() + "\0";
            let called = fs::read(folder.join("cmdline")).ok()?;
            let pid = Pid::from_raw(folder.file_name()?.to_str()?.parse().ok()?)?;
            let is_ours = environment.contains(&marker) && !called.is_empty();
            is_ours.then(|| (pid, String::from_utf8_lossy(&called).into_owned()))
        });
        processes.collect()
    }

    fn running(&self) -> Vec<String> {
        self.processes().into_iter().map(|(_, called)| called).collect()
    }

    fn wait_for_running(&self, count: usize) {
        let end = Instant::now() + BOUND;
        while self.running().len() != count {
            assert!(Instant::now() < end, "{:?} run, not {count}", self.running());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It is killed, and does not end what it runs.
        self.program.kill();
        for (pid, _) in self.processes() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn packet(payload: &str, more: &str) -> String {
    let mut packet: Value = serde_json::from_str(&match more {
        "" => message("50", "P", ""),
        more => message_with("50", "P", "", more),
    })
    .unwrap();
    packet["payload"] = payload.into();
    packet["payloadsize"] = payload.len().into();
    packet.to_string()
}

fn assert_refused(refusal: &Value, code: &str) -> String {
    let fields = (&refusal["type"], &refusal["code"], &refusal["destid"]);
    assert_eq!(fields, (&3.into(), &code.into(), &50.into()), "{refusal}");
    refusal["payload"].as_str().unwrap().to_owned()
}

/// A folder of this test run's own.
fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("revproc-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).unwrap();
    folder
}

#[test]
fn what_a_command_writes_is_the_result_byte_for_byte() {
    let upper = Worker::start("upper", &["--", "tr", "a-z", "A-Z"]);
    for payload in ["hello", "", "two\nlines\r\n", "grüße \u{1f30d} \u{0} \"\\"] {
        assert_eq!(upper.result(payload), payload.to_ascii_uppercase());
    }
    upper.program.line("Sending a response to the client 50 payload: aaf4c61ddcc5e8a2dabede0f3b48");
    upper.program.line("Result for the client 50: HELLO");
    upper.program.line("Result for the client 50: TWO\\nLINES\\r\\n");
    assert_eq!(upper.program.complaints().len(), 1, "{}", upper.program.report());
    // What goes in and what comes out are both far more than a pipe holds.
    let long = "one of many words ".repeat(100_000);
    assert_eq!(upper.result(&long), long.to_uppercase());
    let shell = Worker::shell("binary", &[]);
    let ack = shell.reply(r"printf '\377\0\376'");
    assert_eq!((&ack["result"], &ack["encoding"]), (&"/wD+".into(), &"base64".into()));
    shell.program.line("Result for the client 50: (3 bytes)");
    for count in 1..6 {
        shell.reply(&format!("printf '\\377'; head -c {count} /dev/zero"));
        shell.program.line(&format!("Result for the client 50: ({} bytes)", count + 1));
    }
}

#[test]
fn a_command_behind_a_proxy_answers_its_clients() {
    let proxy = proxy(&["-quiet"]);
    let _servers = ["1", "2"].map(|id| registered(id, "P", &proxy, &["--", "tr", "a-z", "A-Z"]));
    let _strings = registered("3", "P", &proxy, &["-strings", "--", "tr", "a-z", "A-Z"]);
    let mut client = Peer::connect(proxy.1);
    client.send((0..30).map(|number| packet(&format!("n{number}"), "")).collect::<String>());
    let acks: Vec<_> = (0..30).map(|_| client.packet()).collect();
    for (number, ack) in acks.iter().enumerate() {
        assert_eq!(ack["result"], format!("N{number}"), "{ack}");
    }
    for id in [1, 2, 3] {
        assert!(acks.iter().any(|ack| ack["srcid"] == id), "{acks:#?}");
    }
}

#[test]
fn messages_of_one_client_are_at_work_at_once_behind_a_proxy() {
    let proxy = proxy(&["-quiet"]);
    let _server = registered("1", "P", &proxy, &["-at-once", "2", "--", "sh"]);
    let folder = folder("meeting");
    // Each waits for the other.
    let meet = |own: &str, other: &str| {
        let folder = folder.display();
        format!("cd {folder}; true >{own}; until [ -e {other} ]; do sleep 0.01; done; echo {own}")
    };
    let mut client = Peer::connect(proxy.1);
    client.send(packet(&meet("one", "two"), "") + &packet(&meet("two", "one"), ""));
    assert_eq!(client.packet()["result"], "one\n");
    assert_eq!(client.packet()["result"], "two\n");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_command_knows_its_message_from_its_environment() {
    let worker = Worker::shell("environment", &[]);
    let script = "echo $REVPROC_CLIENT $REVPROC_POLICY $REVPROC_SERVER ${REVPROC_MSGID-none}";
    assert_eq!(worker.result(script), format!("50 P {} none\n", worker.id));
    let ack = worker.send(script, r#""msgid": "a b""#).packet();
    assert_eq!(ack["result"], format!("50 P {} a b\n", worker.id));
    worker
        .program
        .line("Received a message from client 50 msgid a b payload: echo $REVPROC_CLIENT");
    // No environment can hold that.
    let refusal = worker.send(script, r#""msgid": "\u0000""#).packet();
    assert!(assert_refused(&refusal, "failed").contains("zero byte"), "{refusal}");
}

#[test]
fn a_command_that_fails_says_how_and_why() {
    let worker = Worker::shell("failing", &[]);
    for (script, expected) in [
        ("exit 3", "the command ended with exit code 3"),
        (
            "echo lost; echo first >&2; printf 'last\\n\\n' >&2; exit 1",
            "the command ended with exit code 1: last",
        ),
        ("echo why >&2; kill -9 $$", "the command was ended by SIGKILL: why"),
        ("kill -SEGV $$", "the command was ended by SIGSEGV"),
    ] {
        assert_eq!(worker.failure(script), expected);
    }
    assert_eq!(worker.result("echo still there"), "still there\n");
}

#[test]
fn what_a_command_says_on_standard_error_is_shown_as_it_comes_with_the_client_in_front() {
    let worker = Worker::shell("talking", &[]);
    let script = format!("printf 'at once\\n\\033[2J' >&2; sleep 1000; #{}", worker.id);
    let _client = worker.send(&script, r#""timeout": 100"#);
    worker.program.warning("server: client 50: at once");
    let quiet = Worker::shell("quiet", &["-quiet"]);
    assert_eq!(quiet.result("echo not shown >&2; echo shown"), "shown\n");
    assert_eq!(quiet.program.complaints().len(), 1, "{}", quiet.program.report());
    // Many lines are counted, and a line without an end comes in parts.
    let loud = Worker::shell("loud", &[]);
    let since = Instant::now();
    assert_eq!(
        loud.result("yes many | head -n 100000 >&2; yes | tr -d '\\n' | head -c 2500 >&2"),
        ""
    );
    loud.program.warning(" more like it)");
    // A hundred a second, and the first and the last second are no whole ones.
    let (lines, most) = (loud.program.err().len() as u64, 100 * (since.elapsed().as_secs() + 3));
    assert!(lines <= most, "{lines} lines, not {most}");
    worker.program.signal(Signal::INT);
    worker.program.warning("server: connections still open: 1;");
    worker.program.signal(Signal::INT);
    worker.wait_for_running(0);
}

#[test]
fn a_command_need_not_read_its_input() {
    let long = "x".repeat(3 << 20);
    for command in [&["true"][..], &["sh", "-c", "exec <&-; sleep 0.1; true"]] {
        let worker = Worker::start("unread", &[&["--"], command].concat());
        assert_eq!(worker.result(&long), "");
    }
    let worker = Worker::start("some", &["--", "head", "-c", "3"]);
    assert_eq!(worker.result(&long), "xxx");
}

#[test]
fn a_result_that_is_longer_than_a_packet_fails_and_is_not_kept() {
    let worker = Worker::shell("long", &["-max-packet", "64K"]);
    let expected = "its result is longer than a packet of 65536 bytes (-max-packet)";
    let since = Stopwatch::start();
    for script in [
        "yes",
        "head -c 1000000000 /dev/zero",
        "head -c 65536 /dev/zero | tr '\\0' x",
        // It is longer as it has to be written.
        "head -c 20000 /dev/zero",
        "head -c 50000 /dev/zero | tr '\\0' '\\377'",
    ] {
        assert_eq!(worker.failure(script), expected, "{script}");
    }
    assert_eq!(worker.result("head -c 65000 /dev/zero | tr '\\0' x").len(), 65000);
    since.assert_within(BOUND / 2);
    assert!(worker.program.memory("VmHWM") < 50 << 20);
    worker.wait_for_running(0);
}

#[test]
fn a_command_that_takes_too_long_is_ended_with_all_that_it_started() {
    let worker = Worker::shell("late", &["-run-timeout", "500ms"]);
    for script in ["sleep 1000", "sleep 1000 & sleep 1000 | cat; true", "exec >&- 2>&-; sleep 1000"]
    {
        let since = Stopwatch::start();
        assert_eq!(worker.failure(script), "the command took longer than 0.5 s", "{script}");
        since.assert_within(Duration::from_secs(5));
        worker.wait_for_running(0);
    }
    // Who does not mind being asked is killed.
    let stubborn = "trap '' TERM; sleep 1000 & sleep 1000; sleep 1000";
    assert_eq!(worker.failure(stubborn), "the command took longer than 0.5 s");
    worker.wait_for_running(0);
    // A message's own time is its command's, if that is shorter.
    let patient = Worker::shell("patient", &[]);
    let since = Stopwatch::start();
    let refusal = patient.send("sleep 1000", r#""timeout": 1"#).packet();
    assert_eq!(assert_refused(&refusal, "failed"), "the command took longer than 1 s");
    since.assert_between(Duration::from_millis(900)..Duration::from_secs(5));
    patient.wait_for_running(0);
}

#[test]
fn who_gives_a_message_a_time_learns_through_the_proxy_that_its_command_was_ended() {
    let proxy = proxy(&["-quiet"]);
    let _server = registered("1", "P", &proxy, &["--", "sh"]);
    // On a busy machine the answer may be late.
    let is_told = (0..5).any(|_| {
        let mut client = Peer::connect(proxy.1);
        client.send(packet("sleep 1000", r#""timeout": 2, "once": true"#));
        client.packet()["payload"] == "the command took longer than 2 s"
    });
    assert!(is_told);
}

#[test]
fn what_a_command_leaves_behind_keeps_nobody_waiting() {
    let worker = Worker::shell("leaving", &[]);
    let since = Stopwatch::start();
    assert_eq!(worker.result("sleep 1000 & echo done"), "done\n");
    since.assert_between(Duration::from_millis(900)..Duration::from_secs(4));
    let held = "what the command started held its output open after its end, and was killed";
    worker.program.warning(&format!("server: client 50: {held}"));
    worker.wait_for_running(0);
    // What comes a little later belongs to it, and what holds nothing open costs no time.
    assert_eq!(worker.result("(sleep 0.1; echo later) & echo now"), "now\nlater\n");
    let since = Stopwatch::start();
    assert_eq!(worker.result("sleep 1000 >/dev/null 2>&1 & echo done"), "done\n");
    since.assert_within(Duration::from_millis(900));
    worker.wait_for_running(0);
    let reason = "the command ended with exit code 1: alas";
    assert_eq!(worker.failure("sleep 1000 & echo alas >&2; exit 1"), reason);
    worker.wait_for_running(0);
}

#[test]
fn a_command_that_cannot_be_run_is_told_at_the_start() {
    for (command, reason) in [
        ("no-such-program", "is not in the PATH; give its path if it is elsewhere"),
        ("/no/such/program", "cannot be run: no such file or directory"),
        ("/etc/passwd", "is not executable"),
        ("/", "is no file"),
    ] {
        let line = ["-id", "1", "-pp", "P", "-listen", "0", "-revproc", "1", "--", command];
        let mut server = Program::start("server", &line);
        assert_eq!(server.end().code(), Some(2), "{}", server.report());
        let err = server.err().concat();
        assert!(err.starts_with("server: the command ") && err.ends_with(reason), "{err}");
        assert!(err.contains(command) && server.out().is_empty(), "{}", server.report());
    }
    // One that goes away later, its message is told.
    let folder = folder("gone");
    let program = folder.join("program");
    fs::copy("/bin/cat", &program).unwrap();
    let worker = Worker::start("gone", &["--", program.to_str().unwrap()]);
    assert_eq!(worker.result("x"), "x");
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(worker.failure("x"), "could not start the command: no such file or directory");
}

#[test]
fn a_command_has_no_descriptors_of_the_servers() {
    let worker = Worker::shell("descriptors", &[]);
    let _other = worker.send("sleep 1000", "");
    worker.wait_for_running(2);
    assert_eq!(worker.result("readlink /proc/$$/fd/* | grep socket; true"), "");
    let end = Instant::now() + BOUND;
    let idle = worker.program.descriptors();
    for _ in 0..20 {
        worker.result("true");
    }
    while worker.program.descriptors() > idle {
        assert!(Instant::now() < end, "{} are open, not {idle}", worker.program.descriptors());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_commands_options_are_its_own() {
    let worker = Worker::start("options", &["--", "printf", "%s\\n", "-text", "--", "-id"]);
    assert_eq!(worker.result(""), "-text\n--\n-id\n");
}

#[test]
fn of_a_thousand_messages_never_more_than_two_are_at_work_and_each_peers_in_order() {
    let folder = folder("at-once");
    // Which of two places is free, by creating a file that is not there yet.
    let script = r#"set -C; read -r text; cd "$0"
        { true >1 && place=1 || { true >2 && place=2; } || place=three; } 2>/dev/null
        echo "$text" >>order; echo "$place"; rm -f "$place""#;
    let command = ["-quiet", "-at-once", "2", "--", "sh", "-c", script, folder.to_str().unwrap()];
    let worker = Worker::start("at-once", &command);
    let (peers, count) = (5, 200);
    let mut places = thread::scope(|scope| {
        let clients: Vec<_> = (0..peers)
            .map(|client| {
                let port = worker.port;
                scope.spawn(move || {
                    let mut peer = Peer::connect(port);
                    let messages =
                        (0..count).map(|number| packet(&format!("{client} {number}\n"), ""));
                    peer.send(messages.collect::<String>());
                    let results = (0..count).map(|_| peer.packet()["result"].clone());
                    results.collect::<Vec<_>>()
                })
            })
            .collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    places.sort_by_key(Value::to_string);
    places.dedup();
    assert_eq!(places, ["1\n", "2\n"]);
    let order = fs::read_to_string(folder.join("order")).unwrap();
    for client in 0..peers {
        let own = order.lines().filter(|line| line.starts_with(&format!("{client} ")));
        assert!(own.eq((0..count).map(|number| format!("{client} {number}"))), "{order}");
    }
    // Nobody was served long before the others.
    let first = |client| order.lines().position(|line| line == format!("{client} 100")).unwrap();
    assert!((0..peers).all(|client| first(client) > 350), "{order}");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_message_whose_time_is_over_before_it_has_a_place_is_not_begun() {
    let worker = Worker::shell("full", &["-at-once", "1"]);
    let mut first = worker.send("sleep 1.5; echo first", "");
    worker.wait_for_running(2);
    let folder = folder("full");
    let begin = format!("true >{}/begun", folder.display());
    let mut late = worker.send(&begin, r#""timeout": 1"#);
    // Nor one that came with another, which is first.
    let mut behind = Peer::connect(worker.port);
    behind.send(packet("sleep 0.1", "") + &packet(&begin, r#""timeout": 1"#));
    let expected = "the 1 s of the message were over before its turn came";
    assert_eq!(assert_refused(&late.packet(), "timeout"), expected);
    assert_eq!(first.packet()["result"], "first\n");
    assert_eq!(worker.result("echo next"), "next\n");
    assert_eq!(behind.packet()["result"], "");
    assert_eq!(assert_refused(&behind.packet(), "timeout"), expected);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    fs::remove_dir_all(&folder).unwrap();
}

/// What a server with these arguments declares in its setup packet.
fn declared(arguments: &[&str]) -> Value {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let common = ["-id", "1", "-pp", "P", "-listen", "0", "-revproc", &port];
    let _server = Program::start("server", &[&common, arguments].concat());
    let mut setup = Peer::new(listener.accept().unwrap().0).packet();
    setup["capacity"].take()
}

#[test]
fn how_many_messages_at_once_is_declared() {
    let cores = thread::available_parallelism().unwrap().get();
    assert_eq!(declared(&[]), Value::Null);
    assert_eq!(declared(&["--", "cat"]), cores);
    assert_eq!(declared(&["-at-once", "3", "--", "cat"]), 3);
    assert_eq!(declared(&["-at-once", "3"]), 3);
    assert_eq!(declared(&["-strings", "-at-once", "3"]), "3");
}

#[test]
fn a_server_that_stops_lets_its_commands_finish() {
    let proxy = proxy(&["-quiet"]);
    let mut server = registered("1", "P", &proxy, &["-at-once", "2", "--", "sh"]);
    let mut clients = ["one", "two"].map(|word| {
        let mut client = Peer::connect(proxy.1);
        let script = format!("sleep 2; echo {word}");
        client.send(packet(&script, ""));
        server.line(&format!("Received a message from client 50 payload: {script}"));
        client
    });
    server.signal(Signal::TERM);
    proxy.0.warning("server 1 of privacy policy P");
    assert!(server.out().iter().all(|line| !line.starts_with("Sending")), "{}", server.report());
    assert_eq!(clients[0].packet()["result"], "one\n");
    assert_eq!(clients[1].packet()["result"], "two\n");
    assert!(server.end().success(), "{}", server.report());
    assert_eq!(server.err().last().unwrap(), "server: stopped");
}

#[test]
fn a_server_that_stops_serves_what_waits_for_a_place() {
    let mut worker = Worker::shell("last", &["-at-once", "1"]);
    let mut first = worker.send("sleep 1; echo first", "");
    worker.wait_for_running(2);
    let mut second = worker.send("echo second", "");
    worker.program.line("Received a message from client 50 payload: echo second");
    worker.program.signal(Signal::TERM);
    assert_eq!(first.packet()["result"], "first\n");
    assert_eq!(second.packet()["result"], "second\n");
    drop((first, second));
    assert!(worker.program.end().success(), "{}", worker.program.report());
}

#[test]
fn what_still_runs_when_the_time_to_stop_is_over_is_ended_and_refused() {
    let mut worker = Worker::shell("stopping", &["-at-once", "2", "-stop-timeout", "500ms"]);
    let mut running = worker.send("trap '' TERM; sleep 1000 & sleep 1000; sleep 1000", "");
    let mut asked = worker.send("trap 'echo asked >&2; exit' TERM; sleep 1000 & wait", "");
    worker.wait_for_running(5);
    let mut waiting = worker.send("echo never", "");
    worker.program.line("Received a message from client 50 payload: echo never");
    worker.program.signal(Signal::TERM);
    let since = Stopwatch::start();
    let stopped = "the server stopped before the command had ended";
    assert_eq!(assert_refused(&asked.packet(), "failed"), stopped);
    assert_eq!(assert_refused(&waiting.packet(), "overloaded"), "the server stops");
    assert_eq!(assert_refused(&running.packet(), "failed"), stopped);
    assert_eq!(worker.program.end().code(), Some(1));
    since.assert_within(Duration::from_secs(4));
    worker.wait_for_running(0);
    worker.program.warning("server: client 50: asked");
    let last = "server: stopped; messages still at work after 0.5 s, which were refused or cut: 2";
    assert_eq!(worker.program.err().last().unwrap(), last);
}

#[test]
fn a_second_signal_ends_a_server_at_once_and_leaves_nothing_behind() {
    let mut worker = Worker::shell("twice", &["-at-once", "8"]);
    let script = "trap '' TERM INT; sleep 1000 & sleep 1000";
    let _clients: Vec<_> = (0..8).map(|_| worker.send(script, "")).collect();
    worker.wait_for_running(24);
    worker.program.signal(Signal::INT);
    worker.program.warning("server: connections still open: 8;");
    worker.program.signal(Signal::INT);
    let since = Stopwatch::start();
    assert_eq!(worker.program.end().code(), Some(1));
    since.assert_within(Duration::from_secs(2));
    worker.wait_for_running(0);
}

#[test]
fn a_command_that_the_system_does_not_start_is_for_another_server() {
    let unlimited = Worker::start("unlimited", &["--", "cat"]);
    let end = Instant::now() + BOUND;
    while !unlimited.program.catches(Signal::TERM) {
        assert!(Instant::now() < end, "it does not watch for signals");
        thread::sleep(Duration::from_millis(1));
    }
    // A connection more, and then no room for three pipes.
    let limit = unlimited.program.descriptors() + 4;
    let limited = |name: &str, arguments: &[&str]| {
        let mut command = Command::new("sh");
        let script = format!("ulimit -n {limit}; exec \"$0\" \"$@\"");
        command.args(["-c", &script]).arg(binary("server"));
        Worker::run(command, name, arguments)
    };
    let worker = limited("short", &["--", "cat"]);
    let reason = assert_refused(&worker.reply("x"), "overloaded");
    assert_eq!(reason, "could not start the command: too many open files");
    let proxy = proxy(&["-quiet"]);
    let port = proxy.1.to_string();
    let short = limited("shorter", &["-revproc", &port, "--", "cat"]);
    short.program.warning("registered with");
    let _other = registered("2", "P", &proxy, &["--", "cat"]);
    for _ in 0..6 {
        let mut client = Peer::connect(proxy.1);
        client.send(packet("x", ""));
        let ack = client.packet();
        assert_eq!((&ack["srcid"], &ack["result"]), (&json!(2), &json!("x")), "{ack}");
    }
    short.program.warning("refused the message of client 50 (overloaded)");
}
