//! Servers that are not ours: the homework's, and such as misbehave.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use revproc::protocol::hash;
use rustix::net::{AddressFamily, SocketType, bind, listen, socket};

use super::{BOUND, Peer};

/// What the homework's servers pass to `listen`.
const BACKLOG: i32 = 10;

/// How a server behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// As it should.
    Good,
    /// Closes the connection after its ack.
    ClosesAfterEach,
    /// Acks late.
    Late(Duration),
    /// Acks, and a moment later acks again.
    AcksTwice(Duration),
    /// Acks one message on each connection, and closes it when a second one comes.
    ClosesAtSecond,
    /// Accepts, and says nothing.
    Silent,
    /// Sends half an ack, and no more.
    HalfAck,
    /// Sends half an ack and closes.
    HalfAckThenCloses,
    /// Answers with what is no packet.
    Nonsense,
    /// Acks to another client's id.
    OtherClient,
    /// Closes each connection as soon as it is there.
    ClosesAtOnce,
}

/// What a server's connections share.
struct Shared {
    manner: Mutex<Manner>,
    /// Answers sent so far, whether or not anybody took them.
    answers: AtomicUsize,
}

/// A server of this process, registered with a proxy until it is dropped.
pub struct Fake {
    /// Where it listens.
    pub port: u16,
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    /// What a lease is held through.
    _setup: Option<Peer>,
}

impl Fake {
    /// A server with a lease that does not end, which serves its connections side by side.
    pub fn leased(id: &'static str, policy: &str, proxy: u16, manner: Manner) -> Self {
        Self::start(id, policy, proxy, manner, true)
    }

    /// A server without a lease, which serves one connection after another.
    pub fn unleased(id: &'static str, policy: &str, proxy: u16, manner: Manner) -> Self {
        Self::start(id, policy, proxy, manner, false)
    }

    fn start(id: &'static str, policy: &str, proxy: u16, manner: Manner, leased: bool) -> Self {
        let listener = listener();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared { manner: Mutex::new(manner), answers: AtomicUsize::new(0) });
        let stop = Arc::new(AtomicBool::new(false));
        let (its_shared, its_stop) = (Arc::clone(&shared), Arc::clone(&stop));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if its_stop.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&its_shared);
                // A peer that goes away ends its connection, and nothing else.
                let serve = move || drop(stream.and_then(|stream| serve(id, stream, &shared)));
                if leased {
                    thread::spawn(serve);
                } else {
                    serve();
                }
            }
        });
        let mut setup = Peer::connect(proxy);
        // The longest lease that a proxy grants, so that nothing here needs to renew it.
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

    /// Waits until it has sent so many answers.
    pub fn wait_for_answers(&self, count: usize) {
        let end = Instant::now() + BOUND;
        while self.shared.answers.load(Ordering::SeqCst) < count {
            assert!(Instant::now() < end, "{count} answers are not sent");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread in `accept`. One that is busy with a connection ends after it.
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let _ = TcpStream::connect_timeout(&address, Duration::from_millis(100));
    }
}

/// As the homework's: std's own has a far longer backlog.
fn listener() -> TcpListener {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    listen(&socket, BACKLOG).unwrap();
    socket.into()
}

fn serve(id: &str, stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let now = || *shared.manner.lock().unwrap();
    if now() == Manner::ClosesAtOnce {
        return Ok(());
    }
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line)? > 0 {
        let message: serde_json::Value = serde_json::from_str(&line)?;
        let manner = now();
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
