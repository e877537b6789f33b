//! One connection of a peer that the checker plays: bytes out, packets in, each with a bound, and
//! each noted with its time.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use revproc::protocol::framer::{Framer, Scan};
use serde_json::Value;

use crate::fair;
use crate::hindrance;
use crate::program::{lock, shorten};

/// The longest packet that is read.
const MAX_PACKET: usize = 4 << 20;

/// The most lines that are noted for a case.
const MAX_NOTES: usize = 300;

/// The time of a case, and what happened in it.
#[derive(Clone)]
pub struct Clock {
    begun: Instant,
    limit: Duration,
    last: Instant,
    end: Arc<Mutex<Instant>>,
    notes: Arc<Mutex<Vec<String>>>,
}

impl Clock {
    /// Starts a case that may wait for so long each time, by [`fair`] time, and never beyond `last`.
    pub fn start(limit: Duration, last: Instant) -> Self {
        let begun = Instant::now();
        let end = Arc::new(Mutex::new((fair::now() + limit).min(last)));
        Clock { begun, limit, last, end, notes: Arc::default() }
    }

    /// Gives the case its whole time again, now that a program runs.
    pub fn renew(&self) {
        *lock(&self.end) = (fair::now() + self.limit).min(self.last);
    }

    /// Returns when the case's time is over, by [`fair`] time.
    pub fn end(&self) -> Instant {
        *lock(&self.end)
    }

    /// Returns when a program that starts now must have started, by [`fair`] time.
    pub fn start_end(&self, limit: Duration) -> Instant {
        (fair::now() + limit.max(self.limit)).min(self.last)
    }

    /// Returns when the case began.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Returns the time that a case may take.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Returns what is left of it; at least a millisecond, since a socket takes no less.
    fn left(&self) -> Duration {
        self.end().saturating_duration_since(fair::now()).max(Duration::from_millis(1))
    }

    /// Notes what happened.
    pub fn note(&self, what: fmt::Arguments<'_>) {
        let mut notes = lock(&self.notes);
        if notes.len() < MAX_NOTES {
            notes.push(format!("{:8.3} s  {what}", self.begun.elapsed().as_secs_f64()));
        }
    }

    /// Returns what was noted.
    pub fn notes(&self) -> Vec<String> {
        lock(&self.notes).clone()
    }
}

/// What came instead of what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Came {
    /// Nothing, for so long.
    Nothing(Duration),
    /// So many bytes, which are no whole packet, and nothing more for so long.
    Part(usize, Duration),
    /// The end of the connection.
    End,
    /// The end of the connection after so many bytes, which are no whole packet.
    EndInside(usize),
    /// No connection could be made to this port.
    NotConnected(u16, String),
    /// What is no JSON object.
    NotJson(String),
    /// A packet without an end in sight.
    TooMuch,
    /// It does not read what it is sent.
    DoesNotRead,
}

impl fmt::Display for Came {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Came::Nothing(time) => write!(f, "nothing, for {} s", time.as_secs_f64()),
            Came::Part(bytes, time) => write!(
                f,
                "{bytes} bytes that are no whole JSON object, and nothing more for {} s",
                time.as_secs_f64()
            ),
            Came::End => write!(f, "the end of the connection, without an answer"),
            Came::EndInside(bytes) => {
                write!(
                    f,
                    "the end of the connection after {bytes} bytes, in the middle of a packet"
                )
            }
            Came::NotConnected(port, why) => {
                write!(f, "no connection to port {port} could be made: {why}")
            }
            Came::NotJson(text) => write!(f, "what is no JSON object: {text}"),
            Came::TooMuch => write!(f, "over 4 MiB without the end of a JSON object"),
            Came::DoesNotRead => write!(f, "nothing: it does not read what it is sent"),
        }
    }
}

/// A connection.
pub struct Wire {
    stream: TcpStream,
    name: String,
    clock: Clock,
    framer: Framer,
    buffer: Vec<u8>,
    scanned: usize,
}

impl Wire {
    /// Speaks on a connection; `name` is who speaks.
    pub fn new(stream: TcpStream, name: impl Into<String>, clock: &Clock) -> Self {
        // Without it, pieces that are sent one after another may wait for one another.
        let _ = stream.set_nodelay(true);
        let clock = clock.clone();
        let framer = Framer::new(MAX_PACKET);
        Wire { stream, name: name.into(), clock, framer, buffer: Vec::new(), scanned: 0 }
    }

    /// Connects to a port of this machine.
    pub fn connect(port: u16, name: impl Into<String>, clock: &Clock) -> Result<Self, Came> {
        let address = ([127, 0, 0, 1], port).into();
        match TcpStream::connect_timeout(&address, clock.left()) {
            Ok(stream) => Ok(Self::new(stream, name, clock)),
            Err(error) => {
                hindrance::note_if_scarce(&error);
                let name = name.into();
                clock.note(format_args!("{name} cannot connect to port {port}: {error}"));
                Err(Came::NotConnected(port, error.kind().to_string()))
            }
        }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> Result<(), Came> {
        let mut bytes = bytes.as_ref();
        let shown = shorten(&String::from_utf8_lossy(bytes));
        self.clock.note(format_args!("{} sends {} bytes: {shown}", self.name, bytes.len()));
        while !bytes.is_empty() {
            let _ = self.stream.set_write_timeout(Some(self.clock.left()));
            match self.stream.write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if fair::now() >= self.clock.end() {
                        return Err(Came::DoesNotRead);
                    }
                }
                Err(_) => return Err(Came::End),
            }
        }
        Ok(())
    }

    /// Sends a packet in pieces of this size, with pauses in which the peer can read each.
    pub fn send_in_pieces(&mut self, packet: &str, size: usize) -> Result<(), Came> {
        for piece in packet.as_bytes().chunks(size) {
            self.send(piece)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Says that nothing more will be sent.
    pub fn half_close(&self) {
        self.clock.note(format_args!("{} ends its sending side", self.name));
        // Fails where the peer has broken the connection; the next read says so.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Returns the next JSON object.
    pub fn packet(&mut self) -> Result<Value, Came> {
        let end = self.clock.end();
        self.packet_until(end)
    }

    /// Returns the next JSON object, which must be there by `end`.
    pub fn packet_until(&mut self, end: Instant) -> Result<Value, Came> {
        let begun = Instant::now();
        loop {
            if !self.framer.is_inside() {
                let skipped = self.framer.skip(&self.buffer);
                self.buffer.drain(..skipped);
                self.scanned = 0;
            }
            match self.framer.scan(&self.buffer[self.scanned..]) {
                Scan::End(length) => {
                    let packet: Vec<_> = self.buffer.drain(..self.scanned + length).collect();
                    self.scanned = 0;
                    return serde_json::from_slice(&packet)
                        .map_err(|_| Came::NotJson(shorten(&String::from_utf8_lossy(&packet))));
                }
                Scan::Incomplete => self.scanned = self.buffer.len(),
                Scan::NotAnObject => {
                    return Err(Came::NotJson(shorten(&String::from_utf8_lossy(&self.buffer))));
                }
                Scan::TooLarge => return Err(Came::TooMuch),
            }
            if !self.read(end, begun)? {
                return Err(match self.buffer.len() {
                    0 => Came::End,
                    bytes => Came::EndInside(bytes),
                });
            }
        }
    }

    /// Waits until `end` for the end of the connection, whatever comes before it.
    pub fn ends_by(&mut self, end: Instant) -> bool {
        loop {
            match self.read(end, Instant::now()) {
                Ok(true) => self.buffer.clear(),
                Ok(false) => return true,
                Err(_) => return false,
            }
        }
    }

    /// Reads what there is. Returns `false` at the end of the stream, which a reset is, too.
    fn read(&mut self, end: Instant, begun: Instant) -> Result<bool, Came> {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let left = end.saturating_duration_since(fair::now());
            let _ = self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))));
            match self.stream.read(&mut bytes) {
                Ok(0) => {
                    self.clock.note(format_args!("{} sees the end", self.name));
                    return Ok(false);
                }
                Ok(count) => {
                    let shown = shorten(&String::from_utf8_lossy(&bytes[..count]));
                    self.clock.note(format_args!("{} reads {count} bytes: {shown}", self.name));
                    self.buffer.extend_from_slice(&bytes[..count]);
                    return Ok(true);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if fair::now() >= end {
                        let tenths = (begun.elapsed().as_secs_f64() * 10.0).round();
                        let waited = Duration::from_secs_f64(tenths / 10.0);
                        return Err(match self.buffer.len() {
                            0 => Came::Nothing(waited),
                            bytes => Came::Part(bytes, waited),
                        });
                    }
                }
                Err(error) => {
                    self.clock.note(format_args!("{} sees an error: {error}", self.name));
                    return Ok(false);
                }
            }
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // A socket closed with bytes unread resets the connection, which the checked program would
        // see as an error of its peer.
        let mut rest = [0; 4096];
        if self.stream.set_nonblocking(true).is_ok() {
            // Somebody may send without end.
            for _ in 0..64 {
                if !matches!(self.stream.read(&mut rest), Ok(1..)) {
                    break;
                }
            }
        }
    }
}
