//! Invariants for any bytes, checked by the property tests and the fuzz targets.

use std::collections::HashMap;

use revproc::protocol::framer::{BYTE_ORDER_MARK, Framer, Scan};
use revproc::protocol::{Packet, Setup};
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

/// Cuts a stream into packets like a receiver; `piece` returns how many bytes the next read gets.
/// Returns the packets and the framer's last result.
fn cut(stream: &[u8], limit: usize, mut piece: impl FnMut() -> usize) -> (Vec<&[u8]>, Scan) {
    let mut framer = Framer::new(limit);
    let (mut packets, mut start, mut at) = (Vec::new(), 0, 0);
    while at < stream.len() {
        let end = stream.len().min(at + piece().max(1));
        while at < end {
            if !framer.is_inside() {
                at += framer.skip(&stream[at..end]);
                start = at;
            }
            match framer.scan(&stream[at..end]) {
                Scan::Incomplete => at = end,
                Scan::End(length) => {
                    at += length;
                    packets.push(&stream[start..at]);
                }
                error => return (packets, error),
            }
            assert!(framer.length() <= limit, "more was taken than the limit");
            assert_eq!(framer.length(), if framer.is_inside() { at - start } else { 0 });
        }
    }
    (packets, if framer.is_inside() { Scan::Incomplete } else { Scan::End(0) })
}

/// Checks that the framer finds the same ends as serde_json, however the stream is split, and that
/// it stops where a packet is too long or cannot begin.
pub fn framer_agrees_with_serde_json(stream: &[u8], limit: usize, piece: impl FnMut() -> usize) {
    let (packets, last) = cut(stream, limit, piece);
    let (whole, whole_last) = cut(stream, limit, || stream.len());
    assert_eq!((&packets, last), (&whole, whole_last), "it depends on the pieces");
    let mut packets = packets.into_iter();
    let mut rest = &stream[Framer::white_space(stream)..];
    rest = match rest.strip_prefix(&BYTE_ORDER_MARK) {
        Some(rest) => rest,
        None if BYTE_ORDER_MARK.starts_with(rest) => &[],
        None => rest,
    };
    loop {
        rest = &rest[Framer::white_space(rest)..];
        if rest.is_empty() {
            assert_eq!((packets.next(), last), (None, Scan::End(0)));
            return;
        }
        if rest[0] != b'{' {
            assert_eq!((packets.next(), last), (None, Scan::NotAnObject));
            return;
        }
        let mut objects = serde_json::Deserializer::from_slice(rest).into_iter::<IgnoredAny>();
        match objects.next() {
            Some(Ok(_)) if objects.byte_offset() <= limit => {
                let (object, after) = rest.split_at(objects.byte_offset());
                assert_eq!(packets.next(), Some(object));
                rest = after;
            }
            Some(Ok(_)) => {
                assert_eq!((packets.next(), last), (None, Scan::TooLarge));
                return;
            }
            Some(Err(error)) if error.is_eof() => {
                let expected = if rest.len() > limit { Scan::TooLarge } else { Scan::Incomplete };
                assert_eq!((packets.next(), last), (None, expected));
                return;
            }
            // Text that is not JSON has no right end.
            _ => return,
        }
    }
}

/// Checks that the bytes parse as a packet with the right values, which survives writing and
/// reading, or are refused with a short reason that tells whether they are JSON.
pub fn packet_is_right_or_refused(bytes: &[u8]) {
    let is_json =
        std::str::from_utf8(bytes).is_ok() && serde_json::from_slice::<IgnoredAny>(bytes).is_ok();
    match Packet::parse(bytes) {
        Ok(packet) => {
            assert!(is_json);
            has_the_values_serde_json_reads(&packet, bytes);
            survives(&packet);
        }
        Err(error) => {
            assert_eq!(error.is_json, is_json, "{error}");
            assert!(error.reason.len() < 500, "{} bytes of reason", error.reason.len());
        }
    }
}

fn has_the_values_serde_json_reads(packet: &Packet<'_>, bytes: &[u8]) {
    // As text: serde_json's numbers hold neither integers above 64 bits nor large exponents.
    let fields: HashMap<String, &RawValue> = serde_json::from_slice(bytes).unwrap();
    let text = |names: &[&str]| {
        let json = names.iter().find_map(|name| fields.get(*name)).unwrap().get();
        match json {
            "-0" => "0".to_owned(),
            json if json.starts_with('"') => serde_json::from_str(json).unwrap(),
            json => json.to_owned(),
        }
    };
    let policy = ["privPoliId", "privPolyId"];
    match packet {
        Packet::Data(data) => {
            assert_eq!(text(&["type"]).trim_start_matches('0'), "");
            assert_eq!(data.srcid.text(), text(&["srcid"]));
            assert_eq!(data.policy.text(), text(&policy));
            assert_eq!(data.payload, text(&["payload"]));
        }
        Packet::Setup(setup) => {
            assert_eq!(text(&["type"]).trim_start_matches('0'), "1");
            assert_eq!(setup.id.text(), text(&["id"]));
            assert_eq!(setup.policy.text(), text(&policy));
            assert_eq!(text(&["listenport"]).parse(), Ok(setup.listen_port));
        }
        Packet::Ack(ack) => {
            assert_eq!(text(&["type"]).trim_start_matches('0'), "2");
            assert_eq!(ack.srcid.text(), text(&["srcid"]));
            assert_eq!(ack.destid.text(), text(&["destid"]));
            assert_eq!(ack.payload, text(&["payload"]));
        }
        Packet::Refusal(refusal) => {
            assert_eq!(text(&["type"]).trim_start_matches('0'), "3");
            assert_eq!(refusal.destid.text(), text(&["destid"]));
            assert_eq!(refusal.reason, text(&["payload"]));
            assert_eq!(refusal.code, text(&["code"]));
        }
    }
}

/// Checks that a packet is written as one line, which the framer finds whole and the parser reads
/// back equal.
pub fn survives(packet: &Packet<'_>) {
    let mut expected = packet.clone();
    if let Packet::Data(data) = &mut expected {
        data.payload_size = Some(data.payload.len() as u64);
    }
    let mut lines = vec![packet.to_line()];
    if let Packet::Setup(setup) = packet {
        lines.push(Setup::to_line_of_strings(setup));
    }
    for line in lines {
        let (text, end) = line.split_at(line.len() - 1);
        assert!(end == b"\n" && !text.contains(&b'\n'));
        assert_eq!(Framer::new(usize::MAX).scan(&line), Scan::End(text.len()));
        assert_eq!(Packet::parse(text).as_ref(), Ok(&expected));
    }
}
