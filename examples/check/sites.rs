//! A checked proxy among played servers and clients, and a checked server with a played proxy.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::Value;

use crate::bench::{Bench, POLICY, SERVER, answer_with_ack, message};
use crate::cases::{Failure, Verdict, check_ack};
use crate::fair;
use crate::peers::{Log, PlayedServer, ack_setup, register, setup};
use crate::program::lock;
use crate::support::dialect::Dialect;
use crate::support::peers::text;
use crate::wire::{Came, Wire};

/// How long a program may say something about bad input, before its peer goes.
const MOMENT: Duration = Duration::from_millis(300);

/// A checked proxy, with the servers that are played for it.
pub struct ProxySite<'a> {
    pub bench: &'a Bench,
    /// The proxy's port.
    pub port: u16,
    log: Log,
}

impl<'a> ProxySite<'a> {
    /// Starts the proxy, and registers servers that ack: their ids and policies.
    pub fn start(bench: &'a Bench, servers: &[(&'static str, &str)]) -> Result<Self, Failure> {
        let port = bench.start_proxy()?;
        let site = ProxySite { bench, port, log: Log::default() };
        for (id, policy) in servers {
            site.add(id, policy)?;
        }
        Ok(site)
    }

    /// Starts with one server of [`POLICY`], which answers like this.
    pub fn with(
        bench: &'a Bench,
        answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let site = Self::start(bench, &[])?;
        site.add_with("1", POLICY, answer)?;
        Ok(site)
    }

    /// Registers a server that acks.
    pub fn add(&self, id: &'static str, policy: &str) -> Verdict {
        self.add_with(id, policy, answer_with_ack)
    }

    /// Registers a server that answers like this.
    pub fn add_with(
        &self,
        id: &'static str,
        policy: &str,
        answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
    ) -> Verdict {
        let port = self.play(id, answer)?;
        Ok(register(self.bench, self.port, &setup(&self.bench.dialect, id, policy, port))?)
    }

    /// Plays a server without registering it, and returns its port.
    pub fn play(
        &self,
        id: &'static str,
        answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
    ) -> Result<u16, Failure> {
        let server = PlayedServer::start(self.bench, id, &self.log, answer)?;
        let port = server.port;
        lock(&self.bench.servers).push((id, server));
        Ok(port)
    }

    /// Ends a server: its port refuses connections from now on.
    pub fn kill(&self, id: &str) {
        let mut servers = lock(&self.bench.servers);
        self.bench.clock.note(format_args!("server {id} ends"));
        servers.retain(|(of, _)| *of != id);
    }

    /// Returns the port of a server.
    pub fn port_of(&self, id: &str) -> u16 {
        let servers = lock(&self.bench.servers);
        servers.iter().find(|(of, _)| *of == id).map_or(0, |(_, server)| server.port)
    }

    /// Connects as a client.
    pub fn client(&self) -> Result<Wire, Came> {
        Wire::connect(self.port, "a client", &self.bench.clock)
    }

    /// Sends a packet on a connection of its own, and returns the answer, whatever it is.
    pub fn ask(&self, packet: &str) -> Result<Value, Came> {
        let mut client = self.client()?;
        client.send(packet)?;
        client.packet()
    }

    /// As [`ask`](Self::ask), and looks for the reason where no answer comes.
    pub fn ask_why(&self, packet: &str) -> Result<Value, Failure> {
        let mut client = self.client()?;
        client.send(packet)?;
        answer(client)
    }

    /// Sends a message on a connection of its own, which must be acked.
    pub fn deliver(&self, policy: &str, payload: &str) -> Verdict {
        self.deliver_in(&self.bench.dialect, policy, payload)
    }

    /// As [`deliver`](Self::deliver), in a dialect.
    pub fn deliver_in(&self, dialect: &Dialect, policy: &str, payload: &str) -> Verdict {
        check_ack(&self.ask(&message(dialect, policy, payload))?, payload)
    }

    /// Sends bytes on a connection of its own, gives the proxy a moment, and goes.
    pub fn disturb(&self, bytes: impl AsRef<[u8]>) -> Verdict {
        disturb(self.client()?, bytes)
    }

    /// Returns the messages that servers got so far, with the server's id.
    pub fn received(&self) -> Vec<(&'static str, Value)> {
        lock(&self.log.messages).clone()
    }

    /// Returns the bytes that a server got of a message that is not whole; 0 for none.
    pub fn received_part(&self) -> usize {
        self.log.part.load(Ordering::Relaxed)
    }

    /// Returns the servers that got messages so far, in order.
    pub fn order(&self) -> Vec<&'static str> {
        lock(&self.log.messages).iter().map(|(id, _)| *id).collect()
    }
}

/// A checked server, registered with a played proxy.
pub struct ServerSite<'a> {
    pub bench: &'a Bench,
    /// Its setup packet.
    pub setup: Value,
    /// The port that it was given.
    pub given: u16,
    /// The port that it registered.
    pub port: u16,
}

impl<'a> ServerSite<'a> {
    /// Starts the server, and waits for its registration.
    pub fn start(bench: &'a Bench) -> Result<Self, Failure> {
        Self::with(bench, ack_setup)
    }

    /// As [`start`](Self::start), with this id and policy.
    pub fn start_as(bench: &'a Bench, id: &str, policy: &str) -> Result<Self, Failure> {
        Self::start_with(bench, id, policy, ack_setup)
    }

    /// As [`start`](Self::start), where `welcome` answers its setup packet.
    pub fn with(
        bench: &'a Bench,
        welcome: impl Fn(&mut Wire, &Value, &str) + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        Self::start_with(bench, SERVER, POLICY, welcome)
    }

    fn start_with(
        bench: &'a Bench,
        id: &str,
        policy: &str,
        welcome: impl Fn(&mut Wire, &Value, &str) + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let proxy = bench.play_proxy(welcome, answer_with_ack)?;
        let (program, given) = bench.start_server_as(proxy.port, id, policy)?;
        let setup = bench
            .first_packet(&proxy, &program)
            .map_err(|failure| failure.when("as its registration"))?;
        let port = text(&setup["listenport"]).parse().unwrap_or(given);
        bench.clock.renew();
        Ok(ServerSite { bench, setup, given, port })
    }

    /// Connects as the proxy does for a message; the server may not listen quite yet.
    pub fn connect(&self) -> Result<Wire, Came> {
        self.bench.connect_patiently(self.port, "the proxy")
    }

    /// Sends a packet on a connection of its own, and returns the answer.
    pub fn ask(&self, packet: &str) -> Result<Value, Came> {
        let mut wire = self.connect()?;
        wire.send(packet)?;
        wire.packet()
    }

    /// As [`ask`](Self::ask), and looks for the reason where no answer comes.
    pub fn ask_why(&self, packet: &str) -> Result<Value, Failure> {
        let mut wire = self.connect()?;
        wire.send(packet)?;
        answer(wire)
    }

    /// Sends a message on a connection of its own, which must be acked.
    pub fn deliver(&self, payload: &str) -> Verdict {
        check_ack(&self.ask(&self.bench.message(payload))?, payload)
    }

    /// Sends bytes on a connection of its own, gives the server a moment, and goes.
    pub fn disturb(&self, bytes: impl AsRef<[u8]>) -> Verdict {
        disturb(self.connect()?, bytes)
    }
}

/// Returns the next packet. Where none comes, tries whether the program waits for something that no
/// packet has.
fn answer(mut wire: Wire) -> Result<Value, Failure> {
    let came = match wire.packet() {
        Err(came @ Came::Nothing(_)) => came,
        result => return Ok(result?),
    };
    let comes = |wire: &mut Wire| wire.packet_until(fair::now() + MOMENT).is_ok();
    if wire.send("\n").is_ok() && comes(&mut wire) {
        return Err(Failure::because(
            format!("{came}; then a line break was sent, and the answer came"),
            "It waits for a line break, which the homework's packets do not end with. Look at what reads the packet: it is whole when its last brace has come.",
        ));
    }
    wire.half_close();
    if comes(&mut wire) {
        return Err(Failure::because(
            format!("{came}; then the sending side was ended, and the answer came"),
            "It reads until the connection ends, and the other side waits for the answer before it closes. Look at what reads the packet: it is whole when its last brace has come.",
        ));
    }
    Err(came.into())
}

fn disturb(mut wire: Wire, bytes: impl AsRef<[u8]>) -> Verdict {
    // Whatever it says to that, or that it says nothing, is its own affair.
    let _ = wire.send(bytes);
    let _ = wire.packet_until(fair::now() + MOMENT);
    wire.half_close();
    let _ = wire.ends_by(fair::now() + MOMENT / 3);
    Ok(())
}
