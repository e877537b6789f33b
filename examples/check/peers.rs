//! The peers that the checker plays, where a case needs exact bytes: the proxy of a server or a
//! client, and the servers of a proxy.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use revproc::protocol::hash;
use serde_json::Value;

use crate::bench::Bench;
use crate::cases::Failure;
use crate::fair;
use crate::hindrance;
use crate::program::lock;
use crate::support::dialect::{Dialect, with};
use crate::support::peers::{Actor, Reserved, Stage, text};
use crate::wire::{Came, Clock, Wire};

/// How long a proxy is given to take a registration, unless it says something or closes sooner: the
/// homework has no answer to a setup packet.
const SETTLE: Duration = Duration::from_millis(300);

/// How often a played server looks how much has come of a packet that is not whole, and whether it should
/// answer.
pub const LOOK: Duration = Duration::from_millis(100);

/// Starts an actor that runs `each` for every connection, side by side.
fn serve_side_by_side(
    listener: TcpListener,
    each: impl Fn(&Stage, &TcpStream) + Send + Sync + 'static,
) -> Actor {
    Actor::play(move |stage| {
        stage.open(&listener);
        thread::scope(|scope| {
            let each = &each;
            while let Some(stream) = stage.accept(&listener) {
                scope.spawn(move || each(stage, &stream));
            }
        });
    })
}

/// What arrived at a played proxy.
pub enum Event {
    /// A packet.
    Packet(Value),
    /// Something else.
    Problem(Came),
}

impl Event {
    /// Returns the packet, if it is one.
    pub fn packet(self) -> Option<Value> {
        match self {
            Event::Packet(packet) => Some(packet),
            Event::Problem(_) => None,
        }
    }
}

/// A proxy that takes registrations, and answers messages as a case likes.
pub struct PlayedProxy {
    /// The port it listens on.
    pub port: u16,
    /// What arrived, in order.
    pub events: Mutex<Receiver<Event>>,
    _actor: Actor,
}

impl PlayedProxy {
    /// Starts it, with its name for the notes. `welcome` answers a setup packet, and `answer` a
    /// message, both given the ack.
    pub fn start(
        bench: &Bench,
        name: &'static str,
        welcome: impl Fn(&mut Wire, &Value, &str) + Send + Sync + 'static,
        answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let (listener, port) = listen()?;
        let (dialect, clock) = (bench.dialect, bench.clock.clone());
        let (sender, events) = channel();
        let sender = Mutex::new(sender);
        let has_begun = AtomicBool::new(false);
        let actor = serve_side_by_side(listener, move |_, stream| {
            let sender = lock(&sender).clone();
            let Some(mut wire) = wire(stream, name, &clock) else { return };
            while let Some(packet) = next(&mut wire, &clock, &sender) {
                // The program may have taken its time to start.
                if !has_begun.swap(true, Ordering::Relaxed) {
                    clock.renew();
                }
                if text(&packet["type"]) == "1" {
                    welcome(&mut wire, &packet, &(dialect.ack)("0", &packet["id"], "registered"));
                }
                // The case may have ended.
                let _ = sender.send(Event::Packet(packet.clone()));
                if text(&packet["type"]) != "1"
                    && let Err(came) = answer(&mut wire, &packet, &ack(&dialect, "1", &packet))
                {
                    let _ = sender.send(Event::Problem(came));
                    return;
                }
            }
        });
        Ok(PlayedProxy { port, events: Mutex::new(events), _actor: actor })
    }
}

/// Answers a setup packet with an ack, as some servers want it. Those that want none have closed by
/// now, and miss nothing.
pub fn ack_setup(wire: &mut Wire, _setup: &Value, ack: &str) {
    let _ = wire.send(ack);
}

/// The next packet of a connection. Something else is reported, but the end after a packet.
fn next(wire: &mut Wire, clock: &Clock, sender: &Sender<Event>) -> Option<Value> {
    loop {
        match wire.packet_until(fair::now() + clock.limit()) {
            Ok(packet) => return Some(packet),
            Err(Came::Nothing(_)) => {}
            Err(Came::End) => return None,
            Err(came) => {
                // The case may have ended.
                let _ = sender.send(Event::Problem(came));
                return None;
            }
        }
    }
}

/// A port that takes no more connections: who connects waits for the system to try again.
pub struct Busy {
    /// The port.
    pub port: u16,
    _listener: TcpListener,
    _queued: Vec<TcpStream>,
}

impl Busy {
    /// Listens without accepting, and fills the queue.
    pub fn start() -> Self {
        let reserved = Reserved::any();
        let port = reserved.port;
        let listener = reserved.listen_with(0);
        // One more than the backlog says; some systems take another.
        let address = ([127, 0, 0, 1], port).into();
        let connect = || {
            TcpStream::connect_timeout(&address, Duration::from_millis(50))
                .inspect_err(hindrance::note_if_scarce)
        };
        let queued = std::iter::from_fn(|| connect().ok()).take(8).collect();
        Busy { port, _listener: listener, _queued: queued }
    }
}

/// What arrived at played servers.
#[derive(Clone, Default)]
pub struct Log {
    /// The messages, with the server's id, in order.
    pub messages: Arc<Mutex<Vec<(&'static str, Value)>>>,
    /// The bytes of one that is not whole, the last time that there was one.
    pub part: Arc<AtomicUsize>,
}

/// A server that answers each message as a case likes, on any number of connections.
pub struct PlayedServer {
    /// The port it listens on.
    pub port: u16,
    _actor: Actor,
}

impl PlayedServer {
    /// Starts it. It is not registered.
    pub fn start(
        bench: &Bench,
        id: &'static str,
        log: &Log,
        answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let (listener, port) = listen()?;
        let (dialect, clock, log) = (bench.dialect, bench.clock.clone(), log.clone());
        let actor = serve_side_by_side(listener, move |_, stream| {
            let Some(mut wire) = wire(stream, &format!("server {id}"), &clock) else { return };
            // How long the proxy keeps a connection is its own affair; the end of the case ends it.
            loop {
                match wire.packet_until(fair::now() + LOOK) {
                    Ok(packet) => {
                        lock(&log.messages).push((id, packet.clone()));
                        if answer(&mut wire, &packet, &ack(&dialect, id, &packet)).is_err() {
                            return;
                        }
                    }
                    Err(Came::Nothing(_)) => {}
                    Err(Came::Part(bytes, _)) => log.part.store(bytes, Ordering::Relaxed),
                    Err(Came::EndInside(bytes)) => {
                        log.part.store(bytes, Ordering::Relaxed);
                        return;
                    }
                    Err(_) => return,
                }
            }
        });
        Ok(PlayedServer { port, _actor: actor })
    }
}

/// Registers with a proxy as the homework's servers do: the packet, and the end of the connection.
pub fn register(bench: &Bench, proxy: u16, setup: &str) -> Result<(), Came> {
    let mut wire = Wire::connect(proxy, "a server", &bench.clock)?;
    wire.send(setup)?;
    wire.half_close();
    // An answer, the end, and neither are all right.
    let _ = wire.packet_until(fair::now() + SETTLE);
    Ok(())
}

/// Returns a setup packet that carries the policy under both spellings, since programs differ in
/// which one they read.
pub fn setup(dialect: &Dialect, id: &str, policy: &str, port: u16) -> String {
    with(&(dialect.setup)(id, policy, port), &format!(r#""privPoliId": "{policy}""#))
}

fn ack(dialect: &Dialect, id: &str, message: &Value) -> String {
    let hash = hash(message["payload"].as_str().unwrap_or_default());
    (dialect.ack)(id, &message["srcid"], &hash)
}

fn listen() -> Result<(TcpListener, u16), Failure> {
    let failed = |error: std::io::Error| Failure::ours(format!("could not listen: {error}"));
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    Ok((listener, port))
}

fn wire(stream: &TcpStream, name: &str, clock: &Clock) -> Option<Wire> {
    let note = |error: &_| hindrance::note(format_args!("could not serve a connection: {error}"));
    Some(Wire::new(stream.try_clone().inspect_err(note).ok()?, name, clock))
}
