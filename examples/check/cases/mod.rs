//! The cases. Each section's file is a table in which a reader sees everything about a case: its
//! number, what it is about, whether the homework demands it, its script, and its explanation.

mod dialects;
mod hashes;
mod homework;
mod homework_proxy;
mod rotation;
mod several;
mod stream;
mod stream_proxy;
mod together;
mod values;
mod wrong;
mod wrong_proxy;

use std::fmt;

use serde_json::Value;

use crate::bench::Bench;
use crate::hindrance;
use crate::program::shorten;
use crate::support::peers::text;
use crate::wire::Came;

pub use hashes::{check_hash, check_hash_of};

/// The sections, from 1.
pub const SECTIONS: [&str; 5] =
    ["The homework", "TCP is a stream", "Several at once", "Things that go wrong", "Dialects"];

/// Whose program a case is about. The first three index the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Proxy,
    Server,
    Client,
    /// The three together.
    All,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Role::Proxy => "proxy",
            Role::Server => "server",
            Role::Client => "client",
            Role::All => "all",
        })
    }
}

/// Whether a program must pass a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rank {
    /// The homework's text demands it.
    Required,
    /// A program that is used by others needs it.
    Recommended,
    /// The homework only suggests it.
    Hint,
}

impl Rank {
    /// Returns its name in lists.
    pub fn name(self) -> &'static str {
        match self {
            Rank::Required => "required",
            Rank::Recommended => "recommended",
            Rank::Hint => "hint",
        }
    }
}

/// A case.
pub struct Case {
    /// Section and number in it: `2.1`.
    pub number: &'static str,
    /// What is right.
    pub title: &'static str,
    pub role: Role,
    pub rank: Rank,
    /// The cases without which this one says nothing new.
    pub needs: &'static [&'static str],
    /// What is sent or done.
    pub sent: &'static str,
    /// What should come of it.
    pub expected: &'static str,
    /// Does it, and judges.
    pub script: fn(&Bench) -> Verdict,
    /// Why it usually fails, and what to look at; a script may know better.
    pub why: &'static str,
}

impl Case {
    /// Returns the section's number, from 1.
    pub fn section(&self) -> usize {
        self.part(0)
    }

    fn place(&self) -> usize {
        self.part(1)
    }

    fn part(&self, which: usize) -> usize {
        self.number.split('.').nth(which).and_then(|part| part.parse().ok()).unwrap_or(0)
    }
}

/// What was wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What came.
    pub came: String,
    /// Why, where it shows.
    pub why: Option<String>,
}

/// How a case ends.
pub type Verdict = Result<(), Failure>;

impl Failure {
    /// What came, explained as the case does.
    pub fn came(came: impl Into<String>) -> Self {
        Failure { came: came.into(), why: None }
    }

    /// What came, and why.
    pub fn because(came: impl Into<String>, why: impl Into<String>) -> Self {
        Failure { came: came.into(), why: Some(why.into()) }
    }

    /// The system does not let the checker do its work, so that the case is not judged.
    pub fn ours(what: impl fmt::Display) -> Self {
        hindrance::note(&what);
        Self::came(what.to_string())
    }

    /// Puts what was going on in front of what came.
    pub fn when(self, what: &str) -> Self {
        Failure { came: format!("{what}: {}", self.came), ..self }
    }
}

impl From<Came> for Failure {
    fn from(came: Came) -> Self {
        Failure::came(came.to_string())
    }
}

/// Fails with what came, unless it is as it should be.
pub fn expect(is_right: bool, came: impl FnOnce() -> String) -> Verdict {
    if is_right { Ok(()) } else { Err(Failure::came(came())) }
}

/// Returns a packet as it is shown.
pub fn shown(packet: &Value) -> String {
    shorten(&packet.to_string())
}

/// Checks a field's text; numbers may be strings and the other way round.
pub fn check_field(packet: &Value, field: &str, expected: &str) -> Verdict {
    match packet.get(field) {
        None => Err(Failure::came(format!("a packet without {field}: {}", shown(packet)))),
        Some(value) if text(value) == expected => Ok(()),
        Some(value) => {
            Err(Failure::came(format!("{field} is {value}, not {expected}, in {}", shown(packet))))
        }
    }
}

/// Checks that a packet is the ack for a message: its type and its hash.
pub fn check_ack(packet: &Value, payload: &str) -> Verdict {
    check_hash(packet, payload, &[])?;
    check_field(packet, "type", "2")
}

/// Returns all cases, in the order of their numbers.
pub fn all() -> Vec<&'static Case> {
    let tables: [&'static [Case]; 9] = [
        homework::CASES,
        homework_proxy::CASES,
        together::CASES,
        stream::CASES,
        stream_proxy::CASES,
        several::CASES,
        wrong::CASES,
        wrong_proxy::CASES,
        dialects::CASES,
    ];
    let mut cases: Vec<_> = tables.into_iter().flatten().collect();
    // Stable, so that what is no number stays where it is.
    cases.sort_by_key(|case| (case.section(), case.place()));
    cases
}
