//! The kinds of harm. Each starts the real programs, breaks things while clients keep sending, and
//! returns the account with whatever was not as it should be.

mod limits;
mod losses;
mod repeats;
mod strangers;

use std::thread;
use std::time::{Duration, Instant};

use crate::support::load::{Account, Load};
use crate::support::{BOUND, Program, Signal, fixed_port, last_port, proxy_on};

/// What a run is given.
#[derive(Debug, Clone)]
pub struct Run {
    /// Decides what is broken when.
    pub seed: u64,
    /// For how long.
    pub length: Duration,
    /// How many clients send.
    pub clients: usize,
    /// The proxy's reply timeout.
    pub reply_timeout: Duration,
    /// The proxy's packet timeout.
    pub packet_timeout: Duration,
    /// Connections of those who do harm by being many.
    pub crowd: usize,
    /// How much later than promised things may be on a machine that is busy with something else.
    pub slack: Duration,
}

/// What a run has shown.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What the clients counted.
    pub account: Account,
    /// What the proxy counted: messages, acks, refusals.
    pub proxy: Option<[u64; 3]>,
    /// What else is worth a line.
    pub notes: Vec<String>,
    /// Expectations that were not met.
    pub broken: Vec<String>,
}

/// A kind of harm.
pub type Kind = fn(&Run) -> Outcome;

/// Every kind with its name and what it does.
pub const ALL: [(&str, &str, Kind); 13] = [
    ("kill", "servers are killed at random, one is always left", losses::kill),
    ("stop", "one of three servers is stopped, and goes on later", losses::stop),
    ("hang", "five of six servers are stopped at once, and go on later", losses::hang),
    ("term", "servers are told to end, one after another", losses::term),
    ("restart", "the proxy is killed and started again", losses::restart),
    (
        "once",
        "workers are killed and stopped, and no message may be carried out twice",
        repeats::once,
    ),
    ("repeat", "workers are killed and stopped, and messages may be repeated", repeats::repeat),
    ("misbehave", "servers that answer wrongly, or not at all", strangers::misbehave),
    ("surplus", "a server that acks one message in a hundred twice", strangers::surplus),
    ("homework", "servers that take one message at a time", strangers::homework),
    ("slow", "connections that send a byte a second", limits::slow),
    ("descriptors", "the proxy may open few files", limits::descriptors),
    ("stdout", "standard output is closed, full or stuck", limits::stdout),
];

impl Run {
    fn proxy(&self, port: u16) -> (Program, u16) {
        let [reply, packet] = [self.reply_timeout, self.packet_timeout]
            .map(|timeout| format!("{}ms", timeout.as_millis()));
        proxy_on(port, &["-quiet", "-reply-timeout", &reply, "-packet-timeout", &packet])
    }

    fn load(&self, proxy: u16) -> Load {
        Load::start(proxy, POLICY, self.clients, PAUSE)
    }
}

impl Outcome {
    /// Notes an expectation that was not met.
    fn expect(&mut self, met: bool, otherwise: impl FnOnce() -> String) {
        if !met {
            self.broken.push(otherwise());
        }
    }

    /// Nothing lost, and no answer later than this.
    fn expect_all_acked(&mut self, account: Account, longest: Duration) {
        self.broken.extend(account.complaints());
        self.expect(account.longest <= longest, || {
            format!("a message waited {:?}, and {longest:?} is the most", account.longest)
        });
        self.account = account;
    }

    /// Stops the proxy; it must end in order, and have counted what the clients counted.
    fn stop(&mut self, mut proxy: Program) {
        proxy.signal(Signal::TERM);
        let status = proxy.end();
        self.expect(status.success(), || format!("the proxy ended with {status}"));
        let said = proxy.warning("stopped after ");
        let counts: Vec<u64> =
            said.split([' ', ':']).filter_map(|word| word.parse().ok()).collect();
        let Account { sent, acked, .. } = self.account;
        let clients = [sent, acked, self.account.refusals()];
        self.expect(counts == clients, || format!("clients counted {clients:?}, but {said}"));
        self.proxy = counts.try_into().ok();
    }
}

/// The policy of all servers, where one is enough.
const POLICY: &str = "PP_1";

/// Between a client's messages: a fast client, but the machine has others.
const PAUSE: Duration = Duration::from_millis(1);

/// A proxy with servers of one policy.
struct Site {
    proxy: (Program, u16),
    servers: Vec<Member>,
}

/// A server that comes and goes.
struct Member {
    id: &'static str,
    port: u16,
    program: Program,
    /// What it runs for each message, if anything.
    command: Vec<String>,
    /// How many registrations of it the proxy has seen when it is there.
    registrations: usize,
}

impl Site {
    /// Servers 1, 2 and 3.
    fn new(run: &Run, port: u16) -> Self {
        Self::of(&["1", "2", "3"], run, port)
    }

    fn of(ids: &[&'static str], run: &Run, port: u16) -> Self {
        Self::of_workers(ids, run, port, &[])
    }

    /// Servers that run a command for each message.
    fn of_workers(ids: &[&'static str], run: &Run, port: u16, command: &[String]) -> Self {
        let proxy = run.proxy(port);
        let start = |id: &&'static str| Member::start(id, fixed_port(), proxy.1, command);
        let servers = ids.iter().map(start).collect();
        let site = Site { proxy, servers };
        site.wait_for_all();
        site
    }

    fn wait_for_all(&self) {
        self.servers.iter().for_each(|server| server.wait_for(&self.proxy.0));
    }

    /// Starts a server again that has ended, on its old port or another.
    fn start_again(&mut self, which: usize, same_port: bool) {
        let member = &mut self.servers[which];
        let port = if same_port { member.port } else { 0 };
        let registrations = member.registrations + 1;
        let again = Member::start(member.id, port, self.proxy.1, &member.command);
        *member = Member { registrations, ..again };
    }
}

impl Member {
    /// Starts a server on a port, or on any free one.
    fn start(id: &'static str, port: u16, proxy: u16, command: &[String]) -> Self {
        let (port, proxy) = (port.to_string(), proxy.to_string());
        let arguments = ["-id", id, "-pp", POLICY, "-listen", &port, "-revproc", &proxy, "-quiet"];
        let command = command.to_vec();
        let arguments = arguments.into_iter().chain(command.iter().map(String::as_str));
        let program = Program::start("server", &arguments.collect::<Vec<_>>());
        let port = last_port(&program.line("Listening on port "));
        Member { id, port, program, command, registrations: 1 }
    }

    fn is_registered(&self, out: &[String]) -> bool {
        let line = format!("Receiving setup message from server id {} ", self.id);
        out.iter().filter(|said| said.starts_with(&line)).count() >= self.registrations
    }

    fn wait_for(&self, proxy: &Program) {
        proxy.wait(&format!("server {} to register", self.id), |out, _| {
            self.is_registered(out).then_some(())
        });
    }
}

/// Waits for a condition with a bound, and says whether it came.
fn comes(bound: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + bound.min(BOUND);
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
}
