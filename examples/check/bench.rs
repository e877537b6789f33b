//! What a case works with: its clock, its dialect, and the checked programs, which end with it.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType, connect, socket, sockopt};
use serde_json::Value;

use crate::cases::{Failure, Role};
use crate::peers::{Event, PlayedProxy, PlayedServer, ack_setup};
use crate::program::{Program, Template, lock, shorten};
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
    programs: Mutex<Vec<(Role, Arc<Program>)>>,
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
        let proxy = Arc::new(PlayedProxy::start(self, welcome, answer)?);
        lock(&self.proxies).push(Arc::clone(&proxy));
        Ok(proxy)
    }

    /// Returns a data packet for [`POLICY`], as the homework's clients write it.
    pub fn message(&self, payload: &str) -> String {
        message(&self.dialect, POLICY, payload)
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
        let port = fixed_port();
        let values = [
            ("id", SERVER),
            ("pp", POLICY),
            ("listen", &port.to_string()),
            ("revproc", &proxy.to_string()),
        ];
        Ok((self.start(Role::Server, &values)?, port))
    }

    /// Starts a client for a proxy's port, with this content in its packet file.
    pub fn start_client(&self, proxy: u16, content: &str) -> Result<Arc<Program>, Failure> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = self.setting.folder.join(format!("packet-{number}.json"));
        fs::write(&file, content)
            .map_err(|error| Failure::ours(format!("{}: {error}", file.display())))?;
        let file = file.display().to_string();
        let values = [("id", CLIENT), ("revproc", &proxy.to_string()), ("pkt", &file)];
        self.start(Role::Client, &values)
    }

    /// Runs a client with this content in its packet file, to its end or the end of the case's time.
    /// `answer` answers its packet.
    pub fn client(
        &self,
        content: &str,
        answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
    ) -> Result<ClientRun, Failure> {
        let proxy = self.play_proxy(ack_setup, answer)?;
        let program = self.start_client(proxy.port, content)?;
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
                end = end.min(Instant::now() + Duration::from_millis(300));
            }
            if Instant::now() > end {
                return Err(Failure::came("nothing: it sent no packet to the proxy's port"));
            }
        }
    }

    /// Connects to a port on which a program listens, or will.
    pub fn connect_patiently(&self, port: u16, name: &str) -> Result<Wire, Came> {
        wait_for(self.clock.end(), || listens(port));
        Wire::connect(port, name, &self.clock)
    }

    /// Checks that a role's program starts. Returns why it does not, with its output.
    pub fn try_start(&self, role: Role) -> Result<(), String> {
        let result = match role {
            Role::Proxy => self.start_proxy().map(drop),
            Role::Server => self.try_server(),
            Role::Client => self.client(&self.message("hello"), answer_with_ack).map(drop),
            Role::All => Ok(()),
        };
        result.map_err(|failure| {
            let programs = lock(&self.programs);
            let Some((_, program)) = programs.last() else { return failure.came };
            let mut report = format!("{}\n  command: {}", failure.came, program.command);
            if let Some(status) = program.ended() {
                report.push_str(&format!("\n  it has ended: {status}"));
            }
            let output = program.output();
            let lines: Vec<_> = output.lines().collect();
            lines[lines.len().saturating_sub(20)..]
                .iter()
                .for_each(|line| report.push_str(&format!("\n  | {}", shorten(line))));
            if lines.is_empty() {
                report.push_str("\n  it wrote nothing");
            }
            report
        })
    }

    fn try_server(&self) -> Result<(), Failure> {
        let proxy = self.play_proxy(ack_setup, answer_with_ack)?;
        let (program, port) = self.start_server(proxy.port)?;
        match self.first_packet(&proxy, &program) {
            // What is wrong with its setup packet is for the cases to say.
            Err(_) if program.ended().is_none() && listens(port) => Ok(()),
            result => result.map(drop),
        }
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
    let json = Value::from(payload).to_string();
    (dialect.message)(CLIENT, policy, payload.len(), &json)
}

/// Answers a message with its ack.
pub fn answer_with_ack(wire: &mut Wire, _message: &Value, ack: &str) -> Result<(), Came> {
    wire.send(ack)
}

/// Waits until `end` for a condition, and returns whether it came.
pub fn wait_for(end: Instant, condition: impl Fn() -> bool) -> bool {
    let mut pause = Duration::from_millis(1);
    while !condition() {
        if Instant::now() > end {
            return false;
        }
        // Many cases wait at once, and what they wait for costs the system something to say.
        thread::sleep(pause);
        pause = (2 * pause).min(Duration::from_millis(16));
    }
    true
}

/// Returns whether somebody listens on a port. Who listens is not disturbed: the handshake's last
/// segment is held back, and the connection reset, so that nothing is there to be accepted.
pub fn listens(port: u16) -> bool {
    let Ok(socket) = socket(AddressFamily::INET, SocketType::STREAM, None) else { return false };
    sockopt::set_tcp_quickack(&socket, false)
        .and_then(|()| sockopt::set_socket_linger(&socket, Some(Duration::ZERO)))
        .and_then(|()| connect(&socket, &SocketAddr::from(([127, 0, 0, 1], port))))
        .is_ok()
}

/// Returns whether somebody is about to connect to a port that does not answer.
pub fn is_connecting_to(port: u16) -> bool {
    let address = format!(":{port:04X}");
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default()
        + &fs::read_to_string("/proc/net/tcp6").unwrap_or_default();
    // The columns: number, local address and port, remote ones, state, of which 02 is SYN-SENT.
    table.lines().any(|line| {
        let mut columns = line.split_ascii_whitespace().skip(2);
        columns.next().is_some_and(|remote| remote.ends_with(&address))
            && columns.next() == Some("02")
    })
}
