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

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::iter::Cycle;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use hdrhistogram::Histogram;
use revproc::cli::terminal::Terminal;
use revproc::cli::{self, Problem};
use revproc::net::endpoint::Endpoint;
use revproc::net::listener;
use revproc::net::os_error::reason;
use revproc::protocol::framer::{Framer, Scan};
use revproc::protocol::{Code, Data, Id, Packet, hash};
use rustix::net::{AddressFamily, SocketType, ipproto, sockopt};

/// Different messages per connection, sent in turn: an ack for another one is noticed.
const MESSAGES: usize = 4;

/// Room for acks that came together.
const BUFFER: usize = 32 << 10;

/// Acks that were found right are remembered per message: as many as there may be servers.
const MAX_KNOWN: usize = 8;

/// The ports that fresh connections come from, one after another. They are below those that the
/// kernel hands out, which it would no longer hand out to others once they were bound here.
const SOURCE_PORTS: RangeInclusive<u16> = 1024..=32767;

/// The longest latency that is told from longer ones, in nanoseconds: a minute.
const MAX_LATENCY: u64 = 60_000_000_000;

/// The stack of a connection's thread.
const STACK: usize = 128 << 10;

/// Refusals that may not come again a moment later, as for the client.
const PASSING: [Code; 4] = [Code::NoServer, Code::Unreachable, Code::Timeout, Code::Overloaded];

/// How long a connection's thread waits after an error, not to be busy with errors alone.
const PAUSE: Duration = Duration::from_millis(10);

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
    #[arg(long, value_name = "BYTES", default_value = "32", value_parser = cli::count)]
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

/// A message ready to be sent, and what its ack must be.
struct Message {
    line: Vec<u8>,
    client: usize,
    hash: String,
    /// Acks that were found right. One that equals them needs no second look.
    known: Vec<Vec<u8>>,
}

impl Message {
    fn new(client: usize, number: usize, options: &Options) -> Self {
        let start = format!("client {client} message {number} ");
        let payload: String = start.chars().chain(('a'..='z').cycle()).take(options.size).collect();
        let hash = hash(&payload);
        let data = Data::new(id(client), Id::from_text(&options.policy), payload);
        Message { line: Packet::Data(data).to_line(), client, hash, known: Vec::new() }
    }

    /// The length of this message's ack, which must come first in `received`; `None` if not all of
    /// it has come.
    fn find_ack(&mut self, received: &[u8]) -> Result<Option<usize>, Failure> {
        let space = Framer::white_space(received);
        let received = &received[space..];
        if let Some(known) = self.known.iter().find(|known| received.starts_with(known)) {
            return Ok(Some(space + known.len()));
        }
        let end = match Framer::new(BUFFER).scan(received) {
            Scan::End(end) => end,
            Scan::Incomplete if received.len() < BUFFER - space => return Ok(None),
            _ => return Err(Failure::lasting("no ack", received)),
        };
        let (ack, client) = (&received[..end], id(self.client));
        match Packet::parse(ack) {
            Ok(Packet::Ack(it)) if it.destid == client && it.payload == self.hash => {
                if self.known.len() < MAX_KNOWN {
                    self.known.push(ack.to_vec());
                }
                Ok(Some(space + end))
            }
            Ok(Packet::Refusal(it)) if PASSING.iter().any(|code| code.name() == it.code) => {
                Err(Failure::passing(format!("refused: {}", it.reason)))
            }
            _ => Err(Failure::lasting("not the ack of this message", ack)),
        }
    }
}

/// Why a connection served no more messages.
struct Failure {
    reason: String,
    /// Whether the messages without an ack may get one on another connection.
    may_pass: bool,
}

impl Failure {
    fn passing(reason: impl Into<String>) -> Self {
        Failure { reason: reason.into(), may_pass: true }
    }

    fn lasting(what: &str, received: &[u8]) -> Self {
        let reason = format!("{what}: {}", String::from_utf8_lossy(received));
        Failure { reason, may_pass: false }
    }
}

fn id(client: usize) -> Id<'static> {
    Id::Integer(client as i128)
}

/// When the load begins to count, and when it ends.
#[derive(Clone, Copy)]
struct Window {
    begin: Instant,
    end: Instant,
}

/// What a run found.
struct Outcome {
    /// In nanoseconds, of the acks within the window.
    latencies: Histogram<u64>,
    /// All messages; each is acked or lost in the end.
    sent: u64,
    acks: u64,
    lost: u64,
    /// How often a message was sent again.
    resent: u64,
    errors: u64,
    first_error: Option<String>,
}

impl Outcome {
    fn new() -> Self {
        let latencies = Histogram::new_with_max(MAX_LATENCY, 3).expect("bounds that it can have");
        Outcome { latencies, sent: 0, acks: 0, lost: 0, resent: 0, errors: 0, first_error: None }
    }

    fn fail(&mut self, error: String) {
        self.errors += 1;
        self.first_error.get_or_insert(error);
    }

    fn add(&mut self, other: Outcome) {
        self.latencies.add(&other.latencies).expect("all have the same bounds");
        self.sent += other.sent;
        self.acks += other.acks;
        self.lost += other.lost;
        self.resent += other.resent;
        self.errors += other.errors;
        self.first_error = self.first_error.take().or(other.first_error);
    }
}

/// One of the clients: a thread, and a connection at a time.
struct Client {
    address: SocketAddr,
    mode: Mode,
    timeout: Duration,
    wait: Duration,
    window: Window,
    sources: Option<Sources>,
    messages: Vec<Message>,
    /// Messages sent and acked on all connections; the remainder says which message is next.
    sent: usize,
    acked: usize,
    /// When the messages in flight on this connection were sent.
    in_flight: VecDeque<Instant>,
    /// Messages without an ack, on this connection or from the one before.
    unacked: usize,
    /// When the first connection failed since the last ack.
    failing_since: Option<Instant>,
    batch: Vec<u8>,
    buffer: Vec<u8>,
    /// Bytes in the buffer.
    filled: usize,
    outcome: Outcome,
}

impl Client {
    fn run(mut self) -> Outcome {
        while Instant::now() < self.window.end || self.unacked > 0 {
            let Err(failure) = self.use_connection() else { continue };
            let since = *self.failing_since.get_or_insert_with(Instant::now);
            if failure.may_pass && since.elapsed() < self.wait {
                self.outcome.resent += self.unacked as u64;
            } else {
                self.failing_since = None;
                self.outcome.lost += std::mem::take(&mut self.unacked) as u64;
                self.outcome.fail(failure.reason);
            }
            thread::sleep(PAUSE);
        }
        self.outcome
    }

    /// Makes a connection and uses it until the end, or for one message. What got no ack on the one
    /// before is sent first.
    fn use_connection(&mut self) -> Result<(), Failure> {
        self.sent = self.acked;
        self.filled = 0;
        self.in_flight.clear();
        let mut now = Instant::now();
        self.take_on(self.mode.depth - self.unacked);
        let mut stream = connect(self.address, self.sources.as_mut(), self.timeout)
            .map_err(|error| Failure::passing(format!("could not connect: {}", reason(&error))))?;
        self.send(&mut stream, self.mode.depth, now)?;
        while let Some(&oldest) = self.in_flight.front() {
            let read = match stream.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return Err(Failure::passing("the connection was closed before the ack")),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Failure::passing(format!("no ack: {}", reason(&error)))),
            };
            now = Instant::now();
            if now - oldest > self.timeout {
                return Err(Failure::passing("no whole ack in time"));
            }
            self.filled += read;
            let acks = self.take_acks(now)?;
            if acks > 0 && !self.mode.fresh && now < self.window.end {
                self.take_on(acks);
                self.send(&mut stream, acks, Instant::now())?;
            }
        }
        Ok(())
    }

    /// Counts further messages, each of which is to get an ack.
    fn take_on(&mut self, count: usize) {
        self.unacked += count;
        self.outcome.sent += count as u64;
    }

    /// Sends the next messages in one write.
    fn send(&mut self, stream: &mut TcpStream, count: usize, now: Instant) -> Result<(), Failure> {
        let next = |nth: usize| &self.messages[(self.sent + nth) % MESSAGES].line;
        let bytes = if count == 1 {
            next(0)
        } else {
            self.batch.clear();
            (0..count).for_each(|nth| self.batch.extend_from_slice(next(nth)));
            &self.batch
        };
        stream
            .write_all(bytes)
            .map_err(|error| Failure::passing(format!("could not send: {}", reason(&error))))?;
        self.in_flight.extend(std::iter::repeat_n(now, count));
        self.sent += count;
        Ok(())
    }

    /// Checks and counts the acks that have come whole.
    fn take_acks(&mut self, now: Instant) -> Result<usize, Failure> {
        let (before, mut used) = (self.acked, 0);
        while used < self.filled {
            let received = &self.buffer[used..self.filled];
            let Some(&sent) = self.in_flight.front() else {
                match Framer::white_space(received) {
                    space if space == received.len() => break,
                    _ => return Err(Failure::lasting("no message was sent for this", received)),
                }
            };
            let Some(length) = self.messages[self.acked % MESSAGES].find_ack(received)? else {
                break;
            };
            used += length;
            self.in_flight.pop_front();
            self.acked += 1;
            self.unacked -= 1;
            self.failing_since = None;
            self.outcome.acks += 1;
            if (self.window.begin..self.window.end).contains(&now) {
                let latency = u64::try_from((now - sent).as_nanos()).unwrap_or(u64::MAX);
                self.outcome.latencies.saturating_record(latency);
            }
        }
        self.buffer.copy_within(used..self.filled, 0);
        self.filled -= used;
        Ok(self.acked - before)
    }
}

/// Where a client's fresh connections come from: an address of its own, one port after another.
///
/// At thousands of connections a second the kernel's search for a port, among all those that wait
/// for late segments, would come to cost more than anything that is to be measured.
struct Sources {
    address: Ipv4Addr,
    ports: Cycle<RangeInclusive<u16>>,
}

impl Sources {
    /// None where connections are kept, or where addresses are not there for the taking.
    fn new(client: usize, mode: Mode, target: SocketAddr) -> Option<Self> {
        let is_plenty = cfg!(target_os = "linux") && target.is_ipv4() && target.ip().is_loopback();
        let client = u32::try_from(client).ok().filter(|_| mode.fresh && is_plenty)?;
        // A network for each process, so that several of them can run at once.
        let network = 1 + std::process::id() % 200;
        let address = Ipv4Addr::from_bits((127 << 24 | network << 16) + client);
        Some(Sources { address, ports: SOURCE_PORTS.cycle() })
    }

    fn bind(&mut self, socket: &OwnedFd) -> io::Result<()> {
        // Lets a port be taken whose last connection ended a while ago.
        sockopt::set_socket_reuseaddr(socket, true)?;
        for port in self.ports.by_ref().take(SOURCE_PORTS.len()) {
            match rustix::net::bind(socket, &SocketAddr::new(IpAddr::V4(self.address), port)) {
                Err(rustix::io::Errno::ADDRINUSE) => {}
                result => return Ok(result?),
            }
        }
        Err(io::ErrorKind::AddrInUse.into())
    }
}

/// Connects with all time limits set beforehand; on Linux the one for sending is also connect's.
fn connect(
    address: SocketAddr,
    sources: Option<&mut Sources>,
    timeout: Duration,
) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket(family, SocketType::STREAM, Some(ipproto::TCP))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(timeout))?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    if let Some(sources) = sources {
        sources.bind(&socket)?;
    }
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}

fn is_open(connection: &TcpStream) -> bool {
    let peeked = connection.set_nonblocking(true).and_then(|()| connection.peek(&mut [0]));
    matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
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
    let messages: Vec<Vec<Message>> = (1..=options.connections)
        .map(|client| (0..MESSAGES).map(|number| Message::new(client, number, options)).collect())
        .collect();
    let begin = Instant::now() + options.warmup;
    let window = Window { begin, end: begin + options.seconds };
    let mut outcome = Outcome::new();
    let threads = messages.into_iter().zip(1..).map(|(messages, client)| {
        let client = Client {
            address,
            mode: options.mode,
            timeout: options.timeout,
            wait: options.wait,
            window,
            sources: Sources::new(client, options.mode, address),
            messages,
            sent: 0,
            acked: 0,
            in_flight: VecDeque::new(),
            unacked: 0,
            failing_since: None,
            batch: Vec::new(),
            buffer: vec![0; BUFFER],
            filled: 0,
            outcome: Outcome::new(),
        };
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
    let options: Options = match cli::parse() {
        Ok(options) => options,
        Err(code) => return code,
    };
    let terminal = Terminal::new("load", false);
    cli::run(&terminal, || {
        let outcome = run(&options)
            .map_err(|error| Problem::failed(format!("{}: {}", options.to, reason(&error))))?;
        for line in Report(&outcome, &options).to_string().lines() {
            terminal.line(format_args!("{line}"));
        }
        if let Some(error) = &outcome.first_error {
            terminal.warn(format_args!("{} errors, the first one: {error}", outcome.errors));
        }
        // A target that never answered at all has failed too, whatever the time limits were.
        let failed = outcome.errors > 0 || outcome.latencies.is_empty();
        Ok(ExitCode::from(if failed { cli::FAILED } else { 0 }))
    })
}
