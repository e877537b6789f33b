//! Values that must come from the command line or from a message. Each is tried with two: one alone
//! could be written into the program.

use serde_json::Value;

use super::{Failure, Verdict, check_field};
use crate::bench::{Bench, CLIENT, PROXY, answer_with_ack, message_from};
use crate::sites::ServerSite;
use crate::support::peers::text;

/// Two servers' ids and policies.
pub const SERVERS: [(&str, &str); 2] = [("4711", "PP_7"), ("82", "PP_8")];

/// Two clients' ids.
pub const CLIENTS: [&str; 2] = ["73", "5012"];

const COMMAND_LINE: &str = "from the command line";

/// The first is needed; the second only tells more about a mistake that the first one shows.
type Two<T> = (T, Result<T, Failure>);

fn two<T>(start: impl Fn(usize) -> Result<T, Failure>) -> Result<Two<T>, Failure> {
    Ok((start(0)?, start(1)))
}

/// Case 1.1.
pub fn registers(bench: &Bench) -> Verdict {
    let (first, second) = two(|nth| ServerSite::start_as(bench, SERVERS[nth].0, SERVERS[nth].1))?;
    let other = second.as_ref().ok();
    let setups = [Some(&first.setup), other.map(|site| &site.setup)];
    check_field(&first.setup, "type", "1")?;
    check_follows("id", SERVERS.map(|(id, _)| id), setups, COMMAND_LINE)?;
    let name =
        ["privPolyId", "privPoliId"].into_iter().find(|name| first.setup.get(*name).is_some());
    let name = name.unwrap_or("privPolyId");
    check_follows(name, SERVERS.map(|(_, policy)| policy), setups, COMMAND_LINE)?;
    let ports = [first.given, other.map_or(0, |site| site.given)].map(|port| port.to_string());
    check_follows("listenport", [&ports[0], &ports[1]], setups, COMMAND_LINE)?;
    second.map(drop)
}

/// Case 1.4.
pub fn acks_as_itself(bench: &Bench) -> Verdict {
    let (first, second) = two(|nth| {
        let (id, policy) = SERVERS[nth];
        let site = ServerSite::start_as(bench, id, policy)?;
        Ok(site.ask(&message_from(&bench.dialect, CLIENT, policy, "hello"))?)
    })?;
    check_field(&first, "type", "2")?;
    let acks = [Some(&first), second.as_ref().ok()];
    check_follows("srcid", SERVERS.map(|(id, _)| id), acks, COMMAND_LINE)?;
    check_field(&first, "payloadsize", "40")?;
    second.map(drop)
}

/// Case 1.5.
pub fn acks_to_the_client(bench: &Bench) -> Verdict {
    let site = ServerSite::start(bench)?;
    let (first, second) = two(|nth| Ok(site.ask(&bench.message_from(CLIENTS[nth]))?))?;
    // Whether it takes a second message at all is for another case to say.
    check_follows("destid", CLIENTS, [Some(&first), second.as_ref().ok()], "from the message")
}

/// Case 1.9.
pub fn sends_its_file(bench: &Bench) -> Verdict {
    const IN_FILE: [&str; 2] = ["60", "61"];
    const TEXTS: [&str; 2] = ["Gr\u{fc}\u{df}e", "hello"];
    let policies = SERVERS.map(|(_, policy)| policy);
    let (first, second) = two(|nth| {
        let content = message_from(&bench.dialect, IN_FILE[nth], policies[nth], TEXTS[nth]);
        Ok(bench.client_as(CLIENTS[nth], &content, PROXY, answer_with_ack)?.packet)
    })?;
    let packets = [Some(&first), second.as_ref().ok()];
    check_field(&first, "type", "0")?;
    if check_field(&first, "srcid", IN_FILE[0]).is_ok() {
        return check_field(&first, "srcid", CLIENTS[0]).map_err(|failure| {
            Failure::because(
                failure.came,
                "It is the srcid of the packet file: the value from the command line, -id, is not used.",
            )
        });
    }
    check_follows("srcid", CLIENTS, packets, COMMAND_LINE)?;
    check_follows("privPoliId", policies, packets, "from the packet file")?;
    check_follows("payload", TEXTS, packets, "from the packet file")?;
    second.map(drop)
}

/// Checks a field that has one value after another, and says so where it is always the same.
pub fn check_follows(
    field: &str,
    expected: [&str; 2],
    packets: [Option<&Value>; 2],
    source: &str,
) -> Verdict {
    let pairs = packets.into_iter().flatten().zip(expected);
    let mut pairs = pairs.map(|(packet, expected)| check_field(packet, field, expected));
    let Some(failure) = pairs.find_map(Result::err) else { return Ok(()) };
    let values = packets.map(|packet| packet?.get(field).map(text));
    Err(match values {
        [Some(first), Some(second)] if first == second => Failure::because(
            failure.came,
            format!("It is always {first}: the value {source} is not used."),
        ),
        _ => failure,
    })
}
