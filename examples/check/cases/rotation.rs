//! Whether messages went to the servers whose turn it was.

use super::{Failure, Verdict};
use crate::sites::ProxySite;

/// Checks the order in which servers got messages. `known` is a wrong one, and what it means.
pub fn check_order(site: &ProxySite<'_>, expected: &str, known: Option<(&str, &str)>) -> Verdict {
    let came = site.order().join(" ");
    if came == expected {
        return Ok(());
    }
    let is_same = |a: &str| came.split(' ').all(|id| id == a);
    let shown = format!("they went {came}");
    Err(match known {
        Some((wrong, why)) if came == wrong => Failure::because(shown, why),
        _ if came.len() > expected.len() => Failure::because(
            shown,
            "Some messages reached a server more than once. Look at how often a message is sent on.",
        ),
        _ if is_same("1") => Failure::because(
            shown,
            "The first server gets everything: whose turn it is never changes, or the second registration is lost.",
        ),
        _ if came.split(' ').next_back().is_some_and(is_same) => Failure::because(
            shown,
            "One server gets everything: the last registration takes the place of those before it, or whose turn it is never changes.",
        ),
        _ if came == expected.replace('1', "x").replace('2', "1").replace('x', "2") => {
            Failure::because(
                shown,
                "They take turns, but begin with the wrong one: the homework's first message goes to the server that registered first. Look at where the count begins, and whether the servers are kept in order.",
            )
        }
        _ => Failure::came(shown),
    })
}
