//! Peers written by others: the tutorial's programs, and other readings of the homework.
//!
//! Each runs in a thread of the test, and panics where its program would. None of them frames
//! packets: they parse what one `recv` returns. Dropping the [`Actor`] ends the thread, and a panic
//! in it fails the test.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, JoinHandle};

use revproc::protocol::hash;
use serde_json::Value;

use super::{BOUND, dialect, tcp_socket};

/// The backlog of the tutorial's programs.
const BACKLOG: i32 = 10;

/// The size of their `recv`, in bytes.
const RECV: usize = 2048;

/// A bound port that refuses connections until [`listen`](Self::listen). To the proxy, it looks
/// like a server that registers first and binds later, but no other program can take the port.
pub struct Reserved {
    socket: OwnedFd,
    /// The port.
    pub port: u16,
}

impl Reserved {
    /// Reserves any free port.
    pub fn any() -> Self {
        let socket = tcp_socket();
        // A program under test may listen on it meanwhile.
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = SocketAddr::try_from(rustix::net::getsockname(&socket).unwrap()).unwrap();
        Reserved { socket, port: address.port() }
    }

    /// Accepts connections from now on.
    pub fn listen(self) -> TcpListener {
        self.listen_with(BACKLOG)
    }

    /// As [`listen`](Self::listen), with a backlog.
    pub fn listen_with(self, backlog: i32) -> TcpListener {
        rustix::net::listen(&self.socket, backlog).unwrap();
        self.socket.into()
    }
}

/// The sockets of an actor; shutting them down ends it.
#[derive(Default)]
pub struct Stage {
    ending: AtomicBool,
    streams: Mutex<Vec<Weak<TcpStream>>>,
    listeners: Mutex<Vec<TcpListener>>,
}

impl Stage {
    /// Returns whether the actor should end.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Adds a listener, to be shut down at the end.
    pub fn open(&self, listener: &TcpListener) {
        // Not under the lock: a panic would poison it, and another one as it is dropped is an abort.
        let listener = listener.try_clone().unwrap();
        self.listeners.lock().unwrap().push(listener);
        // If `end` ran just before, it did not see this listener.
        if self.is_ending() {
            self.end();
        }
    }

    /// Returns the next connection; `None` when the actor should end.
    pub fn accept(&self, listener: &TcpListener) -> Option<Arc<TcpStream>> {
        match listener.accept() {
            Ok((stream, _)) => {
                let stream = self.watch(stream);
                (!self.is_ending()).then_some(stream)
            }
            Err(_) if self.is_ending() => None,
            Err(error) => panic!("accept: {error}"),
        }
    }

    /// Connects to a local port.
    pub fn connect(&self, port: u16) -> Arc<TcpStream> {
        let stream = TcpStream::connect(("127.0.0.1", port))
            .unwrap_or_else(|error| panic!("port {port}: {error}"));
        self.watch(stream)
    }

    /// Parses what one `recv` of the tutorial's size returns; `None` at the end.
    pub fn recv(&self, stream: &TcpStream) -> Option<Value> {
        let bytes = self.recv_bytes(stream, RECV)?;
        Some(serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            panic!("json.loads: {error}: {:?}", String::from_utf8_lossy(&bytes))
        }))
    }

    /// Returns the bytes of one `recv` of at most `most`; `None` at the end.
    pub fn recv_bytes(&self, stream: &TcpStream, most: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; most];
        match (&*stream).read(&mut bytes) {
            Ok(0) => None,
            Ok(read) => {
                bytes.truncate(read);
                Some(bytes)
            }
            Err(_) if self.is_ending() => None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("recv: {error}"),
        }
    }

    /// Sets a socket's timeouts, and adds it, to be shut down at the end.
    fn watch(&self, stream: TcpStream) -> Arc<TcpStream> {
        stream.set_read_timeout(Some(BOUND)).unwrap();
        stream.set_write_timeout(Some(BOUND)).unwrap();
        let stream = Arc::new(stream);
        self.streams.lock().unwrap().push(Arc::downgrade(&stream));
        if self.is_ending() {
            self.end();
        }
        stream
    }

    fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        for listener in &*self.listeners.lock().unwrap() {
            let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
        }
        for stream in self.streams.lock().unwrap().iter().filter_map(Weak::upgrade) {
            // Fails if the connection has ended already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// A peer that runs a script in a thread.
pub struct Actor {
    stage: Arc<Stage>,
    thread: Option<JoinHandle<()>>,
}

impl Actor {
    /// Starts the script.
    pub fn play(script: impl FnOnce(&Stage) + Send + 'static) -> Self {
        let stage = Arc::<Stage>::default();
        let thread = thread::spawn({
            let stage = Arc::clone(&stage);
            move || script(&stage)
        });
        Actor { stage, thread: Some(thread) }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.stage.end();
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Starts an actor that runs `each` for one connection after another.
pub fn serve(listener: TcpListener, each: impl Fn(&Stage, &TcpStream) + Send + 'static) -> Actor {
    Actor::play(move |stage| {
        stage.open(&listener);
        while let Some(stream) = stage.accept(&listener) {
            each(stage, &stream);
        }
    })
}

/// Returns text as Python's `json.dumps` writes it: ASCII only.
pub fn dumps(text: &str) -> String {
    let json = serde_json::to_string(text).unwrap();
    json.encode_utf16()
        .map(|unit| match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii() => char::from(byte).to_string(),
            _ => format!("\\u{unit:04x}"),
        })
        .collect()
}

/// Returns a field that the tutorial's code assumes to be a string.
fn string<'a>(packet: &'a Value, field: &str) -> &'a str {
    packet[field].as_str().unwrap_or_else(|| panic!("KeyError or TypeError: {field} of {packet}"))
}

/// Returns a value as Python's `print` shows it.
pub fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// How one of the homework's servers behaves.
#[derive(Clone, Copy)]
pub struct Habits {
    /// Returns its setup packet, from id, policy and port.
    pub setup: fn(&str, &str, u16) -> String,
    /// Listens only after an answer to its setup packet.
    pub waits_for_an_answer: bool,
    /// Closes each connection after its first message.
    pub closes_after_a_message: bool,
    /// Returns its ack, from its id, the client's id and the hash.
    pub ack: fn(&str, &Value, &str) -> String,
}

/// The tutorial's server: all values are strings; it registers, closes, and only then listens.
pub const TUTORIAL: Habits = Habits {
    setup: dialect::STRINGS.setup,
    waits_for_an_answer: false,
    closes_after_a_message: false,
    ack: dialect::STRINGS.ack,
};

/// The homework taken literally: integers where it has integers.
pub const INTEGERS: Habits =
    Habits { setup: dialect::INTEGERS.setup, ack: dialect::INTEGERS.ack, ..TUTORIAL };

/// One of the homework's servers.
pub struct HomeworkServer {
    /// The port it listens on, or will.
    pub port: u16,
    _actor: Actor,
}

impl HomeworkServer {
    /// Starts a server that registers and then listens.
    pub fn start(id: &str, policy: &str, proxy: u16, habits: Habits) -> Self {
        Self::start_with(id, policy, proxy, habits, Reserved::listen)
    }

    /// Like [`start`](Self::start), but `listen` decides when to listen.
    pub fn start_with(
        id: &str,
        policy: &str,
        proxy: u16,
        habits: Habits,
        listen: impl FnOnce(Reserved) -> TcpListener + Send + 'static,
    ) -> Self {
        let (id, policy) = (id.to_owned(), policy.to_owned());
        let reserved = Reserved::any();
        let port = reserved.port;
        let actor = Actor::play(move |stage| {
            let setup = stage.connect(proxy);
            (&*setup).write_all((habits.setup)(&id, &policy, port).as_bytes()).unwrap();
            if habits.waits_for_an_answer {
                stage.recv(&setup).expect("an answer to the setup packet");
            }
            drop(setup);
            let listener = listen(reserved);
            stage.open(&listener);
            while let Some(stream) = stage.accept(&listener) {
                answer(stage, &stream, &id, habits);
            }
        });
        HomeworkServer { port, _actor: actor }
    }
}

fn answer(stage: &Stage, stream: &TcpStream, id: &str, habits: Habits) {
    while let Some(message) = stage.recv(stream) {
        let hash = hash(string(&message, "payload"));
        let ack = (habits.ack)(id, &message["srcid"], &hash);
        (&*stream).write_all(ack.as_bytes()).expect("the proxy waits for the ack");
        if habits.closes_after_a_message {
            return;
        }
    }
}

/// The homework's proxy: it serves one connection to its end, and then the next.
pub struct SerialProxy {
    /// The port it listens on.
    pub port: u16,
    registered: Receiver<String>,
    _actor: Actor,
}

/// How one of the homework's proxies behaves.
#[derive(Clone, Copy)]
pub struct ProxyHabits {
    /// Its answer to a setup packet; may be empty.
    pub answer: &'static str,
    /// The setup packet's field that it reads the policy from; it crashes if that is missing.
    pub spelling: &'static str,
    /// How many times it sends each ack.
    pub acks: usize,
    /// Answers one message per connection, and ignores all others.
    pub answers_one: bool,
}

/// The most common habits.
pub const HOMEWORK: ProxyHabits =
    ProxyHabits { answer: "", spelling: "privPolyId", acks: 1, answers_one: false };

/// The answer of one of them to a message for a policy without servers.
pub const NO_SERVER: &str = r#"{"Error": "No server currently serving this privacy policy"}"#;

impl SerialProxy {
    /// Starts a proxy that answers a setup packet with `answer`, which may be empty.
    pub fn start(answer: &'static str) -> Self {
        Self::of(ProxyHabits { answer, ..HOMEWORK })
    }

    /// Starts a proxy with these habits.
    pub fn of(habits: ProxyHabits) -> Self {
        Self::start_with(move |stage, listener, registered| {
            serial_proxy(stage, listener, habits, text, registered);
        })
    }

    fn start_with(
        script: impl FnOnce(&Stage, &TcpListener, &Sender<String>) + Send + 'static,
    ) -> Self {
        let listener = Reserved::any().listen();
        let port = listener.local_addr().unwrap().port();
        let (sender, registered) = channel();
        let actor = Actor::play(move |stage| script(stage, &listener, &sender));
        SerialProxy { port, registered, _actor: actor }
    }

    /// Waits for the next registration and returns the server's id.
    pub fn next_registered(&self) -> String {
        self.registered.recv_timeout(BOUND).expect("a server registers")
    }
}

/// Starts the tutorial's proxy: all values are strings, and it does not answer a setup packet.
pub fn tutorial_proxy() -> SerialProxy {
    // It compares `json_msg["type"] == "1"`, so it ignores packets with an integer.
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    SerialProxy::start_with(move |stage, listener, registered| {
        serial_proxy(stage, listener, HOMEWORK, text, registered);
    })
}

/// Runs a serial proxy. `text` returns the text of a value of the kinds that it understands.
fn serial_proxy(
    stage: &Stage,
    listener: &TcpListener,
    habits: ProxyHabits,
    text: impl Fn(&Value) -> String,
    registered: &Sender<String>,
) {
    let mut pools = HashMap::<String, Vec<u16>>::new();
    let mut turns = HashMap::<String, usize>::new();
    stage.open(listener);
    while let Some(stream) = stage.accept(listener) {
        while let Some(packet) = stage.recv(&stream) {
            match &*text(&packet["type"]) {
                "1" => {
                    let port = text(&packet["listenport"]).parse().expect("int()");
                    let policy = text(&packet[habits.spelling]);
                    assert_ne!(policy, "null", "KeyError: {}", habits.spelling);
                    pools.entry(policy).or_default().push(port);
                    (&*stream).write_all(habits.answer.as_bytes()).unwrap();
                    // The test may have ended.
                    let _ = registered.send(text(&packet["id"]));
                }
                "0" => {
                    let policy = text(&packet["privPoliId"]);
                    let turn = turns.entry(policy.clone()).or_default();
                    let Some(pool) = pools.get(&policy) else {
                        (&*stream).write_all(NO_SERVER.as_bytes()).unwrap();
                        continue;
                    };
                    let server = stage.connect(pool[*turn % pool.len()]);
                    *turn += 1;
                    (&*server).write_all(packet.to_string().as_bytes()).unwrap();
                    let ack = stage.recv(&server).expect("the server answers");
                    let acks = ack.to_string().repeat(habits.acks);
                    (&*stream).write_all(acks.as_bytes()).unwrap();
                    while habits.answers_one && stage.recv_bytes(&stream, RECV).is_some() {}
                }
                _ => {}
            }
        }
    }
}

/// Runs the tutorial's client: it sends one packet without a newline, keeps its side open, reads
/// once, and compares the hash.
pub fn tutorial_client(proxy: u16, policy: &str, payload: &str) -> Value {
    let packet = (dialect::STRINGS.message)("111", policy, payload.len(), &dumps(payload));
    let stage = Stage::default();
    let stream = stage.connect(proxy);
    (&*stream).write_all(packet.as_bytes()).unwrap();
    let ack = stage.recv(&stream).expect("an answer");
    assert_eq!(text(&ack["destid"]), "111", "{ack}");
    assert_eq!(string(&ack, "payload"), hash(payload), "{ack}");
    ack
}
