//! Programs that go away and come back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{Outcome, POLICY, Run, Site};
use crate::support::load::Account;
use crate::support::mutation::Random;
use crate::support::{Program, Signal, fixed_port, message};

/// Between two blows.
const KILL_EVERY: Duration = Duration::from_millis(100);
const RESTART_EVERY: Duration = Duration::from_secs(3);

/// What a server is given without renewal.
const LEASE: Duration = Duration::from_secs(3);

/// The longest that a message may wait while the leases of all that hang run out.
const HANG_LIMIT: Duration = Duration::from_secs(4);

/// Messages in a file of the client program.
const PER_FILE: u64 = 200;

/// Kills one or two servers of three, and starts them again, on the same port or another.
pub fn kill(run: &Run) -> Outcome {
    let (mut outcome, mut random) = (Outcome::default(), Random::new(run.seed));
    let mut site = Site::new(run, 0);
    let load = run.load(site.proxy.1);
    let end = Instant::now() + run.length;
    while Instant::now() < end {
        thread::sleep(KILL_EVERY);
        let out = site.proxy.0.out();
        let mut there: Vec<_> =
            (0..3).filter(|&which| site.servers[which].is_registered(&out)).collect();
        there.swap_remove(random.below(there.len()));
        // Most of the time one; the others, if there are, now and then all at once.
        there.truncate(if random.below(4) == 0 { 2 } else { 1 });
        there.iter().for_each(|&victim| site.servers[victim].program.kill());
        for victim in there {
            site.start_again(victim, random.below(2) == 0);
        }
        for server in &site.servers {
            let refused = server.program.err().into_iter().find(|line| line.contains("refused"));
            outcome.broken.extend(refused);
        }
        if !outcome.broken.is_empty() {
            break;
        }
    }
    if outcome.broken.is_empty() {
        site.wait_for_all();
    }
    outcome.expect_all_acked(load.finish(), run.reply_timeout);
    outcome.stop(site.proxy.0);
    outcome
}

/// Stops one server of three: it keeps its connections and answers nothing.
pub fn stop(run: &Run) -> Outcome {
    stop_some(run, Site::new(run, 0), 1)
}

/// Stops five servers of six at once.
pub fn hang(run: &Run) -> Outcome {
    stop_some(run, Site::of(&["1", "2", "3", "4", "5", "6"], run, 0), 5)
}

fn stop_some(run: &Run, mut site: Site, count: usize) -> Outcome {
    let mut outcome = Outcome::default();
    let load = run.load(site.proxy.1);
    let all = site.servers.len();
    load.wait("every server's acks", |account| account.by_server.len() == all);
    let first = Random::new(run.seed).below(all);
    let victims: Vec<_> = (0..count).map(|nth| (first + nth) % all).collect();
    victims.iter().for_each(|&victim| site.servers[victim].program.signal(Signal::STOP));
    thread::sleep(run.length.max(LEASE + Duration::from_secs(2)));
    victims.iter().for_each(|&victim| site.servers[victim].program.signal(Signal::CONT));
    for victim in victims {
        // Its lease has run out meanwhile.
        site.servers[victim].registrations += 1;
        site.servers[victim].wait_for(&site.proxy.0);
        let id = site.servers[victim].id;
        let before = load.account().acks_of(id);
        load.wait("its turns in the rotation", |account| account.acks_of(id) > before + 50);
    }
    outcome.expect_all_acked(load.finish(), HANG_LIMIT + run.slack);
    outcome.stop(site.proxy.0);
    outcome
}

/// Takes the servers down and up, one after another, as one does for an update.
pub fn term(run: &Run) -> Outcome {
    let mut outcome = Outcome::default();
    let mut site = Site::new(run, 0);
    let load = run.load(site.proxy.1);
    let end = Instant::now() + run.length;
    for which in (0..3).cycle() {
        site.servers[which].program.signal(Signal::TERM);
        let status = site.servers[which].program.end();
        outcome.expect(status.success(), || format!("a server ended with {status}"));
        site.start_again(which, true);
        site.servers[which].wait_for(&site.proxy.0);
        if Instant::now() > end {
            break;
        }
    }
    outcome.expect_all_acked(load.finish(), Duration::from_millis(100) + run.slack);
    outcome.stop(site.proxy.0);
    outcome
}

/// Kills the proxy and starts it again, while client programs send with `-wait`. What a killed
/// proxy had counted is lost, so that only the clients' counts remain.
pub fn restart(run: &Run) -> Outcome {
    let mut outcome = Outcome::default();
    // Nobody else may be given the port while the proxy is away.
    let port = fixed_port();
    let mut site = Site::new(run, port);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..run.clients)
            .map(|id| {
                scope.spawn({
                    let stop = &stop;
                    move || run_clients(id, port, stop)
                })
            })
            .collect();
        let end = Instant::now() + run.length;
        while Instant::now() < end {
            thread::sleep(RESTART_EVERY.min(run.length / 2));
            site.proxy.0.kill();
            site.proxy = run.proxy(port);
            let since = Instant::now();
            site.servers.iter_mut().for_each(|server| server.registrations = 1);
            site.wait_for_all();
            let took = since.elapsed();
            outcome.expect(took <= Duration::from_secs(2) + run.slack, || {
                format!("the servers were back only after {took:?}")
            });
        }
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            outcome.account.add(client.join().unwrap());
        }
    });
    outcome.broken.extend(outcome.account.complaints());
    outcome
}

/// Runs the client program again and again, with new messages each time.
fn run_clients(id: usize, port: u16, stop: &AtomicBool) -> Account {
    let mut account = Account::default();
    let file = std::env::temp_dir().join(format!("revproc-{}-{id}.json", std::process::id()));
    let (id, port) = (id.to_string(), port.to_string());
    for round in 0.. {
        let lines: Vec<_> = (0..PER_FILE)
            .map(|number| message(&id, POLICY, &format!("{number} of {id} in round {round}")))
            .collect();
        std::fs::write(&file, lines.join("\n")).expect("the folder for temporary files");
        let file = file.to_str().expect("a path of plain characters");
        let arguments = ["-id", &id, "-revproc", &port, "-wait", "10", "-pkt", file];
        let mut client = Program::start("client", &arguments);
        let status = client.end();
        let out = client.out();
        let count = |what: &str| out.iter().filter(|line| line.starts_with(what)).count() as u64;
        let run = Account {
            sent: PER_FILE,
            acked: count("Hash of payload is correct"),
            wrong: count("Hash of payload is not correct"),
            failed: count("Message not delivered"),
            notes: if status.success() { Vec::new() } else { vec![client.report()] },
            ..Account::default()
        };
        account.add(run);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    let _ = std::fs::remove_file(file);
    account
}
