//! Parses any bytes, compares what they say with serde_json, and writes and reads them again.
#![no_main]

#[path = "../../support/invariants.rs"]
#[allow(dead_code, reason = "each target checks its part")]
mod invariants;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| invariants::packet_is_right_or_refused(input));
