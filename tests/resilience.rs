//! No message is lost while one server lives: short runs of what `examples/chaos` does for long.

use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::kinds::Run;
use crate::support::fake::{Fake, Manner};
use crate::support::leased::{Answer, Leased};
use crate::support::load::Load;
use crate::support::stopwatch::Stopwatch;
use crate::support::{BOUND, Peer, Program, binary, last_port, message, message_with, registered};

/// Runs one kind of harm for a while; it must show nothing that should not be.
fn survives(name: &str, length: Duration) {
    let (_, what, kind) =
        crate::kinds::ALL.into_iter().find(|kind| kind.0 == name).expect("a kind");
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
