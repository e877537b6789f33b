//! What must hold for any bytes, on bytes from several sources. `tests/fuzz` looks for others.

use std::borrow::Cow;

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use revproc::protocol::{Ack, Data, Id, Packet, Refusal, Setup};
use serde_json::Value;

use crate::invariants::{framer_agrees_with_serde_json, packet_is_right_or_refused, survives};
use crate::support::mutation::{RIGHT, Random, mutated};

fn id() -> impl Strategy<Value = Id<'static>> {
    prop_oneof![
        any::<i64>().prop_map(|number| Id::Integer(number.into())),
        any::<i128>().prop_map(Id::Integer),
        "-?[1-9][0-9]{40,254}".prop_map(|digits| Id::from_text(&digits).into_owned()),
        text().prop_map(Id::Text),
    ]
}

fn text() -> impl Strategy<Value = Cow<'static, str>> {
    prop_oneof![any::<String>(), "[\"\\\\{}\u{0}-\u{1f}\u{7f}-\u{9f}🦀\u{202e}]{0,20}"]
        .prop_map(Cow::Owned)
}

fn packet() -> impl Strategy<Value = Packet<'static>> {
    let from_one = || option::of(1_u64..);
    prop_oneof![
        (id(), id(), text(), from_one(), any::<bool>(), option::of(text())).prop_map(
            |(srcid, policy, payload, timeout, once, msgid)| {
                let data = Data::new(srcid, policy, payload);
                Packet::Data(Data { timeout, once, msgid, ..data })
            }
        ),
        (id(), id(), 1_u16.., any::<Option<u64>>(), from_one(), option::of(text())).prop_map(
            |(id, policy, port, lease, capacity, token)| {
                Packet::Setup(Setup { lease, capacity, token, ..Setup::new(id, policy, port) })
            }
        ),
        (id(), id(), text(), any::<Option<u64>>(), option::of(text()), option::of(text()))
            .prop_map(|(srcid, destid, payload, lease, result, encoding)| {
                Packet::Ack(Ack { lease, result, encoding, ..Ack::new(srcid, destid, payload) })
            }),
        (id(), text(), text()).prop_map(|(destid, reason, code)| {
            Packet::Refusal(Refusal { destid, reason, code })
        }),
    ]
}

/// Any JSON object, compact or spread over lines.
fn object() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text().prop_map(|text| Value::from(&*text)),
    ];
    let value = leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Value::from),
            btree_map(text(), inner, 0..6).prop_map(|map| map
                .into_iter()
                .map(|(key, value)| (key.into_owned(), value))
                .collect()),
        ]
    });
    (btree_map(text(), value, 0..4), any::<bool>()).prop_map(|(map, pretty)| {
        let value: Value = map.into_iter().map(|(key, value)| (key.into_owned(), value)).collect();
        if pretty { serde_json::to_string_pretty(&value).unwrap() } else { value.to_string() }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_our_writer_writes_our_reader_reads_back_equal(packet in packet()) {
        survives(&packet);
    }

    #[test]
    fn objects_are_cut_where_serde_json_cuts_them(
        objects in vec(object(), 0..5),
        between in "[ \t\r\n]{0,3}",
        pieces in vec(1_usize..40, 1..10),
        limit in 1_usize..400,
    ) {
        let stream = objects.join(&between) + &between;
        for limit in [limit, usize::MAX] {
            let mut pieces = pieces.iter().copied().cycle();
            framer_agrees_with_serde_json(stream.as_bytes(), limit, || pieces.next().unwrap_or(1));
        }
        for object in &objects {
            packet_is_right_or_refused(object.as_bytes());
        }
    }

    #[test]
    fn any_bytes_are_a_right_packet_or_refused(bytes in vec(any::<u8>(), 0..200), limit in 1_usize..200) {
        packet_is_right_or_refused(&bytes);
        framer_agrees_with_serde_json(&bytes, limit, || 3);
        let inside = [b"{", &bytes[..]].concat();
        packet_is_right_or_refused(&inside);
        framer_agrees_with_serde_json(&inside, limit, || 1);
    }
}

#[test]
fn mutated_packets_are_right_packets_or_refused_however_they_come() {
    let mut random = Random::new(99);
    for _ in 0..10_000 {
        let bytes = mutated(&mut random);
        packet_is_right_or_refused(&bytes);
        let most = 1 + random.below(60);
        let limit = if random.below(2) == 0 { usize::MAX } else { 1 + random.below(200) };
        framer_agrees_with_serde_json(&bytes, limit, || 1 + random.below(most));
    }
}

#[test]
fn the_reason_does_not_repeat_a_long_text_that_is_no_object() {
    packet_is_right_or_refused(format!("\"{}\"", "x".repeat(1000)).as_bytes());
}

#[test]
fn every_place_to_cut_two_packets_apart_gives_the_same_two() {
    for first in RIGHT {
        let stream = [first.as_bytes(), RIGHT[5].as_bytes()].concat();
        for at in 1..stream.len() {
            let mut pieces = [at, stream.len()].into_iter();
            framer_agrees_with_serde_json(&stream, usize::MAX, || pieces.next().unwrap_or(1));
        }
    }
}

#[test]
fn nesting_a_hundred_thousand_deep_is_read_to_its_end() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = open.repeat(100_000) + "1" + &close.repeat(100_000);
        let packet =
            format!("{{\"x\":{deep},\"type\":2,\"srcid\":1,\"destid\":2,\"payload\":\"p\"}}");
        framer_agrees_with_serde_json(packet.as_bytes(), usize::MAX, || 1000);
        let small_stack = std::thread::Builder::new().stack_size(128 << 10);
        let parsed = small_stack.spawn(move || Packet::parse(packet.as_bytes()).is_ok()).unwrap();
        assert!(parsed.join().unwrap());
    }
}
