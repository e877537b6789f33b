//! How often a message is carried out while workers are killed and stopped. Each worker writes down the
//! `msgid`s of its messages.

use std::collections::HashMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use super::{Outcome, PAUSE, POLICY, Run, Site};
use crate::support::Signal;
use crate::support::load::Load;
use crate::support::mutation::Random;

/// Between two blows.
const BLOW_EVERY: Duration = Duration::from_millis(300);

/// A stopped worker's lease has run out by then.
const STOPPED_FOR: Duration = Duration::from_millis(3500);

/// The codes with which a message may be refused that is to be carried out once.
const MAY_BE_REFUSED: [&str; 2] = ["outcome-unknown", "unreachable"];

/// Messages that are to be carried out once.
pub fn once(run: &Run) -> Outcome {
    let (mut outcome, counts) = carry_out(run, true);
    let account = &outcome.account;
    let mut broken: Vec<_> = counts
        .iter()
        .filter(|(_, count)| **count > 1)
        .map(|(msgid, count)| format!("{msgid}: carried out {count} times"))
        .collect();
    broken.truncate(5);
    let others = account.refused.keys().filter(|code| !MAY_BE_REFUSED.contains(&code.as_str()));
    broken.extend(others.map(|code| format!("refused as {code}")));
    if account.failed + account.wrong > 0 || account.acked == 0 {
        broken.extend(account.complaints());
    }
    outcome.broken.extend(broken);
    outcome
}

/// Messages that may be carried out more than once: none is lost.
pub fn repeat(run: &Run) -> Outcome {
    let (mut outcome, counts) = carry_out(run, false);
    let repeats: usize = counts.values().map(|count| count - 1).sum();
    outcome.notes.push(format!("carried out more often than once: {repeats}"));
    outcome.broken.extend(outcome.account.complaints());
    outcome
}

/// Returns also how often each message was carried out.
fn carry_out(run: &Run, once: bool) -> (Outcome, HashMap<String, usize>) {
    let (mut outcome, mut random) = (Outcome::default(), Random::new(run.seed));
    let name = format!("revproc-{}-once-{once}.txt", std::process::id());
    let file = std::env::temp_dir().join(name);
    let script = format!("echo \"$REVPROC_MSGID\" >> '{}'", file.display());
    let command = ["-at-once", "4", "--", "sh", "-c", &script].map(str::to_owned);
    let mut site = Site::of_workers(&["1", "2", "3", "4"], run, 0, &command);
    let load = Load::start_with(site.proxy.1, POLICY, run.clients, PAUSE, once);
    let end = Instant::now() + run.length;
    let mut stopped_at = None;
    // Worker 4 is stopped now and then, and one of the first two is killed; worker 3 lives.
    while Instant::now() < end {
        thread::sleep(BLOW_EVERY);
        match stopped_at {
            None => {
                site.servers[3].program.signal(Signal::STOP);
                stopped_at = Some(Instant::now());
            }
            Some(since) if since.elapsed() >= STOPPED_FOR => {
                site.servers[3].program.signal(Signal::CONT);
                site.servers[3].registrations += 1;
                site.servers[3].wait_for(&site.proxy.0);
                stopped_at = None;
            }
            Some(_) => {}
        }
        let victim = random.below(2);
        site.servers[victim].program.kill();
        // A command that was just being started may hold its port for a moment.
        site.start_again(victim, false);
        site.servers[victim].wait_for(&site.proxy.0);
    }
    site.servers[3].program.signal(Signal::CONT);
    outcome.account = load.finish();
    // Their commands end with them, or a moment later.
    for server in &mut site.servers {
        server.program.signal(Signal::TERM);
        server.program.end();
    }
    outcome.stop(site.proxy.0);
    let mut counts = HashMap::new();
    for msgid in fs::read_to_string(&file).unwrap_or_default().lines() {
        *counts.entry(msgid.to_owned()).or_insert(0) += 1;
    }
    let _ = fs::remove_file(&file);
    let written = counts.len() as u64;
    let acked = outcome.account.acked;
    outcome.expect(written >= acked, || format!("{acked} were acked, but {written} carried out"));
    (outcome, counts)
}
