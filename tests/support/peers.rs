//! Programs that other people wrote, or might have: the tutorial's and the homework's readings.
//!
//! Each is a thread of the test that does what its program would do, and panics where its program
//! would: none of them finds a packet's end, they take what one `recv` gives and parse that. The
//! thread ends when the value that stands for it is dropped, and a panic in it fails the test.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, JoinHandle};

use revproc::protocol::hash;
use rustix::net::{AddressFamily, SocketType};
use serde_json::Value;

use super::BOUND;

/// The backlog that the tutorial's programs ask for.
const BACKLOG: i32 = 10;

/// The most that those programs read at once.
const RECV: usize = 2048;

/// A port that is taken, and refuses connections until it is listened on. A server that registers
/// first and binds afterwards looks like this from outside; nobody else gets the port meanwhile.
pub struct Reserved {
    socket: OwnedFd,
    /// The port.
    pub port: u16,
}

impl Reserved {
    /// Reserves any free port.
    pub fn any() -> Self {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        // So that a program of ours may listen there while we hold the port.
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = SocketAddr::try_from(rustix::net::getsockname(&socket).unwrap()).unwrap();
        Reserved { socket, port: address.port() }
    }

    /// Takes connections from now on.
    pub fn listen(self) -> TcpListener {
        rustix::net::listen(&self.socket, BACKLOG).unwrap();
        self.socket.into()
    }
}

/// The sockets of an actor, through which it is ended.
#[derive(Default)]
pub struct Stage {
    ending: AtomicBool,
    streams: Mutex<Vec<Weak<TcpStream>>>,
    listeners: Mutex<Vec<TcpListener>>,
}

impl Stage {
    /// Whether the actor is to end.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Remembers a listener, so that the actor's end ends it too.
    pub fn open(&self, listener: &TcpListener) {
        self.listeners.lock().unwrap().push(listener.try_clone().unwrap());
        // Whoever came to end the actor before this did not see the listener.
        if self.is_ending() {
            self.end();
        }
    }

    /// The next connection; `None` when the actor is to end.
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

    /// Connects to a port of this machine.
    pub fn connect(&self, port: u16) -> Arc<TcpStream> {
        let stream = TcpStream::connect(("127.0.0.1", port))
            .unwrap_or_else(|error| panic!("port {port}: {error}"));
        self.watch(stream)
    }

    /// One `recv` of what the tutorial's programs take, parsed as they do; `None` at the end.
    pub fn recv(&self, stream: &TcpStream) -> Option<Value> {
        let bytes = self.recv_bytes(stream, RECV)?;
        Some(serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            panic!("json.loads: {error}: {:?}", String::from_utf8_lossy(&bytes))
        }))
    }

    /// One `recv` of at most `most` bytes; `None` at the end.
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

    /// Sets bounds on a socket, and remembers it as long as the script holds it.
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
            // It fails where the connection has ended, which is what is wanted.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// A peer that the test plays in a thread.
pub struct Actor {
    stage: Arc<Stage>,
    thread: Option<JoinHandle<()>>,
}

impl Actor {
    /// Starts to play.
    pub fn play(script: impl FnOnce(&Stage) + Send + 'static) -> Self {
        let stage = Arc::<Stage>::default();
        let scripted = Arc::clone(&stage);
        Actor { stage, thread: Some(thread::spawn(move || script(&scripted))) }
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

/// A fake server's part on each connection: what it does until the connection's end.
pub fn serve(listener: TcpListener, each: impl Fn(&Stage, &TcpStream) + Send + 'static) -> Actor {
    Actor::play(move |stage| {
        stage.open(&listener);
        while let Some(stream) = stage.accept(&listener) {
            each(stage, &stream);
        }
    })
}

/// Text as Python's `json.dumps` writes it: ASCII only.
pub fn dumps(text: &str) -> String {
    let json = serde_json::to_string(text).unwrap();
    json.encode_utf16()
        .map(|unit| match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii() => char::from(byte).to_string(),
            _ => format!("\\u{unit:04x}"),
        })
        .collect()
}

/// The text of a field that must be a string, as the tutorial's code takes it for granted.
fn string<'a>(packet: &'a Value, field: &str) -> &'a str {
    packet[field].as_str().unwrap_or_else(|| panic!("KeyError or TypeError: {field} of {packet}"))
}

/// A value as Python's `print` shows it.
pub fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// How one of the homework's servers goes about it.
#[derive(Clone, Copy)]
pub struct Habits {
    /// Its setup packet, from id, policy and port.
    pub setup: fn(&str, &str, u16) -> String,
    /// It does not listen before the proxy has answered its setup packet with anything.
    pub waits_for_an_answer: bool,
    /// It closes each connection after its first message.
    pub closes_after_a_message: bool,
    /// Its ack, from its id, the client's id as it came, and the hash.
    pub ack: fn(&str, &Value, &str) -> String,
}

/// The tutorial's server: strings throughout; registers, closes, and only then listens.
pub const TUTORIAL: Habits = Habits {
    setup: |id, policy, port| {
        format!(
            r#"{{"type": "1", "id": "{id}", "privPolyId": "{policy}", "listenport": "{port}"}}"#
        )
    },
    waits_for_an_answer: false,
    closes_after_a_message: false,
    ack: |id, client, hash| {
        format!(
            r#"{{"type": "2", "srcid": "{id}", "destid": {client}, "payloadsize": {}, "payload": "{hash}"}}"#,
            hash.len()
        )
    },
};

/// The homework read to the letter: integers where it has integers.
pub const INTEGERS: Habits = Habits {
    setup: |id, policy, port| {
        format!(r#"{{"type": 1, "id": {id}, "privPolyId": "{policy}", "listenport": {port}}}"#)
    },
    ack: |id, client, hash| {
        format!(
            r#"{{"type": 2, "srcid": {id}, "destid": {client}, "payloadsize": {}, "payload": "{hash}"}}"#,
            hash.len()
        )
    },
    ..TUTORIAL
};

/// One of the homework's servers.
pub struct HomeworkServer {
    /// Where it listens, or is about to.
    pub port: u16,
    _actor: Actor,
}

impl HomeworkServer {
    /// Registers with the proxy, and then listens.
    pub fn start(id: &str, policy: &str, proxy: u16, habits: Habits) -> Self {
        Self::start_with(id, policy, proxy, habits, Reserved::listen)
    }

    /// As [`start`](Self::start), but `listen` listens, when the test is ready for that.
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

/// A proxy as the homework's: it serves one connection to its end, and then the next.
pub struct SerialProxy {
    /// Where it listens.
    pub port: u16,
    registered: Receiver<String>,
    _actor: Actor,
}

/// How one of the homework's proxies goes about it.
#[derive(Clone, Copy)]
pub struct ProxyHabits {
    /// What it answers to a setup packet, which may be nothing.
    pub answer: &'static str,
    /// The field of a setup packet in which it looks for the policy; without it, it crashes.
    pub spelling: &'static str,
    /// How often it sends each ack.
    pub acks: usize,
    /// It answers one message per connection, and then reads what else comes to no purpose.
    pub answers_one: bool,
}

/// The habits of most.
pub const HOMEWORK: ProxyHabits =
    ProxyHabits { answer: "", spelling: "privPolyId", acks: 1, answers_one: false };

/// What one of them says where nobody serves a policy.
pub const NO_SERVER: &str = r#"{"Error": "No server currently serving this privacy policy"}"#;

impl SerialProxy {
    /// Starts to listen. A setup packet is answered with `answer`, which may be nothing.
    pub fn start(answer: &'static str) -> Self {
        Self::of(ProxyHabits { answer, ..HOMEWORK })
    }

    /// Starts to listen, with these habits.
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

    /// Waits until the next server is registered, and gives its id.
    pub fn next_registered(&self) -> String {
        self.registered.recv_timeout(BOUND).expect("a server registers")
    }
}

/// The tutorial's proxy: strings throughout, and no answer to a setup packet.
pub fn tutorial_proxy() -> SerialProxy {
    // `json_msg["type"] == "1"`: an integer is equal to neither, and nothing happens.
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    SerialProxy::start_with(move |stage, listener, registered| {
        serial_proxy(stage, listener, HOMEWORK, text, registered);
    })
}

/// `text` gives the text of a value of the kind that this proxy understands.
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
                    // Only the test may be gone.
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

/// The tutorial's client: sends one packet without a newline, keeps its side open, reads once, and
/// compares the hash.
pub fn tutorial_client(proxy: u16, policy: &str, payload: &str) -> Value {
    let packet = format!(
        r#"{{"type": "0", "srcid": "111", "privPoliId": "{policy}", "payloadsize": "{}", "payload": {}}}"#,
        payload.len(),
        dumps(payload)
    );
    let stage = Stage::default();
    let stream = stage.connect(proxy);
    (&*stream).write_all(packet.as_bytes()).unwrap();
    let ack = stage.recv(&stream).expect("an answer");
    assert_eq!(text(&ack["destid"]), "111", "{ack}");
    assert_eq!(string(&ack, "payload"), hash(payload), "{ack}");
    ack
}
