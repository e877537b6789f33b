//! The switching table and the counts as JSON, for the page and for programs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::cli::escape::is_printable;
use crate::protocol::Code;
use crate::proxy::Proxy;
use crate::proxy::backend::Backend;
use crate::proxy::stats::{LatestMessages, ServerStats, Stats, unix_ms};
use crate::proxy::table::{Member, Server};

/// Returns the JSON document.
pub fn json(proxy: &Proxy) -> Vec<u8> {
    let stats = &proxy.dispatcher.events.stats;
    let (connections, connections_total) = proxy.listener.connections();
    let totals = stats.totals();
    let refusals = Code::ALL.iter().map(|(_, name)| *name).zip(totals.refusals);
    let refusals: BTreeMap<_, _> = refusals.filter(|(_, count)| *count > 0).collect();
    let document = json!({
        "name": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "state": if proxy.stop.has_begun() { "stopping" } else { "serving" },
        "listening": proxy.address().to_string(),
        "started_unix_ms": unix_ms(proxy.started),
        "now_unix_ms": unix_ms(SystemTime::now()),
        "totals": {
            "messages": totals.messages,
            "acks": totals.acks,
            "refusals": refusals,
            "in_flight": totals.in_flight,
            "retries": stats.retries.get(),
            "set_asides": stats.ejections.get(),
            "connections": connections,
            "connections_total": connections_total,
            "dropped_lines": proxy.dispatcher.events.terminal.dropped(),
        },
        "policies": policies(proxy, stats),
        "latest": stats.latest.as_ref().map(LatestMessages::all).unwrap_or_default(),
    });
    escaped(&document).into_bytes()
}

/// Returns compact JSON without unprintable characters. They stand only in strings, where JSON itself
/// requires an escape only below U+0020.
fn escaped(document: &Value) -> String {
    let mut json = String::new();
    for character in document.to_string().chars() {
        if is_printable(character) {
            json.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(json, "\\u{unit:04x}");
            }
        }
    }
    json
}

/// Returns the policies in the table, and the servers that left it with messages in flight.
fn policies(proxy: &Proxy, stats: &Stats) -> Vec<Value> {
    let now = Instant::now();
    // Before the servers: a message that waits has found them full.
    let waiting = proxy.dispatcher.table.waiting();
    let mut policies: BTreeMap<String, Vec<(String, Value)>> = BTreeMap::new();
    for (policy, members) in proxy.dispatcher.table.snapshot() {
        let first =
            |is_wanted: &dyn Fn(&Member<Backend>) -> bool| members.iter().position(is_wanted);
        let next = first(&|member| member.is_eligible(now) && member.has_room())
            .or_else(|| first(&|member| member.is_eligible(now)))
            .unwrap_or(0);
        let servers = members.iter().enumerate().map(|(index, member)| {
            let Server { id, handle, .. } = &*member.server;
            (id.clone(), row(id, handle.as_ref(), Some(member), index == next, now))
        });
        policies.insert(policy, servers.collect());
    }
    for ((policy, id), counts) in stats.servers() {
        if counts.in_flight() > 0 {
            let servers = policies.entry(policy).or_default();
            if servers.iter().all(|(known, _)| *known != id) {
                let row = row(&id, &counts, None, false, now);
                servers.push((id, row));
            }
        }
    }
    let policy = |(policy, servers): (String, Vec<_>)| {
        let waiting = waiting.get(&policy).copied().unwrap_or_default();
        let servers: Vec<Value> = servers.into_iter().map(|(_, row)| row).collect();
        json!({ "policy": policy, "waiting": waiting, "servers": servers })
    };
    policies.into_iter().map(policy).collect()
}

/// Returns a server; one that is no member of the table has left it.
fn row(
    id: &str,
    counts: &ServerStats,
    member: Option<&Member<Backend>>,
    is_next: bool,
    now: Instant,
) -> Value {
    let seconds = |time: Duration| time.as_secs_f64();
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    let ejected_until = member.and_then(|member| member.ejected_until);
    let capacity = member.and_then(|member| member.capacity);
    let (timed, sum) = counts.ack_times.total();
    json!({
        "id": id,
        "address": member.map(|member| member.server.address.to_string()),
        "lease": member.and_then(|member| member.lease).map(|held| json!({
            "seconds": held.lease.length.as_secs(),
            "age_seconds": seconds(now - held.since),
            "renewed_seconds_ago": seconds(now - held.renewed),
        })),
        "state": match (member, ejected_until) {
            (None, _) => "draining",
            (_, None) => "up",
            (_, Some(_)) => "set-aside",
        },
        "state_since_seconds": member.map(|member| seconds(now - member.state_since)),
        "set_aside_for_seconds": ejected_until
            .map(|until| seconds(until.saturating_duration_since(now))),
        "next": is_next,
        "messages": counts.sent.get(),
        "acks": counts.acked.get(),
        "failures": counts.failures().collect::<BTreeMap<_, _>>(),
        "in_flight": counts.in_flight(),
        "in_use": capacity.and(member).map(|member| member.in_use),
        "capacity": capacity,
        "mean_ack_ms": (timed > 0).then(|| millis(sum) / timed as f64),
        "p99_ack_ms": counts.ack_times.quantile(0.99).map(millis),
        "last_error": counts
            .last_error()
            .map(|(text, ago)| json!({ "text": text, "seconds_ago": seconds(ago) })),
    })
}
