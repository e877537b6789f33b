//! The counts in Prometheus' text format, named by its conventions.

use std::collections::BTreeMap;

use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};
use prometheus::{Encoder, TextEncoder};

use crate::cli::escape::is_printable;
use crate::protocol::Code;
use crate::proxy::Proxy;
use crate::proxy::stats::{self, seconds_since_1970};

/// The media type of [`text`].
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Returns all metrics. The number of series is bounded, whatever clients send.
pub fn text(proxy: &Proxy) -> Vec<u8> {
    let stats = proxy.events().stats();
    let totals = stats.totals();
    let servers = stats.servers();
    let (connections, accepted) = proxy.connections();

    let mut acks: BTreeMap<_, _> = servers
        .iter()
        .map(|((policy, id), server)| ((policy.as_str(), id.as_str()), server.acked.get()))
        .collect();
    if stats.forgotten_acks() > 0 {
        // Added, because a server may have empty names too, and duplicate series are invalid.
        *acks.entry(("", "")).or_default() += stats.forgotten_acks();
    }
    let mut messages: Vec<Metric> = acks
        .into_iter()
        .map(|((policy, id), count)| {
            counter(&[("policy", policy), ("server", id), ("outcome", "ack")], count)
        })
        .collect();
    messages.extend(stats.policy_refusals().iter().map(|((policy, code), count)| {
        counter(&[("policy", policy), ("server", ""), ("outcome", code)], *count)
    }));
    let failures = servers.iter().flat_map(|((policy, id), server)| {
        server.failures().map(move |(kind, count)| {
            counter(&[("policy", policy), ("server", id), ("kind", kind)], count)
        })
    });
    let in_flight = servers.iter().map(|((policy, id), server)| {
        gauge(&[("policy", policy), ("server", id)], server.in_flight() as f64)
    });
    let waiting = proxy.waiting_messages().into_iter();
    let waiting = waiting.map(|(policy, count)| gauge(&[("policy", &policy)], count as f64));
    // A policy whose servers have all left is there with 0: an alert needs a number.
    let mut up: BTreeMap<_, _> =
        servers.iter().map(|((policy, _), _)| (policy.clone(), 0)).collect();
    for (policy, entries) in proxy.switching_table() {
        let count = entries.iter().filter(|entry| entry.ejected_until.is_none()).count();
        up.insert(policy, count);
    }
    let times = servers.iter().map(|((policy, id), server)| {
        histogram(&[("policy", policy), ("server", id)], &server.ack_times)
    });
    let by_code = |counts: [u64; Code::ALL.len()]| -> Vec<Metric> {
        let codes = Code::ALL.iter().zip(counts);
        codes.map(|(code, count)| counter(&[("code", code.name())], count)).collect()
    };

    let families = [
        counters(
            "revproc_messages_total",
            "Messages that ended, by how and at which server.",
            messages,
        ),
        counters(
            "revproc_received_messages_total",
            "Messages taken in.",
            vec![counter(&[], totals.messages)],
        ),
        gauges(
            "revproc_in_flight_messages",
            "Messages without an outcome yet.",
            vec![gauge(&[], totals.in_flight as f64)],
        ),
        counters(
            "revproc_refusals_total",
            "Messages that were refused, by code.",
            by_code(totals.refusals),
        ),
        counters(
            "revproc_packet_refusals_total",
            "Packets other than messages that were refused, by code.",
            by_code(stats.packet_refusals.each_ref().map(stats::Counter::get)),
        ),
        counters(
            "revproc_retries_total",
            "Messages that went to another server after one had failed them.",
            vec![counter(&[], stats.retries.get())],
        ),
        counters(
            "revproc_lost_replies_total",
            "Replies whose client had gone or did not read.",
            vec![counter(&[], stats.replies_lost.get())],
        ),
        counters(
            "revproc_set_asides_total",
            "Times that a server was set aside.",
            vec![counter(&[], stats.ejections.get())],
        ),
        counters(
            "revproc_server_failures_total",
            "Failures of a server, by kind.",
            failures.collect(),
        ),
        gauges(
            "revproc_server_in_flight_messages",
            "Messages that a server was sent and has not answered.",
            in_flight.collect(),
        ),
        gauges(
            "revproc_waiting_messages",
            "Messages that wait for a server to have a place, or to come back.",
            waiting.collect(),
        ),
        family(
            "revproc_ack_seconds",
            "From sending a message to a server to its ack.",
            MetricType::HISTOGRAM,
            times.collect(),
        ),
        gauges(
            "revproc_registered_servers",
            "Servers in the switching table.",
            vec![gauge(&[], proxy.servers() as f64)],
        ),
        gauges(
            "revproc_up_servers",
            "Servers of a policy that are in the switching table and not set aside.",
            up.iter().map(|(policy, count)| gauge(&[("policy", policy)], *count as f64)).collect(),
        ),
        counters(
            "revproc_registrations_total",
            "Setup packets that were accepted, by whether they were new or renewed a lease.",
            vec![
                counter(&[("outcome", "registered")], stats.registrations.get()),
                counter(&[("outcome", "renewed")], stats.renewals.get()),
            ],
        ),
        gauges(
            "revproc_connections",
            "Connections of clients and servers that are open.",
            vec![gauge(&[], connections as f64)],
        ),
        counters(
            "revproc_accepted_connections_total",
            "Connections that were accepted.",
            vec![counter(&[], accepted)],
        ),
        counters(
            "revproc_dropped_lines_total",
            "Terminal lines that could not be written.",
            vec![counter(&[], proxy.events().terminal().dropped())],
        ),
        gauges(
            "revproc_build_info",
            "The version that runs.",
            vec![gauge(&[("version", env!("CARGO_PKG_VERSION"))], 1.0)],
        ),
        gauges(
            "process_start_time_seconds",
            "When the process started, in seconds since 1970.",
            vec![gauge(&[], seconds_since_1970(stats.started.1))],
        ),
    ];
    let mut text = Vec::new();
    for family in families.iter().filter(|family| !family.get_metric().is_empty()) {
        TextEncoder::new()
            .encode(std::slice::from_ref(family), &mut text)
            .expect("every family here has a name and metrics, and a Vec takes every byte");
    }
    text
}

fn counters(name: &str, help: &str, metrics: Vec<Metric>) -> MetricFamily {
    family(name, help, MetricType::COUNTER, metrics)
}

fn gauges(name: &str, help: &str, metrics: Vec<Metric>) -> MetricFamily {
    family(name, help, MetricType::GAUGE, metrics)
}

fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn labelled(labels: &[(&str, &str)]) -> Metric {
    let pairs = labels.iter().map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value(escaped(value));
        pair
    });
    Metric::from_label(pairs.collect())
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

fn counter(labels: &[(&str, &str)], value: u64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value as f64);
    let mut metric = labelled(labels);
    metric.set_counter(counter);
    metric
}

fn gauge(labels: &[(&str, &str)], value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = labelled(labels);
    metric.set_gauge(gauge);
    metric
}

fn histogram(labels: &[(&str, &str)], times: &stats::Histogram) -> Metric {
    let buckets: Vec<Bucket> = times
        .cumulative()
        .into_iter()
        .map(|(end, count)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(end.as_secs_f64());
            bucket.set_cumulative_count(count);
            bucket
        })
        .collect();
    let mut histogram = Histogram::default();
    histogram.set_sample_count(buckets.last().map_or(0, Bucket::cumulative_count));
    histogram.set_sample_sum(times.total().1.as_secs_f64());
    histogram.set_bucket(buckets);
    let mut metric = labelled(labels);
    metric.set_histogram(histogram);
    metric
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
