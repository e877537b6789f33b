//! One of the clients, and the account that it keeps.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use revproc::net::os_error::reason;
use revproc::protocol::framer::Framer;

use super::connect::{Sources, connect};
use super::message::{BUFFER, Failure, MESSAGES, Message};
use super::{Mode, Options};

/// The longest latency that is told from longer ones, in nanoseconds: a minute.
const MAX_LATENCY: u64 = 60_000_000_000;

/// How long a connection's thread waits after an error, not to be busy with errors alone.
const PAUSE: Duration = Duration::from_millis(10);

/// When the load begins to count, and when it ends.
#[derive(Clone, Copy)]
pub struct Window {
    pub begin: Instant,
    pub end: Instant,
}

/// What a run found.
pub struct Outcome {
    /// In nanoseconds, of the acks within the window.
    pub latencies: Histogram<u64>,
    /// All messages; each is acked or lost in the end.
    pub sent: u64,
    pub acks: u64,
    pub lost: u64,
    /// How often a message was sent again.
    pub resent: u64,
    pub errors: u64,
    pub first_error: Option<String>,
}

impl Outcome {
    pub fn new() -> Self {
        let latencies = Histogram::new_with_max(MAX_LATENCY, 3).expect("bounds that it can have");
        Outcome { latencies, sent: 0, acks: 0, lost: 0, resent: 0, errors: 0, first_error: None }
    }

    pub fn fail(&mut self, error: String) {
        self.errors += 1;
        self.first_error.get_or_insert(error);
    }

    pub fn add(&mut self, other: Outcome) {
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
pub struct Client {
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
    /// The client with this number, which does nothing yet.
    pub fn new(
        number: usize,
        messages: Vec<Message>,
        address: SocketAddr,
        window: Window,
        options: &Options,
    ) -> Self {
        Client {
            address,
            mode: options.mode,
            timeout: options.timeout,
            wait: options.wait,
            window,
            sources: Sources::new(number, options.mode, address),
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
        }
    }

    /// Sends messages until the window ends, and those without an ack for as long as they may be sent
    /// again.
    pub fn run(mut self) -> Outcome {
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
