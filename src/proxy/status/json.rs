//! The switching table and the counts as JSON, for the page and for programs.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::{Instant, SystemTime};

use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;

use crate::cli::escape::is_printable;
use crate::protocol::Code;
use crate::proxy::Proxy;
use crate::proxy::backend::Backend;
use crate::proxy::stats::{Latest, LatestMessages, ServerStats, Stats, unix_ms};
use crate::proxy::table::Member;

#[derive(Serialize)]
struct Document {
    name: &'static str,
    version: &'static str,
    state: &'static str,
    listening: String,
    started_unix_ms: u64,
    now_unix_ms: u64,
    totals: Totals,
    policies: Vec<Policy>,
    latest: Vec<Latest>,
}

#[derive(Serialize)]
struct Totals {
    messages: u64,
    acks: u64,
    refusals: BTreeMap<&'static str, u64>,
    in_flight: u64,
    retries: u64,
    set_asides: u64,
    connections: usize,
    connections_total: u64,
    dropped_lines: u64,
}

#[derive(Serialize)]
struct Policy {
    policy: String,
    waiting: usize,
    servers: Vec<Server>,
}

#[derive(Serialize)]
struct Server {
    id: String,
    address: Option<String>,
    lease: Option<Lease>,
    state: &'static str,
    state_since_seconds: Option<f64>,
    set_aside_for_seconds: Option<f64>,
    next: bool,
    messages: u64,
    acks: u64,
    failures: BTreeMap<&'static str, u64>,
    in_flight: u64,
    in_use: Option<u64>,
    capacity: Option<u64>,
    mean_ack_ms: Option<f64>,
    p99_ack_ms: Option<f64>,
    last_error: Option<LastError>,
}

#[derive(Serialize)]
struct Lease {
    seconds: u64,
    age_seconds: f64,
    renewed_seconds_ago: f64,
}

#[derive(Serialize)]
struct LastError {
    text: String,
    seconds_ago: f64,
}

/// Returns the JSON document.
pub fn json(proxy: &Proxy) -> Vec<u8> {
    let stats = &proxy.dispatcher.events.stats;
    let (connections, connections_total) = proxy.listener.connections();
    let totals = stats.totals();
    let refusals = Code::ALL.iter().map(|code| code.name()).zip(totals.refusals);
    let document = Document {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        state: if proxy.stop.has_begun() { "stopping" } else { "serving" },
        listening: proxy.address().to_string(),
        started_unix_ms: unix_ms(proxy.started),
        now_unix_ms: unix_ms(SystemTime::now()),
        totals: Totals {
            messages: totals.messages,
            acks: totals.acks,
            refusals: refusals.filter(|(_, count)| *count > 0).collect(),
            in_flight: totals.in_flight,
            retries: stats.retries.get(),
            set_asides: stats.ejections.get(),
            connections,
            connections_total,
            dropped_lines: proxy.dispatcher.events.terminal.dropped(),
        },
        policies: policies(proxy, stats),
        latest: stats.latest.as_ref().map(LatestMessages::all).unwrap_or_default(),
    };
    let mut json = Vec::new();
    document
        .serialize(&mut Serializer::with_formatter(&mut json, EscapingFormatter))
        .expect("a tree of numbers and strings with string keys");
    json
}

/// Writes compact JSON and escapes all unprintable characters; JSON itself requires that only below
/// U+0020.
struct EscapingFormatter;

impl Formatter for EscapingFormatter {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for part in fragment.split_inclusive(|character| !is_printable(character)) {
            let printable = part.trim_end_matches(|character| !is_printable(character));
            writer.write_all(printable.as_bytes())?;
            for unit in part[printable.len()..].encode_utf16() {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }
}

/// Returns the policies in the table, and the servers that left it with messages in flight.
fn policies(proxy: &Proxy, stats: &Stats) -> Vec<Policy> {
    let now = Instant::now();
    let mut waiting = proxy.dispatcher.table.waiting();
    let mut new_policy = |policy: String, servers| {
        let waiting = waiting.remove(&policy).unwrap_or_default();
        Policy { policy, waiting, servers }
    };
    let mut policies: Vec<Policy> = Vec::new();
    for (policy, members) in proxy.dispatcher.table.snapshot() {
        let first =
            |is_wanted: &dyn Fn(&Member<Backend>) -> bool| members.iter().position(is_wanted);
        let next = first(&|member| member.is_eligible(now) && member.has_room())
            .or_else(|| first(&|member| member.is_eligible(now)))
            .unwrap_or(0);
        let servers = members.iter().enumerate().map(|(index, member)| {
            let server = &member.server;
            Server {
                next: index == next,
                ..row(&server.id, server.handle.as_ref(), Some(member), now)
            }
        });
        policies.push(new_policy(policy, servers.collect()));
    }
    for ((policy, id), counts) in stats.servers() {
        if counts.in_flight() == 0 {
            continue;
        }
        let known = policies.iter_mut().find(|known| known.policy == policy);
        match known {
            Some(known) if known.servers.iter().any(|server| server.id == id) => {}
            Some(known) => known.servers.push(row(&id, &counts, None, now)),
            None => policies.push(new_policy(policy, vec![row(&id, &counts, None, now)])),
        }
    }
    policies
}

/// Returns a server; one that is no member of the table has left it.
fn row(id: &str, counts: &ServerStats, member: Option<&Member<Backend>>, now: Instant) -> Server {
    let ejected_until = member.and_then(|member| member.ejected_until);
    let capacity = member.and_then(|member| member.capacity);
    let (timed, sum) = counts.ack_times.total();
    Server {
        id: id.to_owned(),
        address: member.map(|member| member.server.address.to_string()),
        lease: member.and_then(|member| member.lease).map(|held| Lease {
            seconds: held.lease.length.as_secs(),
            age_seconds: (now - held.since).as_secs_f64(),
            renewed_seconds_ago: (now - held.renewed).as_secs_f64(),
        }),
        state: match (member, ejected_until) {
            (None, _) => "draining",
            (_, None) => "up",
            (_, Some(_)) => "set-aside",
        },
        state_since_seconds: member.map(|member| (now - member.state_since).as_secs_f64()),
        set_aside_for_seconds: ejected_until
            .map(|until| until.saturating_duration_since(now).as_secs_f64()),
        next: false,
        messages: counts.sent.get(),
        acks: counts.acked.get(),
        failures: counts.failures().collect(),
        in_flight: counts.in_flight(),
        in_use: capacity.and(member).map(|member| member.in_use),
        capacity,
        mean_ack_ms: (timed > 0).then(|| sum.as_secs_f64() * 1e3 / timed as f64),
        p99_ack_ms: counts.ack_times.quantile(0.99).map(|time| time.as_secs_f64() * 1e3),
        last_error: counts
            .last_error()
            .map(|(text, ago)| LastError { text, seconds_ago: ago.as_secs_f64() }),
    }
}
