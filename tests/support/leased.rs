//! A server with a lease that answers each message as the test chooses.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use revproc::net::connection::{Connection, DEFAULT_MAX_PACKET, ReadTimeout};
use revproc::protocol::hash;
use serde_json::{Value, json};

use super::{BOUND, Peer};

/// The lease, in seconds, and how often it is renewed, as our own server does.
const LEASE: u64 = 3;
const RENEWAL: Duration = Duration::from_secs(1);

/// How long a held ack waits for the next message of its connection.
const SWAP_LIMIT: Duration = Duration::from_millis(50);

/// The pause between two bytes of an answer in pieces.
const PIECE: Duration = Duration::from_micros(50);

/// How a server answers one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Acks it.
    Ack,
    /// Acks it with these further fields, which are JSON as they stand.
    AckWith(&'static str),
    /// Acks it twice, in one segment.
    AckTwice,
    /// Acks the connection's next message first, if one arrives soon.
    SwapWithNext,
    /// Sends nothing, and goes on with the next message.
    Skip,
    /// Acks it with the hash of another payload.
    WrongHash,
    /// Acks it to another client's id.
    OtherClient,
    /// Acks it after this time, and reads nothing until then.
    Late(Duration),
    /// Refuses it with this code.
    Refuse(&'static str),
    /// Acks it, and ends the line this much later.
    EndsLineAfter(Duration),
    /// Acks it one byte at a time.
    InPieces,
    /// Sends half an ack, and never the rest.
    Half,
    /// Sends half an ack and closes the connection.
    HalfThenClose,
    /// Sends something that is not a packet.
    Nonsense,
    /// Closes the connection without an answer.
    CloseAtOnce,
    /// Acks it with more than 4 MiB.
    TooLong,
    /// Acks it with a result of a million bytes.
    LongResult,
}

/// A message that a server received.
#[derive(Debug, Clone, Copy)]
pub struct Taken {
    /// Its number, from 0.
    pub number: usize,
    /// The number of its connection, from 0.
    pub connection: usize,
    /// Its payload's length.
    pub length: usize,
    /// Whether more bytes had arrived on the connection by the time of the answer.
    pub has_follower: bool,
}

/// Returns a server's refusal, formatted as no proxy writes it.
pub fn refusal(code: &str, client: &str) -> String {
    format!(
        "{{ \"code\": \"{code}\",\t\"type\": \"3\", \"srcid\": 0, \"destid\": {client}, \"note\": [1, 2], \"payload\": \"not \\u0074oday\" }}\n"
    )
}

/// A server of this process that holds a lease until it is dropped. It serves its connections in
/// parallel, and each connection's messages in order.
pub struct Leased {
    /// The port it listens on.
    pub port: u16,
    shared: Arc<Shared>,
    /// Ends the lease when dropped.
    _setup: Sender<()>,
}

struct Shared {
    id: &'static str,
    script: Box<dyn Fn(Taken) -> Answer + Send + Sync>,
    taken: Mutex<Vec<Taken>>,
    renews: AtomicBool,
    has_ended: AtomicBool,
}

impl Leased {
    /// Starts a server and registers it. `script` returns the answer to each message.
    pub fn start(
        id: &'static str,
        policy: &str,
        proxy: u16,
        script: impl Fn(Taken) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(id, policy, proxy, "", script)
    }

    /// Starts one that takes so many messages at once.
    pub fn with_capacity(
        id: &'static str,
        policy: &str,
        proxy: u16,
        capacity: usize,
        script: impl Fn(Taken) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(id, policy, proxy, &format!(",\"capacity\":{capacity}"), script)
    }

    fn start_with(
        id: &'static str,
        policy: &str,
        proxy: u16,
        more: &str,
        script: impl Fn(Taken) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            id,
            script: Box::new(script),
            taken: Mutex::default(),
            renews: AtomicBool::new(true),
            has_ended: AtomicBool::new(false),
        });
        thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                for (number, stream) in listener.incoming().enumerate() {
                    if shared.has_ended.load(Ordering::SeqCst) {
                        return;
                    }
                    let shared = Arc::clone(&shared);
                    // An error of the peer ends its connection only.
                    thread::spawn(move || stream.and_then(|stream| shared.serve(number, stream)));
                }
            }
        });
        let packet = format!(
            "{{\"type\":1,\"id\":{id},\"privPolyId\":\"{policy}\",\"listenport\":{port},\"lease\":{LEASE}{more}}}\n"
        );
        let setup = hold_lease(proxy, packet, Arc::clone(&shared));
        Leased { port, shared, _setup: setup }
    }

    /// Stops renewing the lease, like a server that hangs.
    pub fn stop_renewing(&self) {
        self.shared.renews.store(false, Ordering::SeqCst);
    }

    /// Returns the messages received so far.
    pub fn taken(&self) -> Vec<Taken> {
        self.shared.taken.lock().unwrap().clone()
    }

    /// Waits until it has received `count` messages.
    pub fn wait_for(&self, count: usize) {
        let end = Instant::now() + BOUND;
        while self.taken().len() < count {
            assert!(Instant::now() < end, "{} messages came, not {count}", self.taken().len());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        self.shared.has_ended.store(true, Ordering::SeqCst);
        // Wakes the thread in `accept`.
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let _ = TcpStream::connect_timeout(&address, Duration::from_millis(100));
    }
}

/// Registers, and renews the lease until the returned sender is dropped.
fn hold_lease(proxy: u16, packet: String, shared: Arc<Shared>) -> Sender<()> {
    let mut setup = Peer::connect(proxy);
    setup.send(&packet);
    let ack = setup.packet();
    assert_eq!((&ack["payload"], &ack["lease"]), (&"registered".into(), &LEASE.into()), "{ack}");
    let (held, dropped) = channel();
    thread::spawn(move || {
        while dropped.recv_timeout(RENEWAL) == Err(RecvTimeoutError::Timeout) {
            if !shared.renews.load(Ordering::SeqCst) {
                continue;
            }
            // The proxy may have ended.
            if setup.stream().write_all(packet.as_bytes()).is_err() || setup.line().is_empty() {
                return;
            }
        }
    });
    held
}

impl Shared {
    fn serve(&self, number: usize, stream: TcpStream) -> io::Result<()> {
        let mut connection = Connection::from_connected(stream, DEFAULT_MAX_PACKET)?;
        let mut held: Option<String> = None;
        loop {
            let limit = if held.is_some() { SWAP_LIMIT } else { 10 * BOUND };
            let message = match connection.receive(ReadTimeout::Until(Instant::now() + limit)) {
                Ok(Some(packet)) => serde_json::from_slice(packet)?,
                Err(_) if held.is_some() => {
                    connection.send(held.take().unwrap_or_default().as_bytes())?;
                    continue;
                }
                _ => return Ok(()),
            };
            let answer = self.record(number, &message, &connection);
            if answer == Answer::SwapWithNext && held.is_none() {
                held = Some(self.bytes(Answer::Ack, &message));
                continue;
            }
            let bytes = self.bytes(answer, &message) + &held.take().unwrap_or_default();
            if answer == Answer::InPieces {
                for byte in bytes.bytes() {
                    connection.send(&[byte])?;
                    thread::sleep(PIECE);
                }
            } else if let Answer::EndsLineAfter(pause) = answer {
                connection.send(bytes.trim_end().as_bytes())?;
                let sent = Instant::now();
                // Far shorter than a sleep.
                while sent.elapsed() < pause {}
                connection.send(b"\n")?;
            } else if !bytes.is_empty() {
                connection.send(bytes.as_bytes())?;
            }
            if matches!(answer, Answer::HalfThenClose | Answer::CloseAtOnce) {
                return Ok(());
            }
        }
    }

    /// Records a message. Returns its answer, after the delay of a late one.
    fn record(&self, connection: usize, message: &Value, stream: &Connection) -> Answer {
        let length = message["payload"].as_str().unwrap_or_default().len();
        let taken = {
            let mut all = self.taken.lock().unwrap();
            let number = all.len();
            all.push(Taken { number, connection, length, has_follower: false });
            all[number]
        };
        let answer = (self.script)(taken);
        if let Answer::Late(delay) = answer {
            thread::sleep(delay);
        }
        let has_follower = !stream.is_reusable();
        self.taken.lock().unwrap()[taken.number].has_follower = has_follower;
        answer
    }

    fn bytes(&self, answer: Answer, message: &Value) -> String {
        let ack = |client: &Value, payload: &str| {
            format!(
                "{{\"type\":2,\"srcid\":{},\"destid\":{client},\"payloadsize\":{},\"payload\":\"{payload}\"}}\n",
                self.id,
                payload.len()
            )
        };
        let client = &message["srcid"];
        let hash_of_payload = hash(message["payload"].as_str().unwrap_or_default());
        let right = ack(client, &hash_of_payload);
        match answer {
            Answer::Ack
            | Answer::SwapWithNext
            | Answer::Late(_)
            | Answer::EndsLineAfter(_)
            | Answer::InPieces => right,
            Answer::AckWith(fields) => right.replacen('{', &format!("{{{fields},"), 1),
            Answer::AckTwice => right.repeat(2),
            Answer::WrongHash => ack(client, &hash(&hash_of_payload)),
            Answer::OtherClient => ack(&json!("somebody else"), &hash_of_payload),
            Answer::Refuse(code) => refusal(code, &client.to_string()),
            Answer::Half | Answer::HalfThenClose => right[..right.len() / 2].to_owned(),
            Answer::Nonsense => "Bonjour!\n".to_owned(),
            Answer::TooLong => ack(client, &"0".repeat(DEFAULT_MAX_PACKET + 1)),
            Answer::LongResult => {
                let result = "x".repeat(1_000_000);
                right.replacen('{', &format!("{{\"result\":\"{result}\","), 1)
            }
            Answer::Skip | Answer::CloseAtOnce => String::new(),
        }
    }
}
