//! Cuts streams, in pieces that the first bytes choose, beside serde_json.
#![no_main]

#[path = "../../support/invariants.rs"]
#[allow(dead_code, reason = "each target checks its part")]
mod invariants;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let [limit, piece, stream @ ..] = input else { return };
    let limit = if *limit == 255 { usize::MAX } else { usize::from(*limit) + 1 };
    let mut step = *piece;
    invariants::framer_agrees_with_serde_json(stream, limit, || {
        step = step.wrapping_mul(5).wrapping_add(*piece);
        usize::from(step >> 3)
    });
});
