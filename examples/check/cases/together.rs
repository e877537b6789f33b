//! The three programs together, with the checker between the client and the proxy.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::values::{CLIENTS, SERVERS};
use super::{Case, Failure, Rank, Role, Verdict, check_ack, check_field, expect};
use crate::bench::{Bench, message_from, wait_for};
use crate::fair;
use crate::ports::listens;
use crate::program::lock;
use crate::support::peers::text;
use crate::wire::Wire;

/// How long a registration is given to arrive where the checker cannot see it.
const REGISTRATION: Duration = Duration::from_millis(500);

/// The checker's two names in the notes, so that nobody takes it for one of the programs.
const TO_CLIENT: &str = "the checker (to the client)";
const TO_PROXY: &str = "the checker (to the proxy)";

pub const CASES: &[Case] = &[Case {
    number: "1.20",
    title: "the three programs work together",
    role: Role::All,
    rank: Rank::Required,
    needs: &["1.1", "1.3", "1.4", "1.5", "1.10", "1.14"],
    sent: "a proxy, a server and a client are started, in that order, with ids 4711 and 73 and the policy PP_7; ours stand in for those not given",
    expected: "the client gets the server's ack, with the right hash, srcid 4711 and destid 73, and ends",
    script: the_three_together,
    why: "Each passes its own cases, so look at where two of them differ: the spelling of a field, text or number, who closes a connection first.",
}];

fn the_three_together(bench: &Bench) -> Verdict {
    let ((id, policy), client) = (SERVERS[0], CLIENTS[0]);
    let proxy = bench.start_proxy()?;
    let (_, port) = bench.start_server_as(proxy, id, policy)?;
    wait_for(bench.clock.end(), || listens(port));
    fair::sleep(REGISTRATION);
    bench.clock.renew();
    // Between the client and the proxy, to see the ack.
    let acks = Arc::new(Mutex::new(Vec::new()));
    let (seen, clock) = (Arc::clone(&acks), bench.clock.clone());
    let message = message_from(&bench.dialect, client, policy, "hello");
    // Our client writes integers, which the tutorial's proxy does not know.
    let own = bench.setting.ours[Role::Client as usize].then(|| message.clone());
    let run = bench.client_as(client, &message, TO_CLIENT, move |wire, packet, _| {
        let message = own.clone().unwrap_or_else(|| packet.to_string());
        let ack = loop {
            let answer = Wire::connect(proxy, TO_PROXY, &clock).and_then(|mut onward| {
                onward.send(&message)?;
                onward.packet()
            });
            let is_ack = answer.as_ref().is_ok_and(|answer| text(&answer["type"]) == "2");
            if is_ack || fair::now() + REGISTRATION > clock.end() {
                break answer;
            }
            // The registration may still be on its way.
            fair::sleep(REGISTRATION);
        };
        lock(&seen).push(ack.clone());
        wire.send(ack?.to_string())
    })?;
    match lock(&acks).pop() {
        None => return Err(Failure::came("nothing: the client sent no message")),
        Some(Err(came)) => return Err(Failure::from(came).when("from the proxy")),
        Some(Ok(ack)) => {
            check_ack(&ack, "hello")?;
            check_field(&ack, "srcid", id)?;
            check_field(&ack, "destid", client)?;
        }
    }
    expect(run.status.is_some(), || "the ack, but the client does not end".to_owned())
}
