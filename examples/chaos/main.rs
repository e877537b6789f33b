//! Breaks things while clients keep sending, and keeps an account of every message:
//!
//! ```text
//! cargo build && cargo run --example chaos -- -kind kill -seed 7 -seconds 60
//! ```
//!
//! Ends with a table of counts, and with exit code 1 if anything was not as it should be.

mod kinds;
#[path = "../../tests/support/mod.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod support;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use revproc::cli;

use kinds::{Kind, Outcome, Run};

/// Breaks things while clients keep sending, and counts what became of every message
#[derive(Debug, Parser)]
#[command(name = "chaos", version)]
struct Options {
    /// kill, stop, hang, term, restart, once, repeat, misbehave, surplus, homework, slow, descriptors, stdout, or all
    #[arg(long, value_name = "KIND", default_value = "all", value_parser = kind)]
    kind: String,
    /// Decides what is broken when
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// For how long things are broken, for each kind
    #[arg(long, value_name = "N", default_value = "15", value_parser = cli::timeout)]
    seconds: Duration,
    /// Clients that send at once
    #[arg(long, value_name = "N", default_value = "16", value_parser = cli::count)]
    clients: usize,
}

fn kind(text: &str) -> Result<String, String> {
    let names: Vec<_> = kinds::ALL.iter().map(|(name, ..)| *name).collect();
    if text == "all" || names.contains(&text) {
        Ok(text.to_owned())
    } else {
        Err(format!("give one of {}, or all", names.join(", ")))
    }
}

fn main() -> ExitCode {
    let options: Options = match cli::parse() {
        Ok(options) => options,
        Err(code) => return code,
    };
    let run = Run {
        seed: options.seed,
        length: options.seconds,
        clients: options.clients,
        reply_timeout: Duration::from_secs(5),
        packet_timeout: Duration::from_secs(5),
        crowd: 1000,
        slack: Duration::ZERO,
    };
    let chosen = kinds::ALL.iter().filter(|(name, ..)| [*name, "all"].contains(&&*options.kind));
    println!(
        "{:<12} {:>9} {:>9} {:>8} {:>7} {:>6} {:>10}  the proxy's own counts",
        "kind", "sent", "acked", "refused", "failed", "wrong", "longest"
    );
    // Every kind is run, whatever became of the one before.
    let broken = chosen.filter(|kind| !is_as_it_should_be(kind, &run)).count();
    ExitCode::from(if broken == 0 { 0 } else { cli::FAILED })
}

fn is_as_it_should_be((name, what, kind): &(&str, &str, Kind), run: &Run) -> bool {
    let Outcome { account, proxy, notes, broken } = kind(run);
    let counts = proxy.map_or_else(
        || "(not comparable)".to_owned(),
        |[messages, acked, refused]| {
            format!("{messages} messages: {acked} acked, {refused} refused")
        },
    );
    println!(
        "{name:<12} {:>9} {:>9} {:>8} {:>7} {:>6} {:>7} ms  {counts}",
        account.sent,
        account.acked,
        account.refusals(),
        account.failed,
        account.wrong,
        account.longest.as_millis(),
    );
    for (code, count) in &account.refused {
        println!("{:12} refused as {code}: {count}", "");
    }
    for note in &notes {
        println!("{:12} {note}", "");
    }
    for expectation in &broken {
        println!("{:12} NOT AS IT SHOULD BE ({what}): {expectation}", "");
    }
    broken.is_empty()
}
