//! Whatever becomes of messages at their servers, and in whatever order: what must hold. Generated
//! steps play the servers; a model knows which of them each message may be handed to.

mod fake;
mod known;
mod steps;

use std::collections::VecDeque;
use std::io::Read;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{AttemptError, Dispatcher};
use crate::cli::terminal::Terminal;
use crate::net::background::Background;
use crate::net::budget::Budget;
use crate::protocol::{Ack, Code, Data, Id, Packet, Refusal};
use crate::proxy::events::{Delivery, Events};
use crate::proxy::in_flight::{InFlight, Line};
use crate::proxy::replies::{HeldReplies, ReplyQueue};
use crate::proxy::settings::Settings;
use crate::proxy::stats::Stats;
use crate::proxy::table::{Lease, Limits, Registered, Registration, Server, Table};
use fake::{Event, Fake, number};
use known::{End, Member, Message};
use steps::{IDS, POLICIES, Step, step};

const TRIES: usize = 3;
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// Nothing happens at this distance while the test runs.
const FAR: Duration = Duration::from_secs(3600);
struct Model {
    begun: Instant,
    dispatcher: Arc<Dispatcher<Fake>>,
    log: Arc<Mutex<Vec<Event>>>,
    replies: Arc<ReplyQueue>,
    stream: Arc<TcpStream>,
    client: TcpStream,
    held: HeldReplies,
    /// All that were registered, by their registrations.
    servers: Vec<Arc<Server<Fake>>>,
    /// Those that were removed from the table, and still take messages.
    leaving: VecDeque<Arc<Server<Fake>>>,
    /// In the order of their turns.
    queues: [Vec<Member>; POLICIES.len()],
    messages: Vec<Message>,
    is_stopped: bool,
}

impl Model {
    fn new() -> Self {
        let background = Background::without_thread();
        let settings = Settings {
            message_timeout: FAR,
            reply_timeout: REPLY_TIMEOUT,
            tries: TRIES,
            ..Settings::default()
        };
        let dispatcher = Arc::new(Dispatcher {
            table: Table::new(Limits { servers: 20, policies: 20, restart_grace: Duration::ZERO }),
            events: Arc::new(Events::new(Terminal::hidden("test"), Stats::new(false))),
            settings: Arc::new(settings),
            background: Arc::clone(&background),
            has_stopped: AtomicBool::new(false),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, peer) = listener.accept().unwrap();
        let stream = Arc::new(stream);
        let events = Arc::clone(&dispatcher.events);
        let mut model = Model {
            begun: Instant::now(),
            dispatcher,
            log: Arc::default(),
            replies: ReplyQueue::new(Arc::clone(&stream), peer, events, background, Budget::new(0)),
            stream,
            client,
            held: HeldReplies::default(),
            servers: Vec::new(),
            leaving: VecDeque::new(),
            queues: Default::default(),
            messages: Vec::new(),
            is_stopped: false,
        };
        (0..3).for_each(|id| model.register(0, id, 1, false, false));
        model
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Dispatch(messages) => self.dispatch(messages),
            Step::Ack { pick, count } => self.ack(pick, count),
            Step::Fail { pick, mut error, sent, is_new } => {
                let Some((server, message)) = self.pick(pick) else { return };
                if let AttemptError::Refused { packet, .. } = &mut error {
                    *packet = refusal(number(&message));
                }
                let is_nothing_sent = matches!(
                    error,
                    AttemptError::Unreachable(_)
                        | AttemptError::OutOfResources(_)
                        | AttemptError::QueueTimeout
                );
                let since = if is_new { Instant::now() } else { self.begun };
                self.fail(&server, message, error, sent && !is_nothing_sent, since);
            }
            Step::Late { pick } => {
                let Some((server, mut message)) = self.pick(pick) else { return };
                message.deadline = self.begun;
                self.messages[number(&message)].is_late = true;
                server.handle.lock().at_work.push(message);
            }
            Step::Drop { pick, sent } => {
                let Some((_, mut message)) = self.pick(pick) else { return };
                message.is_sent = sent;
                let code =
                    if message.once && sent { Code::OutcomeUnknown } else { Code::Overloaded };
                self.messages[number(&message)].end = Some(End::Refused(code));
            }
            Step::Register { policy, id, port, leased, is_starting } => {
                self.register(policy, id, port, leased, is_starting);
            }
            Step::Leave { pick } => self.leave(pick),
            Step::Close { lapsed } => self.close(lapsed),
            Step::Timers => {
                self.messages.iter_mut().for_each(|message| message.is_put_off = false);
                self.dispatcher.background.take_timers().into_iter().for_each(|work| work());
                self.follow();
            }
            Step::Stop => {
                self.dispatcher.background.stop();
                drop(self.dispatcher.background.take_timers());
                self.is_stopped = true;
                for message in self.messages.iter_mut().filter(|message| message.is_put_off) {
                    message.is_put_off = false;
                    message.end = Some(End::Refused(Code::Overloaded));
                }
            }
        }
    }

    fn dispatch(&mut self, messages: Vec<(usize, bool)>) {
        let mut burst = Vec::new();
        for (policy, once) in messages {
            let number = self.messages.len();
            let id = Id::Integer(number as i128);
            let data = Data { once, ..Data::new(id, Id::from_text(POLICIES[policy]), "hello") };
            let line = Line::new(bytes(&Packet::Data(data.clone())));
            let (arrived, deadline) = (self.begun, self.begun + FAR);
            self.dispatcher.events.received(&data);
            let reply = self.replies.reserve_for_message();
            burst.push(InFlight::new(&data, line, arrived, deadline, reply, None));
            let server = self.take_turn(policy);
            self.messages.push(Message {
                policy,
                once,
                server,
                end: server.is_none().then_some(End::Refused(Code::NoServer)),
                ..Message::default()
            });
        }
        self.dispatcher.dispatch(burst);
        self.follow();
    }

    fn ack(&mut self, pick: usize, count: usize) {
        let Some((server, first)) = self.pick(pick) else { return };
        let others = server.handle.numbers().into_iter().take(count - 1);
        let others = others.filter_map(|number| server.handle.lock().take(number));
        let messages: Vec<_> = [first].into_iter().chain(others).collect();
        if let Some(member) = self.member(&server) {
            member.mark_healthy();
        }
        let acks: Vec<_> = messages.iter().map(|message| ack(number(message))).collect();
        let now = Instant::now();
        let deliveries = messages.iter().zip(&acks).map(|(message, ack)| Delivery {
            message: message.about(),
            ack,
            took: Duration::ZERO,
        });
        self.dispatcher.acked(&server, deliveries, now);
        for message in &messages {
            self.messages[number(message)].end = Some(End::Acked);
        }
        let slots = messages.into_iter().filter_map(InFlight::into_reply);
        self.held.fill(slots.zip(acks.iter().map(Vec::as_slice)));
        self.follow();
    }

    fn register(&mut self, policy: usize, id: usize, port: u16, leased: bool, is_starting: bool) {
        let registration = Registration {
            policy: POLICIES[policy],
            id: IDS[id],
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            lease: leased.then_some(Lease { holder: 1, length: FAR }),
            // More than there are messages: what is counted can be seen.
            capacity: leased.then_some(1000),
        };
        let since =
            if is_starting { self.begun + FAR } else { self.begun - Duration::from_secs(2) };
        let table = &self.dispatcher.table;
        let Ok(registered) = table.register(registration, since, || Fake::new(&self.log)) else {
            return;
        };
        let server = table
            .servers()
            .into_iter()
            .find(|server| server.policy == registration.policy && server.id == registration.id);
        let server = server.unwrap();
        let is_starting = is_starting && !leased;
        let member = Member { serial: server.serial, is_starting, ..Member::default() };
        match registered {
            Registered::Refreshed if server.leased => return,
            Registered::Refreshed => return *self.member(&server).unwrap() = member,
            Registered::Replaced(old) => {
                *self.member(&old).unwrap() = member;
                self.leaving.push_back(old);
            }
            Registered::Added => self.queues[policy].push(member),
            Registered::Displaced(_) => panic!("the table is not full"),
        }
        self.servers.push(server);
    }

    fn leave(&mut self, pick: usize) {
        let table = &self.dispatcher.table;
        let mut leased: Vec<_> = table.servers().into_iter().filter(|it| it.leased).collect();
        leased.sort_by_key(|server| server.serial);
        let Some(server) = picked(&leased, pick) else { return };
        assert!(table.release(&server.policy, &server.id, 1, Instant::now()).is_some());
        self.queues.iter_mut().for_each(|it| it.retain(|it| it.serial != server.serial));
        self.leaving.push_back(server);
    }

    fn close(&mut self, lapsed: bool) {
        let Some(server) = self.leaving.pop_front() else { return };
        server.handle.lock().closed = true;
        loop {
            let mut state = server.handle.lock();
            let waiting = state.waiting.pop().map(|message| (message, false));
            let left = waiting.or_else(|| state.at_work.pop_if(|_| lapsed).map(|it| (it, true)));
            drop(state);
            let Some((message, sent)) = left else { return };
            self.fail(&server, message, AttemptError::Removed, sent, Instant::now());
        }
    }

    fn fail(
        &mut self,
        server: &Arc<Server<Fake>>,
        mut message: InFlight,
        error: AttemptError,
        sent: bool,
        since: Instant,
    ) {
        self.expect_failure(number(&message), server, &error, sent, since > self.begun);
        message.is_sent = sent;
        self.dispatcher.failed(server, message, error, since);
        self.follow();
    }

    /// Takes a message from its server.
    fn pick(&self, pick: usize) -> Option<(Arc<Server<Fake>>, InFlight)> {
        let all = self
            .servers
            .iter()
            .flat_map(|it| it.handle.numbers().into_iter().map(move |number| (it, number)));
        let (server, number) = picked(&all.collect::<Vec<_>>(), pick)?;
        let message = server.handle.lock().take(number)?;
        Some((Arc::clone(server), message))
    }

    /// Forgets all that is left, and reads the replies.
    fn finish(mut self) {
        self.run(Step::Stop);
        while let Some((_, message)) = self.pick(0) {
            self.messages[number(&message)].end = Some(End::Refused(Code::Overloaded));
        }
        self.check();
        assert_eq!(self.dispatcher.events.stats.totals().in_flight, 0);
        self.held.send();
        self.replies.flush();
        assert!(self.replies.settled_for().is_some());
        self.stream.shutdown(Shutdown::Write).unwrap();
        self.client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut replies = String::new();
        self.client.read_to_string(&mut replies).unwrap();
        let replies: Vec<_> = replies.lines().collect();
        assert_eq!(replies.len(), self.messages.len());
        for (number, (reply, message)) in replies.into_iter().zip(&self.messages).enumerate() {
            let reply = Packet::parse(reply.as_bytes()).unwrap();
            let expected = match message.end {
                Some(End::Acked) => ack(number),
                Some(End::Passed) => refusal(number),
                Some(End::Refused(code)) => {
                    let Packet::Refusal(Refusal { reason, .. }) = &reply else {
                        panic!("{reply:?}")
                    };
                    bytes(&Packet::Refusal(Refusal::new(
                        Id::Integer(number as i128),
                        code,
                        &**reason,
                    )))
                }
                None => panic!("{message:?} has not ended"),
            };
            let expected = Packet::parse(&expected).unwrap();
            assert_eq!(reply, expected, "{message:?}");
        }
    }
}

fn picked<T: Clone>(all: &[T], pick: usize) -> Option<T> {
    all.get(pick.checked_rem(all.len())?).cloned()
}

/// An ack that tells which message it is for.
fn ack(number: usize) -> Vec<u8> {
    bytes(&Packet::Ack(Ack::new(Id::ZERO, Id::Integer(number as i128), number.to_string())))
}

/// A refusal of a server's that does.
fn refusal(number: usize) -> Vec<u8> {
    let id = Id::Integer(number as i128);
    bytes(&Packet::Refusal(Refusal::new(id, Code::IdInUse, number.to_string())))
}

fn bytes(packet: &Packet<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    packet.write(&mut bytes);
    // Whoever sends it on ends the line.
    bytes.pop();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_message_ends_once_and_the_turns_are_exact(steps in prop::collection::vec(step(), 0..80)) {
        let mut model = Model::new();
        for step in steps {
            model.run(step);
            model.check();
        }
        model.finish();
    }
}

impl Model {
    /// Registers servers of a policy of their own, with these ids and capacities.
    fn own_servers<const N: usize>(
        &self,
        servers: [(&str, Option<u64>); N],
    ) -> [Arc<Server<Fake>>; N] {
        servers.map(|(id, capacity)| {
            let address = SocketAddr::from(([127, 0, 0, 1], 1));
            let registration = Registration { policy: "own", id, address, lease: None, capacity };
            let table = &self.dispatcher.table;
            table.register(registration, self.begun, || Fake::new(&self.log)).unwrap();
            table.servers().into_iter().find(|server| server.id == id).unwrap()
        })
    }

    /// Dispatches so many messages to them.
    fn dispatch_own(&self, count: usize) {
        let message = |number: usize| {
            let data = Data::new(Id::Integer(number as i128), Id::from_text("own"), "hello");
            let line = Line::new(bytes(&Packet::Data(data.clone())));
            let (arrived, deadline) = (self.begun, self.begun + FAR);
            self.dispatcher.events.received(&data);
            InFlight::new(&data, line, arrived, deadline, self.replies.reserve_for_message(), None)
        };
        self.dispatcher.dispatch((0..count).map(message).collect());
    }

    /// A server fails the first message.
    fn fail_own(&self, server: &Arc<Server<Fake>>, error: AttemptError) {
        let message = server.handle.lock().take(0).unwrap();
        self.dispatcher.failed(server, message, error, self.begun);
    }
}

#[test]
fn before_a_message_waits_a_server_that_could_not_take_it_is_asked_again() {
    let model = Model::new();
    let servers = model.own_servers([("a", None), ("b", None), ("c", Some(1))]);
    model.dispatch_own(3);
    model.fail_own(&servers[0], AttemptError::QueueTimeout);
    model.fail_own(&servers[1], AttemptError::closed(false));
    assert_eq!(servers.map(|server| server.handle.numbers()), [vec![0], vec![1], vec![2]]);
}

#[test]
fn what_a_server_gives_back_after_the_stop_is_refused() {
    let model = Model::new();
    let servers = model.own_servers([("a", None), ("b", None)]);
    model.dispatch_own(1);
    model.dispatcher.stop();
    model.fail_own(&servers[0], AttemptError::closed(false));
    assert!(servers.iter().all(|server| server.handle.numbers().is_empty()));
    let totals = model.dispatcher.events.stats.totals();
    assert_eq!((totals.in_flight, totals.refusals.iter().sum()), (0, 1_u64));
}
