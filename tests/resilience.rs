//! No message is lost while one server lives: short runs of what `examples/chaos` does for long.

#[path = "../examples/chaos/kinds/mod.rs"]
mod kinds;
mod support;

use std::time::Duration;

use kinds::Run;

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
    survives("stop", Duration::from_secs(9));
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
