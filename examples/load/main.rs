//! A closed-loop load generator that checks every ack: its type, its addressee, and its hash.
//!
//! ```text
//! cargo run --release --example load -- -to 2100 -mode fresh  -connections 8
//! cargo run --release --example load -- -to 2100 -mode kept   -connections 64 -seconds 10
//! cargo run --release --example load -- -to 2100 -mode pipe16 -connections 8 -size 65536
//! cargo run --release --example load -- -to 2100 -mode kept   -idle 10000
//! cargo run --release --example load -- -to 2100 -mode fresh  -wait 10
//! ```
//!
//! `fresh` makes a connection for each message, as the homework's client does; `kept` sends one
//! message after another on a connection; `pipe16` keeps 16 of them in flight on it. A message without
//! an ack is lost, unless there is time to send it again (`-wait`, as the client's). It ends with 1 if
//! anything went wrong. `examples/compare.sh` runs it against several proxies.
//!
//! It shares the machine with what it measures, so it does little: messages and their hashes are
//! made beforehand, buffers are kept, and all that acks make room for is sent in one write.

mod client;
mod connect;
mod message;

use std::fmt;
use std::io;
use std::net::ToSocketAddrs;
use std::process::ExitCode;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use client::{Client, Outcome, Window};
use connect::{connect, is_open};
use message::messages_of;
use revproc::cli::terminal::Terminal;
use revproc::cli::{self, Problem};
use revproc::net::endpoint::Endpoint;
use revproc::net::listener;
use revproc::net::os_error::reason;

/// The stack of a connection's thread.
const STACK: usize = 128 << 10;

/// Sends messages as fast as they are acked, and checks the acks
#[derive(Debug, Parser)]
#[command(name = "load", version)]
struct Options {
    /// The reverse proxy's port, or HOST:PORT
    #[arg(long, value_name = "PORT")]
    to: Endpoint,
    /// A connection per message, a kept one, or a kept one with N messages in flight
    #[arg(long, value_name = "fresh|kept|pipeN", default_value = "kept")]
    mode: Mode,
    /// Connections at once, a thread each
    #[arg(long, value_name = "N", default_value = "8", value_parser = cli::count)]
    connections: usize,
    /// How long to measure
    #[arg(long, value_name = "TIME", default_value = "5", value_parser = cli::timeout)]
    seconds: Duration,
    /// How long to run before that
    #[arg(long, value_name = "TIME", default_value = "0.3", value_parser = cli::duration)]
    warmup: Duration,
    /// The payload's size in bytes
    #[arg(long, value_name = "SIZE", default_value = "32", value_parser = cli::memory)]
    size: usize,
    /// The privacy policy that the messages ask for
    #[arg(long, value_name = "PPID", default_value = "PP_1", allow_hyphen_values = true)]
    policy: String,
    /// Connections to open besides, on which nothing is sent
    #[arg(long, value_name = "N", default_value = "0")]
    idle: usize,
    /// How long an ack may take
    #[arg(long, value_name = "TIME", default_value = "5", value_parser = cli::timeout)]
    timeout: Duration,
    /// For how long to send a message again whose connection broke, or that was refused for now
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = cli::duration)]
    wait: Duration,
    /// Print one line for programs, with latencies in microseconds
    #[arg(long)]
    line: bool,
}

#[derive(Debug, Clone, Copy)]
struct Mode {
    /// A connection serves one message only.
    fresh: bool,
    /// Messages in flight on a connection.
    depth: usize,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let depth = match text {
            "fresh" | "kept" => Some(1),
            _ => text.strip_prefix("pipe").and_then(|depth| depth.parse().ok()),
        };
        match depth {
            Some(depth @ 1..=1000) => Ok(Mode { fresh: text == "fresh", depth }),
            _ => Err("give fresh, kept, or pipe and a number up to 1000, as in pipe16".to_owned()),
        }
    }
}

/// Runs the whole load.
fn run(options: &Options) -> io::Result<Outcome> {
    let target = (options.to.host.as_str(), options.to.port);
    let address =
        target.to_socket_addrs()?.next().ok_or_else(|| io::Error::other("no such host"))?;
    listener::raise_file_limit();
    let idle = (0..options.idle)
        .map(|_| connect(address, None, options.timeout))
        .collect::<io::Result<Vec<_>>>()?;
    let messages: Vec<_> =
        (1..=options.connections).map(|client| messages_of(client, options)).collect();
    let begin = Instant::now() + options.warmup;
    let window = Window { begin, end: begin + options.seconds };
    let mut outcome = Outcome::new();
    let threads = messages.into_iter().zip(1..).map(|(messages, client)| {
        let client = Client::new(client, messages, address, window, options);
        thread::Builder::new().stack_size(STACK).spawn(|| client.run())
    });
    for thread in threads.collect::<io::Result<Vec<_>>>()? {
        outcome.add(thread.join().expect("a client does not panic"));
    }
    let closed = idle.iter().filter(|connection| !is_open(connection)).count();
    if closed > 0 {
        outcome.fail(format!("{closed} idle connections were closed"));
    }
    Ok(outcome)
}

/// What is printed of a run.
struct Report<'a>(&'a Outcome, &'a Options);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report(Outcome { latencies, sent, acks, lost, resent, errors, .. }, options) = *self;
        let micros = |nanos: u64| nanos as f64 / 1000.0;
        let rate = latencies.len() as f64 / options.seconds.as_secs_f64();
        let [p50, p90, p99, p999] =
            [0.5, 0.9, 0.99, 0.999].map(|part| micros(latencies.value_at_quantile(part)));
        let max = micros(latencies.max());
        if options.line {
            return write!(
                f,
                "rate={rate:.0} errors={errors} p50={p50:.1} p90={p90:.1} p99={p99:.1} \
                 p999={p999:.1} max={max:.1} sent={sent} acks={acks} \
                 resent={resent} lost={lost}"
            );
        }
        writeln!(f, "{rate:.0} messages a second, {errors} errors")?;
        writeln!(f, "sent {sent}, acked {acks}, sent again {resent}, lost {lost}")?;
        write!(
            f,
            "latency in µs: p50 {p50:.1}, p90 {p90:.1}, p99 {p99:.1}, p99.9 {p999:.1}, max {max:.1}"
        )
    }
}

fn main() -> ExitCode {
    cli::main(
        |_| Terminal::new("load", false),
        |options: &Options, terminal| {
            let outcome = run(options)
                .map_err(|error| Problem::failed(format!("{}: {}", options.to, reason(&error))))?;
            for line in Report(&outcome, options).to_string().lines() {
                terminal.line(format_args!("{line}"));
            }
            if let Some(error) = &outcome.first_error {
                terminal.warn(format_args!("{} errors, the first one: {error}", outcome.errors));
            }
            // A target that never answered at all has failed too, whatever the time limits were.
            let failed = outcome.errors > 0 || outcome.latencies.is_empty();
            Ok(ExitCode::from(if failed { cli::FAILED } else { 0 }))
        },
    )
}
