//! Writes packets, strictly: one compact line each, its fields in a fixed order.

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::packet::{Packet, Setup};

/// Why writing cannot fail.
const INFALLIBLE: &str = "a Vec takes every byte, and every key is a string";

impl Packet<'_> {
    /// Appends the packet to `out` as one line of compact JSON, newline included.
    pub fn write(&self, out: &mut Vec<u8>) {
        serde_json::to_writer(&mut *out, self).expect(INFALLIBLE);
        out.push(b'\n');
    }

    /// Returns the packet as one line, newline included.
    pub fn to_line(&self) -> Vec<u8> {
        let mut line = Vec::with_capacity(160);
        self.write(&mut line);
        line
    }
}

impl Setup<'_> {
    /// Returns the packet as one line in the tutorial's dialect: every value is a string.
    pub fn to_line_of_strings(&self) -> Vec<u8> {
        let fields = [
            ("type", Some("1".to_owned())),
            ("id", Some(self.id.to_string())),
            ("privPolyId", Some(self.policy.to_string())),
            ("privPoliId", Some(self.policy.to_string())),
            ("listenport", Some(self.listen_port.to_string())),
            ("lease", self.lease.map(|seconds| seconds.to_string())),
            ("capacity", self.capacity.map(|messages| messages.to_string())),
            ("token", self.token.as_deref().map(str::to_owned)),
        ];
        let fields = fields.into_iter().filter_map(|(key, value)| Some((key, value?)));
        let mut line = Vec::new();
        serde_json::Serializer::new(&mut line).collect_map(fields).expect(INFALLIBLE);
        line.push(b'\n');
        line
    }
}

/// Writes a field that may be missing.
fn write_if<M: SerializeMap>(
    map: &mut M,
    key: &str,
    value: &Option<impl Serialize>,
) -> Result<(), M::Error> {
    value.as_ref().map_or(Ok(()), |value| map.serialize_entry(key, value))
}

impl Serialize for Packet<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        match self {
            Packet::Data(data) => {
                map.serialize_entry("type", &0)?;
                map.serialize_entry("srcid", &data.srcid)?;
                map.serialize_entry("privPoliId", &data.policy)?;
                map.serialize_entry("payloadsize", &data.payload.len())?;
                map.serialize_entry("payload", &data.payload)?;
                write_if(&mut map, "timeout", &data.timeout)?;
                write_if(&mut map, "once", &data.once.then_some(true))?;
                write_if(&mut map, "msgid", &data.msgid)?;
            }
            Packet::Setup(setup) => {
                map.serialize_entry("type", &1)?;
                map.serialize_entry("id", &setup.id)?;
                // Some of the homework's proxies read the first spelling, some the second.
                map.serialize_entry("privPolyId", &setup.policy)?;
                map.serialize_entry("privPoliId", &setup.policy)?;
                map.serialize_entry("listenport", &setup.listen_port)?;
                write_if(&mut map, "lease", &setup.lease)?;
                write_if(&mut map, "capacity", &setup.capacity)?;
                write_if(&mut map, "token", &setup.token)?;
            }
            Packet::Ack(ack) => {
                map.serialize_entry("type", &2)?;
                map.serialize_entry("srcid", &ack.srcid)?;
                map.serialize_entry("destid", &ack.destid)?;
                map.serialize_entry("payloadsize", &ack.payload.len())?;
                map.serialize_entry("payload", &ack.payload)?;
                write_if(&mut map, "lease", &ack.lease)?;
                write_if(&mut map, "result", &ack.result)?;
                write_if(&mut map, "encoding", &ack.encoding)?;
            }
            Packet::Refusal(refusal) => {
                map.serialize_entry("type", &3)?;
                map.serialize_entry("srcid", &0)?;
                map.serialize_entry("destid", &refusal.destid)?;
                map.serialize_entry("payloadsize", &refusal.reason.len())?;
                map.serialize_entry("payload", &refusal.reason)?;
                map.serialize_entry("code", &refusal.code)?;
            }
        }
        map.end()
    }
}
