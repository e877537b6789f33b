//! How others write their packets: the homework's integers, and the tutorial's strings.

use serde_json::Value;

/// A way to write the three packets.
#[derive(Clone, Copy)]
pub struct Dialect {
    /// Returns a data packet, from the client's id, the policy, the payload's size, and the payload
    /// as JSON.
    pub message: fn(&str, &str, usize, &str) -> String,
    /// Returns a setup packet, from the server's id, its policy and its port.
    pub setup: fn(&str, &str, u16) -> String,
    /// Returns an ack, from the server's id, the client's as it came, and the hash.
    pub ack: fn(&str, &Value, &str) -> String,
}

/// The homework taken literally: integers where it has integers.
pub const INTEGERS: Dialect = Dialect {
    message: |client, policy, size, payload| {
        format!(
            r#"{{"type": 0, "srcid": {client}, "privPoliId": "{policy}", "payloadsize": {size}, "payload": {payload}}}"#
        )
    },
    setup: |id, policy, port| {
        format!(r#"{{"type": 1, "id": {id}, "privPolyId": "{policy}", "listenport": {port}}}"#)
    },
    ack: |id, client, hash| {
        format!(
            r#"{{"type": 2, "srcid": {id}, "destid": {client}, "payloadsize": {}, "payload": "{hash}"}}"#,
            hash.len()
        )
    },
};

/// The tutorial's: all values are strings, but for an ack's `payloadsize`.
pub const STRINGS: Dialect = Dialect {
    message: |client, policy, size, payload| {
        format!(
            r#"{{"type": "0", "srcid": "{client}", "privPoliId": "{policy}", "payloadsize": "{size}", "payload": {payload}}}"#
        )
    },
    setup: |id, policy, port| {
        format!(
            r#"{{"type": "1", "id": "{id}", "privPolyId": "{policy}", "listenport": "{port}"}}"#
        )
    },
    ack: |id, client, hash| {
        format!(
            r#"{{"type": "2", "srcid": "{id}", "destid": {client}, "payloadsize": {}, "payload": "{hash}"}}"#,
            hash.len()
        )
    },
};

/// Adds fields to a packet, in front; `more` is JSON as it stands.
pub fn with(packet: &str, more: &str) -> String {
    packet.replacen('{', &format!("{{{more}, "), 1)
}
