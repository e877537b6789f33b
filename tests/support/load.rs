//! Clients that keep sending, and an account of every message's outcome.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use revproc::net::connection::{Connection, DEFAULT_MAX_PACKET, ReadTimeout};
use revproc::protocol::{Data, Id, Packet, hash};

use super::BOUND;

/// The outcomes of messages. Each message is counted as sent, and again by its outcome.
#[derive(Debug, Clone, Default)]
pub struct Account {
    /// Messages sent.
    pub sent: u64,
    /// Acked with the right hash and client id.
    pub acked: u64,
    /// Refused, by code.
    pub refused: BTreeMap<String, u64>,
    /// Not answered: the connection broke, or nothing came in time.
    pub failed: u64,
    /// Answered wrongly, such as with another message's ack.
    pub wrong: u64,
    /// The longest time from a message to its answer.
    pub longest: Duration,
    /// Acks by server.
    pub by_server: BTreeMap<String, u64>,
    /// The first few errors, in words.
    pub notes: Vec<String>,
}

impl Account {
    /// Returns the messages refused, whatever the code.
    pub fn refusals(&self) -> u64 {
        self.refused.values().sum()
    }

    /// Returns the acks of one server.
    pub fn acks_of(&self, server: &str) -> u64 {
        self.by_server.get(server).copied().unwrap_or(0)
    }

    /// Returns what is wrong for a run in which every message must be acked.
    pub fn complaints(&self) -> Vec<String> {
        let Account { sent, acked, failed, wrong, .. } = *self;
        let refused = self.refusals();
        let mut complaints = Vec::new();
        if failed + wrong + refused > 0 {
            complaints.push(format!("{failed} failed, {wrong} wrong, {refused} refused"));
            complaints.extend(self.notes.iter().cloned());
        }
        if acked + refused + failed + wrong != sent {
            complaints.push(format!("{sent} were sent, but the outcomes do not add up to that"));
        }
        if acked == 0 {
            complaints.push("nothing was acked at all".to_owned());
        }
        complaints
    }

    /// Adds another account to this one.
    pub fn add(&mut self, other: Account) {
        self.sent += other.sent;
        self.acked += other.acked;
        self.failed += other.failed;
        self.wrong += other.wrong;
        self.longest = self.longest.max(other.longest);
        for (code, count) in other.refused {
            *self.refused.entry(code).or_default() += count;
        }
        for (server, count) in other.by_server {
            *self.by_server.entry(server).or_default() += count;
        }
        other.notes.into_iter().for_each(|note| self.note(|| note));
    }

    fn note(&mut self, note: impl FnOnce() -> String) {
        if self.notes.len() < 5 {
            self.notes.push(note());
        }
    }
}

/// Clients at work.
pub struct Load {
    account: Arc<Mutex<Account>>,
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `clients` threads that send until they are stopped. Of four, two keep a connection,
    /// one keeps one and pipelines bursts, and one opens a connection for each message.
    pub fn start(proxy: u16, policy: &str, clients: usize, pause: Duration) -> Self {
        Self::start_with(proxy, policy, clients, pause, false)
    }

    /// As [`start`](Self::start); the messages have a `msgid` each, and may be to be carried out `once`.
    pub fn start_with(
        proxy: u16,
        policy: &str,
        clients: usize,
        pause: Duration,
        once: bool,
    ) -> Self {
        let account = Arc::<Mutex<Account>>::default();
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..clients)
            .map(|number| {
                let (account, stop) = (Arc::clone(&account), Arc::clone(&stop));
                let id = format!("c{number}");
                let policy = policy.to_owned();
                let (burst, keeps) = match number % 4 {
                    2 => (8, true),
                    3 => (1, false),
                    _ => (1, true),
                };
                let mut sender =
                    Sender { proxy, policy, id, once, count: 0, burst, keeps, kept: None, account };
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        sender.send_burst();
                        thread::sleep(pause);
                    }
                    sender.expect_silence();
                })
            })
            .collect();
        Load { account, stop, clients }
    }

    /// Returns the account so far.
    pub fn account(&self) -> Account {
        self.account.lock().unwrap().clone()
    }

    /// Waits until the account meets the condition.
    pub fn wait(&self, what: &str, condition: impl Fn(&Account) -> bool) {
        let end = Instant::now() + BOUND;
        while !condition(&self.account()) {
            assert!(Instant::now() < end, "waited in vain for {what}: {:?}", self.account());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops the clients after their last answers, and returns the account.
    pub fn finish(mut self) -> Account {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.drain(..).for_each(|client| client.join().unwrap());
        self.account()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One client.
struct Sender {
    proxy: u16,
    policy: String,
    id: String,
    once: bool,
    count: u64,
    burst: usize,
    keeps: bool,
    kept: Option<Connection>,
    account: Arc<Mutex<Account>>,
}

impl Sender {
    /// Sends a burst and receives its answers.
    fn send_burst(&mut self) {
        let payloads: Vec<_> = (0..self.burst).map(|_| self.payload()).collect();
        self.account.lock().unwrap().sent += payloads.len() as u64;
        let mut answered = 0;
        if let Err(reason) = self.exchange(&payloads, &mut answered) {
            let mut account = self.account.lock().unwrap();
            account.failed += (payloads.len() - answered) as u64;
            account.note(|| format!("client {}: {reason}", self.id));
        }
    }

    /// Returns a unique payload; one in 64 is too long for one read.
    fn payload(&mut self) -> String {
        self.count += 1;
        let filler = if self.count.is_multiple_of(64) { 40_000 } else { self.count % 64 };
        format!("{} of {} {}", self.count, self.id, "x".repeat(filler as usize))
    }

    fn exchange(&mut self, payloads: &[String], answered: &mut usize) -> Result<(), String> {
        let mut connection = match self.kept.take() {
            Some(connection) => connection,
            None => TcpStream::connect(("127.0.0.1", self.proxy))
                .and_then(|stream| Connection::from_connected(stream, DEFAULT_MAX_PACKET))
                .map_err(|error| format!("could not connect: {error}"))?,
        };
        let mut lines = Vec::new();
        for payload in payloads {
            let data = Data::new(Id::from_text(&self.id), Id::from_text(&self.policy), payload);
            // As unique as the payload.
            let msgid = payload.split('x').next().map(|number| number.trim().into());
            Packet::Data(Data { once: self.once, msgid, ..data }).write(&mut lines);
        }
        let begin = Instant::now();
        connection.send(&lines).map_err(|error| format!("could not send: {error}"))?;
        for payload in payloads {
            let answer = match connection.receive(ReadTimeout::Until(begin + BOUND)) {
                Ok(Some(answer)) => answer,
                Ok(None) => return Err("the connection was closed".to_owned()),
                Err(error) => return Err(error.to_string()),
            };
            self.record(payload, answer, begin.elapsed());
            *answered += 1;
        }
        self.kept = self.keeps.then_some(connection);
        Ok(())
    }

    fn record(&self, payload: &str, answer: &[u8], waited: Duration) {
        let mut account = self.account.lock().unwrap();
        account.longest = account.longest.max(waited);
        match Packet::parse(answer) {
            Ok(Packet::Ack(ack))
                if ack.destid.text() == self.id && ack.payload == hash(payload) =>
            {
                account.acked += 1;
                *account.by_server.entry(ack.srcid.text().into_owned()).or_default() += 1;
            }
            Ok(Packet::Refusal(refusal)) if refusal.destid.text() == self.id => {
                *account.refused.entry(refusal.code.into_owned()).or_default() += 1;
                account.note(|| format!("client {}: refused: {}", self.id, refusal.reason));
            }
            other => {
                account.wrong += 1;
                account.note(|| format!("client {}, payload {payload:.20}: {other:?}", self.id));
            }
        }
    }

    /// Checks that no bytes are left: they would be another client's.
    fn expect_silence(&self) {
        if self.kept.as_ref().is_some_and(|connection| !connection.is_reusable()) {
            let mut account = self.account.lock().unwrap();
            account.wrong += 1;
            account.note(|| format!("client {}: more came than was asked for", self.id));
        }
    }
}
