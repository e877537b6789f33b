//! No message is lost while one server lives: short runs of what `examples/chaos` does for long.
//! And limits on those who connect: how many, how slow, how idle. They are in one file because both
//! wait most of the time, and tests of one file run side by side.

#[path = "../examples/chaos/kinds/mod.rs"]
mod kinds;
mod support;

use std::io::{self, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use kinds::Run;
use support::fake::{Fake, Manner};
use support::leased::{Answer, Leased};
use support::load::Load;
use support::stopwatch::Stopwatch;
use support::{BOUND, Peer, Program, binary, last_port, message, message_with, proxy, registered};

/// Runs one kind of harm for a while; it must show nothing that should not be.
fn survives(name: &str, length: Duration) {
    let (_, what, kind) = kinds::ALL.into_iter().find(|kind| kind.0 == name).expect("a kind");
    let run = Run {
        seed: 1,
        length,
        clients: 4,
        reply_timeout: Duration::from_secs(1),
        packet_timeout: Duration::from_secs(1),
        crowd: 200,
        slack: Duration::from_secs(2),
    };
    let outcome = kind(&run);
    assert!(outcome.broken.is_empty(), "{what}: {outcome:#?}");
}

#[test]
fn killing_servers_loses_no_message_while_one_lives() {
    survives("kill", Duration::from_secs(2));
}

#[test]
fn a_stopped_server_loses_no_message_and_comes_back_into_the_rotation() {
    survives("stop", Duration::from_secs(5));
}

#[test]
fn five_of_six_servers_that_hang_lose_no_message_and_come_back_into_the_rotation() {
    survives("hang", Duration::from_secs(5));
}

#[test]
fn workers_that_die_and_hang_carry_out_no_message_twice_that_is_for_once() {
    survives("once", Duration::from_secs(3));
}

#[test]
fn workers_that_die_and_hang_lose_no_message() {
    survives("repeat", Duration::from_secs(3));
}

#[test]
fn taking_servers_down_and_up_in_turn_is_invisible_to_clients() {
    survives("term", Duration::from_secs(2));
}

#[test]
fn clients_that_wait_lose_no_message_when_the_proxy_is_killed_and_restarted() {
    survives("restart", Duration::from_secs(3));
}

#[test]
fn misbehaving_servers_get_the_right_refusal_alone_and_do_no_harm_beside_a_good_one() {
    survives("misbehave", Duration::from_millis(1500));
}

#[test]
fn acks_too_many_reach_nobody() {
    survives("surplus", Duration::from_secs(1));
}

#[test]
fn servers_that_take_one_message_at_a_time_are_not_crowded() {
    survives("homework", Duration::from_secs(1));
}

#[test]
fn slow_senders_are_cut_and_disturb_nobody() {
    survives("slow", Duration::from_secs(1));
}

#[test]
fn a_proxy_out_of_descriptors_waits_without_haste_and_serves_again() {
    survives("descriptors", Duration::from_secs(1));
}

#[test]
fn a_proxy_whose_output_takes_nothing_keeps_serving() {
    survives("stdout", Duration::from_millis(900));
}

/// A proxy with 24 threads at the most. It runs as a user of its own, so that the limit counts no other
/// program's threads; only root can do that.
#[cfg(target_os = "linux")]
fn proxy_of_few_threads(test: u32) -> Option<(Program, u16)> {
    let user = 60_000 + 1000 * test + std::process::id() % 1000;
    let shell = |script: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(binary("revproc")).uid(user);
        command
    };
    if !shell("test -x \"$0\"").status().is_ok_and(|status| status.success()) {
        return None;
    }
    // Shells differ in the letter.
    let mut command = shell("ulimit -u 24 2>&- || ulimit -p 24; exec \"$0\" \"$@\"");
    command.args(["-port", "0", "-quiet"]);
    let program = Program::run(command);
    let port = last_port(&program.line("Running the reverse proxy on port "));
    Some((program, port))
}

/// Connects to a proxy until the system gives it no more threads.
#[cfg(target_os = "linux")]
fn take_all_threads(proxy: &(Program, u16)) -> Vec<TcpStream> {
    let has_no_more = || {
        let lines = proxy.0.err();
        lines.iter().any(|line| line.contains("could not start a thread for connections"))
    };
    let end = Instant::now() + BOUND;
    let mut taken = Vec::new();
    while !has_no_more() {
        assert!(Instant::now() < end, "there are always more threads");
        taken.push(TcpStream::connect(("127.0.0.1", proxy.1)).unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
    taken
}

#[test]
#[cfg(target_os = "linux")]
fn a_message_for_which_there_is_no_thread_has_its_time_and_no_more() {
    let Some(proxy) = proxy_of_few_threads(1) else { return };
    let silent = |id, policy| Leased::start(id, policy, proxy.1, |_| Answer::Skip);
    let silent = [silent("1", "PP_1"), silent("2", "PP_2")];
    let _good = Leased::start("3", "PP_3", proxy.1, |_| Answer::Ack);
    let mut client = Peer::connect(proxy.1);
    let mut held = Peer::connect(proxy.1);
    let _taken = take_all_threads(&proxy);
    for (server, policy) in silent.iter().zip(["PP_1", "PP_2"]) {
        held.send(message_with("50", policy, "x", r#""timeout": 3600"#));
        server.wait_for(1);
    }
    let since = Stopwatch::start();
    client.send(message_with("50", "PP_3", "x", r#""timeout": 1"#));
    assert_eq!(client.packet()["code"], "timeout");
    since.assert_between(Duration::from_millis(950)..Duration::from_secs(3));
}

#[test]
#[cfg(target_os = "linux")]
fn where_threads_are_few_a_busy_server_leaves_some_to_others() {
    let Some(proxy) = proxy_of_few_threads(2) else { return };
    let manner = Manner::Late(Duration::from_millis(5));
    let _busy = Fake::unleased("1", "PP_1", proxy.1, manner);
    let _other = Fake::unleased("2", "PP_2", proxy.1, manner);
    let mut client = Peer::connect(proxy.1);
    let load = Load::start(proxy.1, "PP_1", 8, Duration::ZERO);
    load.wait("acks", |account| account.acked > 50);
    let _taken = take_all_threads(&proxy);
    for _ in 0..5 {
        client.send(message("50", "PP_2", "x"));
        assert_eq!(client.packet()["srcid"], 2);
    }
    let account = load.finish();
    assert!(account.complaints().is_empty(), "{account:#?}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_proxy_that_is_given_few_threads_refuses_nothing_while_servers_die() {
    let Some(proxy) = proxy_of_few_threads(0) else { return };
    let port = proxy.1;
    let ids = ["1", "2", "3"];
    let mut servers = ids.map(|id| registered(id, "PP_1", &proxy, &["-quiet"]));
    let load = Load::start(port, "PP_1", 8, Duration::from_millis(1));
    load.wait("every server's acks", |account| account.by_server.len() == 3);
    let end = Instant::now() + Duration::from_secs(3);
    for which in (0..3).cycle().take_while(|_| Instant::now() < end) {
        servers[which].kill();
        let before = load.account().acked;
        load.wait("acks without it", |account| account.acked > before + 50);
        servers[which] = registered(ids[which], "PP_1", &proxy, &["-quiet"]);
    }
    let account = load.finish();
    assert!(account.complaints().is_empty(), "{account:#?}");
}

/// Sends a message, and returns how long after its answer the connection is closed.
fn idle_time(proxy: u16) -> Duration {
    let mut client = Peer::connect(proxy);
    client.send(message("50", "PP_1", "x"));
    assert_eq!(client.packet()["type"], 2);
    let since = Instant::now();
    assert_eq!(client.line(), "");
    since.elapsed()
}

#[test]
fn an_idle_client_is_closed_quietly() {
    let proxy = proxy(&["-idle-timeout", "300ms"]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let waited = idle_time(proxy.1);
    assert!(waited > Duration::from_millis(250) && waited < Duration::from_secs(3), "{waited:?}");
    assert_eq!(proxy.0.err(), [""; 0]);
}

#[test]
fn a_client_whose_answer_took_long_is_not_idle_before_it() {
    let proxy = proxy(&["-idle-timeout", "1"]);
    let late = Answer::Late(Duration::from_millis(1800));
    let _server = Leased::start("1", "PP_1", proxy.1, move |_| late);
    let waited = idle_time(proxy.1);
    assert!(waited > Duration::from_millis(850) && waited < Duration::from_secs(5), "{waited:?}");
}

#[test]
fn white_space_now_and_then_is_idle_too() {
    let proxy = proxy(&["-idle-timeout", "500ms"]);
    let client = Peer::connect(proxy.1);
    let mut stream = client.stream();
    let since = Stopwatch::start();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let nothing_came = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
    while stream.peek(&mut [0]).is_err_and(nothing_came) {
        since.assert_within(Duration::from_secs(3));
        // It may be closed meanwhile, and then this resets it.
        let _ = stream.write(b" ");
    }
    assert!(!matches!(stream.peek(&mut [0]), Ok(1)), "nothing is said");
}

#[test]
fn a_packet_that_comes_too_slowly_is_refused_though_each_byte_comes_soon() {
    let proxy = proxy(&["-packet-timeout", "500ms"]);
    let mut client = Peer::connect(proxy.1);
    let since = Stopwatch::start();
    client.stream().set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    while client.stream().peek(&mut [0]).is_err() {
        since.assert_within(Duration::from_secs(3));
        client.send("{");
    }
    client.stream().set_read_timeout(Some(BOUND)).unwrap();
    assert_eq!(client.packet()["code"], "timeout");
    assert_eq!(client.line(), "");
}

#[test]
fn connections_past_the_limit_wait_and_disturb_nobody() {
    let proxy = proxy(&["-max-connections", "2"]);
    // Its setup connection has a place of its own.
    let _server = registered("1", "PP_1", &proxy, &[]);
    let mut early = [(); 2].map(|()| Peer::connect(proxy.1));
    for client in &mut early {
        client.send(message("50", "PP_1", "x"));
        assert_eq!(client.packet()["destid"], 50);
    }
    let mut late = Peer::connect(proxy.1);
    late.send(message("51", "PP_1", "x"));
    late.stream().set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(late.stream().peek(&mut [0]).is_err(), "it should wait");
    late.stream().set_read_timeout(Some(BOUND)).unwrap();
    drop(early);
    assert_eq!(late.packet()["destid"], 51);
}

#[test]
fn a_client_that_does_not_read_its_answers_is_cut_after_ten_seconds() {
    let proxy = proxy(&["-quiet"]);
    let _server = registered("1", "PP_1", &proxy, &["-quiet"]);
    let client = TcpStream::connect(("127.0.0.1", proxy.1)).unwrap();
    // A refusal carries its client's id, and long ones fill the system's buffers soon.
    let burst = format!("{{\"type\":0,\"srcid\":\"{}\"}}", "5".repeat(256)).repeat(256);
    let mut sender = client.try_clone().unwrap();
    // Ends when the proxy closes the connection; until then the proxy's answers pile up.
    let sent = std::thread::spawn(move || {
        while std::io::Write::write_all(&mut sender, burst.as_bytes()).is_ok() {}
    });
    let since = Instant::now();
    sent.join().unwrap();
    let took = since.elapsed();
    // Filling the system's buffers comes before the ten seconds, and takes a while on a busy machine.
    assert!(took > Duration::from_secs(9) && took < Duration::from_secs(30), "{took:?}");
    let mut other = Peer::connect(proxy.1);
    other.send(message("51", "PP_1", "x"));
    assert_eq!(other.packet()["destid"], 51);
    drop(client);
}

/// Frames on the stack are larger without optimisation: then the figure is another.
#[test]
fn a_connection_that_is_idle_after_a_message_holds_12_kib() {
    const CONNECTIONS: usize = 500;
    let most = if cfg!(debug_assertions) { 28 << 10 } else { 12 << 10 };
    let proxy = proxy(&["-quiet", "-max-connections", "600"]);
    let _server = registered("1", "PP_1", &proxy, &["-quiet"]);
    let serve = |client: &mut Peer| {
        client.send(message("50", "PP_1", "x"));
        assert_eq!(client.packet()["destid"], 50);
    };
    serve(&mut Peer::connect(proxy.1));
    let before = proxy.0.memory("VmRSS");
    let mut clients: Vec<_> = (0..CONNECTIONS).map(|_| Peer::connect(proxy.1)).collect();
    clients.iter_mut().for_each(serve);
    let each = (proxy.0.memory("VmRSS") - before) / CONNECTIONS;
    println!("{each} bytes each");
    assert!(each <= most, "{each} bytes each");
}

#[test]
fn of_connections_that_have_gone_little_memory_stays() {
    const CONNECTIONS: usize = 2500;
    revproc::net::listener::raise_file_limit();
    let mut command = Command::new(binary("revproc"));
    command.args(["-port", "0", "-quiet", "-max-connections", "2600"]);
    // As on two CPUs: each has eight arenas, and each of these keeps some.
    command.env("MALLOC_ARENA_MAX", "16");
    let program = Program::run(command);
    let port = last_port(&program.line("Running the reverse proxy on port "));
    let proxy = (program, port);
    let _server = registered("1", "PP_1", &proxy, &["-quiet"]);
    let serve = || {
        let mut client = Peer::connect(proxy.1);
        client.send(message("50", "PP_1", "x"));
        assert_eq!(client.packet()["destid"], 50);
        client
    };
    drop(serve());
    let before = proxy.0.memory("VmRSS");
    drop((0..CONNECTIONS).map(|_| serve()).collect::<Vec<_>>());
    // Threads that wait for the next connection end after a few seconds.
    let end = Instant::now() + BOUND;
    loop {
        let each = proxy.0.memory("VmRSS").saturating_sub(before) / CONNECTIONS;
        if each <= 2560 {
            return;
        }
        assert!(Instant::now() < end, "{each} bytes of each stay");
        thread::sleep(Duration::from_millis(100));
    }
}
