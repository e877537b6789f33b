//! The counts in Prometheus' text format, named by its conventions.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};

use crate::cli::escape::is_printable;
use crate::protocol::Code;
use crate::proxy::Proxy;
use crate::proxy::stats::unix_ms;

/// The media type of [`text`].
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Returns all metrics. The number of series is bounded, whatever clients send.
pub fn text(proxy: &Proxy) -> Vec<u8> {
    let stats = &proxy.dispatcher.events.stats;
    let totals = stats.totals();
    let (connections, accepted) = proxy.listener.connections();
    let servers = stats.servers();
    let by_server = || {
        servers.iter().map(|((policy, id), server)| {
            ([("policy", policy.as_str()), ("server", id.as_str())], server)
        })
    };
    let mut text = Text::default();

    let mut acks: BTreeMap<_, _> =
        by_server().map(|(labels, server)| (labels, server.acked.get())).collect();
    if stats.forgotten_acks() > 0 {
        // Added, because a server may have empty names too, and duplicate series are invalid.
        *acks.entry([("policy", ""), ("server", "")]).or_default() += stats.forgotten_acks();
    }
    text.counter("revproc_messages_total", "Messages that ended, by how and at which server.");
    for ([policy, server], count) in acks {
        text.sample(&[policy, server, ("outcome", "ack")], count);
    }
    for ((policy, code), count) in stats.policy_refusals() {
        text.sample(&[("policy", &policy), ("server", ""), ("outcome", code)], count);
    }
    text.count("revproc_received_messages_total", "Messages taken in.", totals.messages);
    text.level("revproc_in_flight_messages", "Messages without an outcome yet.", totals.in_flight);
    text.counter("revproc_refusals_total", "Messages that were refused, by code.");
    for ((_, code), count) in Code::ALL.iter().zip(totals.refusals) {
        text.sample(&[("code", code)], count);
    }
    text.counter(
        "revproc_packet_refusals_total",
        "Packets other than messages that were refused, by code.",
    );
    for ((_, code), count) in Code::ALL.iter().zip(&stats.packet_refusals) {
        text.sample(&[("code", code)], count.get());
    }
    text.count(
        "revproc_retries_total",
        "Messages that went to another server after one had failed them.",
        stats.retries.get(),
    );
    text.count(
        "revproc_lost_replies_total",
        "Replies whose client had gone or did not read.",
        stats.replies_lost.get(),
    );
    text.count(
        "revproc_set_asides_total",
        "Times that a server was set aside.",
        stats.ejections.get(),
    );

    text.counter("revproc_server_failures_total", "Failures of a server, by kind.");
    for ([policy, id], server) in by_server() {
        for (kind, count) in server.failures() {
            text.sample(&[policy, id, ("kind", kind)], count);
        }
    }
    text.gauge(
        "revproc_server_in_flight_messages",
        "Messages that a server was sent and has not answered.",
    );
    for (labels, server) in by_server() {
        text.sample(&labels, server.in_flight());
    }
    text.gauge(
        "revproc_waiting_messages",
        "Messages that wait for a server to have a place, or to come back.",
    );
    for (policy, count) in proxy.dispatcher.table.waiting() {
        text.sample(&[("policy", &policy)], count);
    }
    text.metric(
        "histogram",
        "revproc_ack_seconds",
        "From sending a message to a server to its ack.",
    );
    for (labels @ [policy, id], server) in by_server() {
        let mut count = 0;
        for (end, shorter) in server.ack_times.cumulative() {
            let end = end.as_secs_f64().to_string();
            text.part("_bucket", &[policy, id, ("le", &end)], shorter);
            count = shorter;
        }
        text.part("_bucket", &[policy, id, ("le", "+Inf")], count);
        text.part("_sum", &labels, server.ack_times.total().1.as_secs_f64());
        text.part("_count", &labels, count);
    }

    text.level("revproc_registered_servers", "Servers in the switching table.", proxy.servers());
    text.gauge(
        "revproc_up_servers",
        "Servers of a policy that are in the switching table and not set aside.",
    );
    // A policy whose servers have all left is there with 0: an alert needs a number.
    let mut up: BTreeMap<_, _> =
        servers.iter().map(|((policy, _), _)| (policy.clone(), 0)).collect();
    for (policy, entries) in proxy.dispatcher.table.snapshot() {
        let count = entries.iter().filter(|entry| entry.ejected_until.is_none()).count();
        up.insert(policy, count);
    }
    for (policy, count) in up {
        text.sample(&[("policy", &policy)], count);
    }
    text.counter(
        "revproc_registrations_total",
        "Setup packets that were accepted, by whether they were new or renewed a lease.",
    );
    text.sample(&[("outcome", "registered")], stats.registrations.get());
    text.sample(&[("outcome", "renewed")], stats.renewals.get());
    text.level(
        "revproc_connections",
        "Connections of clients and servers that are open.",
        connections,
    );
    text.count("revproc_accepted_connections_total", "Connections that were accepted.", accepted);
    text.count(
        "revproc_dropped_lines_total",
        "Terminal lines that could not be written.",
        proxy.dispatcher.events.terminal.dropped(),
    );
    text.gauge("revproc_build_info", "The version that runs.");
    text.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    text.level(
        "process_start_time_seconds",
        "When the process started, in seconds since 1970.",
        unix_ms(proxy.started) as f64 / 1e3,
    );
    text.text.into_bytes()
}

/// Metrics one after another, each with its samples.
#[derive(Default)]
struct Text {
    text: String,
    /// The metric that the samples are of.
    name: &'static str,
}

impl Text {
    /// Adds a counter that has one sample.
    fn count(&mut self, name: &'static str, help: &str, value: u64) {
        self.counter(name, help);
        self.sample(&[], value);
    }

    /// Adds a gauge that has one sample.
    fn level(&mut self, name: &'static str, help: &str, value: impl Display) {
        self.gauge(name, help);
        self.sample(&[], value);
    }

    fn counter(&mut self, name: &'static str, help: &str) {
        self.metric("counter", name, help);
    }

    fn gauge(&mut self, name: &'static str, help: &str) {
        self.metric("gauge", name, help);
    }

    fn metric(&mut self, kind: &str, name: &'static str, help: &str) {
        self.name = name;
        self.text += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.part("", labels, value);
    }

    /// Adds a sample of the series that a histogram has for each suffix.
    fn part(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        self.text.extend([self.name, suffix]);
        for (index, (label, value)) in labels.iter().enumerate() {
            self.text.extend([if index == 0 { "{" } else { "," }, label, "=\""]);
            // Escaped once more as the format wants it.
            self.text += &escaped(value).replace('\\', r"\\").replace('"', "\\\"");
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, " {value}");
    }
}

/// Escapes unprintable characters in a label's value; the format itself escapes only line breaks,
/// quotes and backslashes. Backslashes are escaped here too, so that different values stay
/// different: duplicate series are invalid.
fn escaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for character in value.chars() {
        if is_printable(character) && character != '\\' {
            text.push(character);
        } else {
            text.extend(character.escape_default());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::escaped;

    #[test]
    fn what_is_not_printable_is_escaped_and_different_values_stay_different() {
        assert_eq!(escaped("PP_1 \"é\""), "PP_1 \"é\"");
        assert_eq!(escaped("\n\u{9b}"), r"\n\u{9b}");
        assert_eq!(escaped(r"\n\u{9b}"), r"\\n\\u{9b}");
    }
}
