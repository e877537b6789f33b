//! What a case works with: its clock, its dialect, and the checked programs, which end with it.

use std::fs;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cases::{Failure, Role};
use crate::fair;
use crate::peers::{Event, PlayedProxy, PlayedServer, ack_setup};
use crate::ports::listens;
use crate::program::{Program, Template, lock};
use crate::support::dialect::Dialect;
use crate::support::fixed_port;
use crate::wire::{Came, Clock, Wire};

/// How long a program may take to start; some load much before they begin, on a busy machine.
pub const START: Duration = Duration::from_secs(20);

/// What is said where a program starts, but not each time.
const SOMETIMES: &str = "It did start before. The machine may be very busy, or something that one run leaves behind is in the next one's way.";

/// How long a program has for its last words.
const WORDS: Duration = Duration::from_millis(100);

/// The client's id in what the checker sends, the server's in what it starts, and their policy.
pub const CLIENT: &str = "50";
/// The id of a checked server.
pub const SERVER: &str = "100";
/// The policy.
pub const POLICY: &str = "PP_1";

/// How a played proxy is called in the notes.
pub const PROXY: &str = "the proxy";

/// What is checked, and how.
pub struct Setting {
    /// The programs of the proxy, the server and the client.
    pub programs: [Template; 3],
    /// Which of them are ours, in place of those that were not given.
    pub ours: [bool; 3],
    /// The dialect that the checker speaks.
    pub dialect: Dialect,
    /// The one that it speaks where a case is about the other one.
    pub other: Dialect,
    /// How long a case may wait.
    pub limit: Duration,
    /// When everything must have ended.
    pub last: Instant,
    /// Where packet files are written.
    pub folder: PathBuf,
}

/// One case's programs and time.
pub struct Bench {
    pub setting: Arc<Setting>,
    pub dialect: Dialect,
    pub other: Dialect,
    pub clock: Clock,
    // Ended in this order: what a program says to the end of its peers is of no interest.
    pub programs: Mutex<Vec<(Role, Arc<Program>)>>,
    proxies: Mutex<Vec<Arc<PlayedProxy>>>,
    /// The servers that are played, with their ids.
    pub servers: Mutex<Vec<(&'static str, PlayedServer)>>,
}

/// How a checked client ran.
pub struct ClientRun {
    /// What it sent.
    pub packet: Value,
    /// How it ended; `None` if it did not.
    pub status: Option<ExitStatus>,
    /// What it wrote.
    pub output: String,
}

impl Bench {
    /// Begins a case.
    pub fn new(setting: &Arc<Setting>) -> Self {
        Bench {
            setting: Arc::clone(setting),
            dialect: setting.dialect,
            other: setting.other,
            clock: Clock::start(setting.limit, setting.last),
            programs: Mutex::default(),
            proxies: Mutex::default(),
            servers: Mutex::default(),
        }
    }

    /// Plays a proxy until the end of the case.
    pub fn play_proxy(
        &self,
        welcome: impl Fn(&mut Wire, &Value, &str) + Send + Sync + 'static,
        answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
    ) -> Result<Arc<PlayedProxy>, Failure> {
        self.play(PROXY, welcome, answer)
    }

    /// As [`play_proxy`](Self::play_proxy), with this name in the notes.
    fn play(
        &self,
        name: &'static str,
        welcome: impl Fn(&mut Wire, &Value, &str) + Send + Sync + 'static,
        answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
    ) -> Result<Arc<PlayedProxy>, Failure> {
        let proxy = Arc::new(PlayedProxy::start(self, name, welcome, answer)?);
        lock(&self.proxies).push(Arc::clone(&proxy));
        Ok(proxy)
    }

    /// Returns a data packet for [`POLICY`], as the homework's clients write it.
    pub fn message(&self, payload: &str) -> String {
        message(&self.dialect, POLICY, payload)
    }

    /// As [`message`](Self::message), from a client with this id.
    pub fn message_from(&self, client: &str) -> String {
        message_from(&self.dialect, client, POLICY, "hello")
    }

    /// Starts the proxy, and waits until it listens.
    pub fn start_proxy(&self) -> Result<u16, Failure> {
        let port = fixed_port();
        let program = self.start(Role::Proxy, &[("port", &port.to_string())])?;
        self.wait_until_listening(&program, port)?;
        self.clock.renew();
        Ok(port)
    }

    /// Starts a server for a proxy's port. It may neither listen yet nor have registered.
    pub fn start_server(&self, proxy: u16) -> Result<(Arc<Program>, u16), Failure> {
        self.start_server_as(proxy, SERVER, POLICY)
    }

    /// As [`start_server`](Self::start_server), with this id and policy.
    pub fn start_server_as(
        &self,
        proxy: u16,
        id: &str,
        policy: &str,
    ) -> Result<(Arc<Program>, u16), Failure> {
        let port = fixed_port();
        let values = [
            ("id", id),
            ("pp", policy),
            ("listen", &port.to_string()),
            ("revproc", &proxy.to_string()),
        ];
        Ok((self.start(Role::Server, &values)?, port))
    }

    /// Starts a client for a proxy's port, with this content in its packet file.
    pub fn start_client(&self, proxy: u16, content: &str) -> Result<Arc<Program>, Failure> {
        self.start_client_as(proxy, CLIENT, content)
    }

    fn start_client_as(
        &self,
        proxy: u16,
        id: &str,
        content: &str,
    ) -> Result<Arc<Program>, Failure> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = self.setting.folder.join(format!("packet-{number}.json"));
        fs::write(&file, content)
            .map_err(|error| Failure::ours(format!("{}: {error}", file.display())))?;
        let file = file.display().to_string();
        let values = [("id", id), ("revproc", &proxy.to_string()), ("pkt", &file)];
        self.start(Role::Client, &values)
    }

    /// Runs a client with this content in its packet file, to its end or the end of the case's time.
    /// `answer` answers its packet.
    pub fn client(
        &self,
        content: &str,
        answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
    ) -> Result<ClientRun, Failure> {
        self.client_as(CLIENT, content, PROXY, answer)
    }

    /// As [`client`](Self::client), with this id, and this name for who answers.
    pub fn client_as(
        &self,
        id: &str,
        content: &str,
        name: &'static str,
        answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
    ) -> Result<ClientRun, Failure> {
        let proxy = self.play(name, ack_setup, answer)?;
        let program = self.start_client_as(proxy.port, id, content)?;
        let packet = self.first_packet(&proxy, &program)?;
        self.clock.renew();
        let status = program.wait(self.clock.end());
        Ok(ClientRun { packet, status, output: program.output() })
    }

    /// Waits for the first packet that a program of ours sends to the played proxy.
    pub fn first_packet(&self, proxy: &PlayedProxy, program: &Program) -> Result<Value, Failure> {
        let mut end = self.clock.start_end(START);
        loop {
            match lock(&proxy.events).recv_timeout(Duration::from_millis(20)) {
                Ok(Event::Packet(packet)) => return Ok(packet),
                Ok(Event::Problem(came)) => return Err(came.into()),
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::ours("no peer")),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if program.ended().is_some() {
                // What it sent may still be on its way.
                end = end.min(fair::now() + Duration::from_millis(300));
            }
            if fair::now() > end {
                return Err(Failure::came("it sent no packet to the proxy's port"));
            }
        }
    }

    /// Connects to a port on which a program listens, or will.
    pub fn connect_patiently(&self, port: u16, name: &str) -> Result<Wire, Came> {
        wait_for(self.clock.end(), || listens(port));
        Wire::connect(port, name, &self.clock)
    }

    /// Returns what the programs said that explains a failure.
    pub fn last_words(&self) -> Vec<String> {
        // What goes wrong is often still being written.
        thread::sleep(WORDS);
        let programs = lock(&self.programs);
        let mut words: Vec<_> = programs
            .iter()
            .filter_map(|(role, program)| {
                let is_fine = *role == Role::Client;
                Some(format!("the {role} {}", program.last_words(is_fine)?))
            })
            .collect();
        words.dedup();
        words.truncate(3);
        words
    }

    /// Returns everything that the programs wrote, each line with its role.
    pub fn outputs(&self) -> Vec<String> {
        let programs = lock(&self.programs);
        let of = |(role, program): &(Role, Arc<Program>)| {
            let lines: Vec<_> =
                program.output().lines().take(60).map(|line| format!("{role}| {line}")).collect();
            lines
        };
        programs.iter().flat_map(of).collect()
    }

    /// Returns what the program of a role wrote on standard output.
    pub fn out(&self, role: Role) -> String {
        let programs = lock(&self.programs);
        programs.iter().filter(|(of, _)| *of == role).map(|(_, program)| program.out()).collect()
    }

    fn start(&self, role: Role, values: &[(&str, &str)]) -> Result<Arc<Program>, Failure> {
        let command = self.setting.programs[role as usize].fill(values);
        self.clock.note(format_args!("the {role} is started: {command}"));
        let program = Arc::new(Program::start(command).map_err(Failure::ours)?);
        lock(&self.programs).push((role, Arc::clone(&program)));
        Ok(program)
    }

    fn wait_until_listening(&self, program: &Program, port: u16) -> Result<(), Failure> {
        let is_there = || listens(port) || program.ended().is_some();
        let came = match (wait_for(self.clock.start_end(START), is_there), program.ended()) {
            (true, None) => return Ok(()),
            (_, Some(_)) => format!("it ended before it listened on port {port}"),
            (false, None) => {
                format!("it does not listen on port {port}, the one that it was given")
            }
        };
        Err(Failure::because(came, SOMETIMES))
    }
}

/// Returns a data packet for a policy in a dialect, with the payload in UTF-8.
pub fn message(dialect: &Dialect, policy: &str, payload: &str) -> String {
    message_from(dialect, CLIENT, policy, payload)
}

/// As [`message`], from a client with this id.
pub fn message_from(dialect: &Dialect, client: &str, policy: &str, payload: &str) -> String {
    let json = Value::from(payload).to_string();
    (dialect.message)(client, policy, payload.len(), &json)
}

/// Answers a message with its ack.
pub fn answer_with_ack(wire: &mut Wire, _message: &Value, ack: &str) -> Result<(), Came> {
    wire.send(ack)
}

/// Waits until `end`, by [`fair`] time, for a condition, and returns whether it came.
pub fn wait_for(end: Instant, condition: impl Fn() -> bool) -> bool {
    let mut pause = Duration::from_millis(1);
    while !condition() {
        if fair::now() > end {
            return false;
        }
        // Many cases wait at once, and what they wait for costs the system something to say.
        thread::sleep(pause);
        pause = (2 * pause).min(Duration::from_millis(16));
    }
    true
}
