//! A server that behaves like the homework's, or misbehaves in a chosen way.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use revproc::protocol::hash;

use super::peers::Reserved;
use super::{BOUND, Peer};

/// How a server behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Acks each message.
    Good,
    /// Closes the connection after its ack.
    ClosesAfterEach,
    /// Acks late.
    Late(Duration),
    /// Acks, and acks again after this time.
    AcksTwice(Duration),
    /// Acks one message on each connection, and closes it when a second one arrives.
    ClosesAtSecond,
    /// Accepts, and sends nothing.
    Silent,
    /// Sends half an ack, and nothing more.
    HalfAck,
    /// Sends half an ack and closes.
    HalfAckThenCloses,
    /// Answers with something that is not a packet.
    Nonsense,
    /// Acks to another client's id.
    OtherClient,
    /// Closes each connection at once.
    ClosesAtOnce,
}

/// State shared by a server's connections.
struct Shared {
    manner: Mutex<Manner>,
    /// Answers sent so far, whether or not the peer received them.
    answers: AtomicUsize,
    /// Connections that have ended.
    ended: AtomicUsize,
}

/// A server of this process, registered with a proxy until it is dropped.
pub struct Fake {
    /// The port it listens on.
    pub port: u16,
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    /// The setup connection that holds the lease.
    _setup: Option<Peer>,
}

impl Fake {
    /// Starts a server with a long lease. It serves its connections in parallel.
    pub fn leased(id: &'static str, policy: &str, proxy: u16, manner: Manner) -> Self {
        Self::start(id, policy, proxy, manner, true)
    }

    /// Starts a server without a lease. It serves one connection at a time.
    pub fn unleased(id: &'static str, policy: &str, proxy: u16, manner: Manner) -> Self {
        Self::start(id, policy, proxy, manner, false)
    }

    fn start(id: &'static str, policy: &str, proxy: u16, manner: Manner, leased: bool) -> Self {
        let listener = Reserved::any().listen();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            manner: Mutex::new(manner),
            answers: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
        });
        let stop = Arc::new(AtomicBool::new(false));
        thread::spawn({
            let (shared, stop) = (Arc::clone(&shared), Arc::clone(&stop));
            move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let shared = Arc::clone(&shared);
                    // An error of the peer ends its connection only.
                    let serve = move || {
                        let _ = stream.and_then(|stream| serve(id, stream, &shared));
                        shared.ended.fetch_add(1, Ordering::SeqCst);
                    };
                    if leased {
                        thread::spawn(serve);
                    } else {
                        serve();
                    }
                }
            }
        });
        let mut setup = Peer::connect(proxy);
        // The longest lease that a proxy grants, so that it need not be renewed.
        let lease = if leased { r#", "lease": 60"# } else { "" };
        setup.send(format!(
            r#"{{"type": 1, "id": {id}, "privPolyId": "{policy}", "listenport": {port}{lease}}}"#
        ));
        assert_eq!(setup.packet()["payload"], "registered");
        Fake { port, shared, stop, _setup: leased.then_some(setup) }
    }

    /// Changes how it behaves from the next message on.
    pub fn behave(&self, manner: Manner) {
        *self.shared.manner.lock().unwrap() = manner;
    }

    /// Waits until it has sent `count` answers.
    pub fn wait_for_answers(&self, count: usize) {
        wait(&self.shared.answers, count, "answers are not sent");
    }

    /// Waits until `count` connections have ended.
    pub fn wait_for_ends(&self, count: usize) {
        wait(&self.shared.ended, count, "connections have not ended");
    }
}

fn wait(counter: &AtomicUsize, count: usize, what: &str) {
    let end = Instant::now() + BOUND;
    while counter.load(Ordering::SeqCst) < count {
        assert!(Instant::now() < end, "{count} {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread in `accept`. A busy one ends after its connection.
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let _ = TcpStream::connect_timeout(&address, Duration::from_millis(100));
    }
}

fn serve(id: &str, stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let manner = || *shared.manner.lock().unwrap();
    if manner() == Manner::ClosesAtOnce {
        return Ok(());
    }
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line)? > 0 {
        let message: serde_json::Value = serde_json::from_str(&line)?;
        let manner = manner();
        let client = match manner {
            Manner::OtherClient => serde_json::json!("somebody else"),
            _ => message["srcid"].clone(),
        };
        let payload = hash(message["payload"].as_str().unwrap_or_default());
        let ack = format!(
            "{{\"type\": 2, \"srcid\": {id}, \"destid\": {client}, \"payloadsize\": 40, \"payload\": \"{payload}\"}}\n"
        );
        let answer = match manner {
            Manner::Silent => "",
            Manner::HalfAck | Manner::HalfAckThenCloses => &ack[..ack.len() / 2],
            Manner::Nonsense => "Bonjour!\n",
            _ => &ack,
        };
        if let Manner::Late(delay) = manner {
            thread::sleep(delay);
        }
        let mut send = || {
            let sent = stream.get_mut().write_all(answer.as_bytes());
            shared.answers.fetch_add(1, Ordering::SeqCst);
            sent
        };
        send()?;
        if let Manner::AcksTwice(delay) = manner {
            thread::sleep(delay);
            send()?;
        }
        if manner == Manner::ClosesAtSecond {
            stream.read_line(&mut line)?;
            return Ok(());
        }
        if matches!(manner, Manner::ClosesAfterEach | Manner::HalfAckThenCloses) {
            return Ok(());
        }
        line.clear();
    }
    Ok(())
}
