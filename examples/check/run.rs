//! Runs the cases: several at once, each where what it needs has passed, all within a bound.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use crate::bench::{Bench, Setting};
use crate::cases::{Case, Failure, Role};
use crate::hindrance;
use crate::program::lock;
use crate::start::Broken;

/// How many cases run at once. They wait more than they work, and each has programs of its own.
const AT_ONCE: usize = 4;

/// How a case ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    Pass,
    Fail(Failure),
    /// It was not run, for this reason.
    Skipped(String),
    /// The checker could not do its work, for this reason.
    Hindered(String),
}

/// A case that has been run.
pub struct Done {
    /// Its place in the list.
    pub place: usize,
    pub outcome: Outcome,
    /// What the programs said that explains a failure.
    pub words: Vec<String>,
    /// What happened, and what the programs wrote.
    pub notes: Vec<String>,
}

/// What the threads share.
struct Board {
    cases: Vec<&'static Case>,
    setting: Arc<Setting>,
    /// For each case, whether it was taken, and what came of it: passed or not.
    state: Mutex<Vec<(bool, Option<bool>)>>,
    changed: Condvar,
}

/// Runs cases. What comes of them arrives in the order in which they end. Cases of the roles that
/// `broken` names are skipped.
pub fn start(cases: &[&'static Case], setting: &Arc<Setting>, broken: &[Broken]) -> Receiver<Done> {
    let (sender, done) = channel();
    let mut state = vec![(false, None); cases.len()];
    for (place, case) in cases.iter().enumerate() {
        let is_in_the_way = |broken: &&Broken| case.role == Role::All || case.role == broken.role;
        if let Some(broken) = broken.iter().find(is_in_the_way) {
            state[place] = (true, Some(false));
            send(&sender, place, Outcome::Skipped(broken.why.clone()), None);
        }
    }
    let board = Arc::new(Board {
        cases: cases.to_vec(),
        setting: Arc::clone(setting),
        state: Mutex::new(state),
        changed: Condvar::new(),
    });
    for _ in 0..AT_ONCE {
        let (board, sender) = (Arc::clone(&board), sender.clone());
        // The threads that can be started do the work; with none, all cases are reported as not run.
        if let Err(error) = thread::Builder::new().spawn(move || work(&board, &sender)) {
            hindrance::note(format_args!("no thread could be started: {error}"));
        }
    }
    done
}

fn work(board: &Board, sender: &Sender<Done>) {
    while let Some((place, skipped)) = take(board) {
        let case = board.cases[place];
        let outcome = match skipped {
            Some(why) => {
                send(sender, place, Outcome::Skipped(why), None);
                false
            }
            None => run(board, case, place, sender),
        };
        lock(&board.state)[place].1 = Some(outcome);
        board.changed.notify_all();
    }
}

/// Takes the next case of which it is known whether it can be run; with the reason if not.
fn take(board: &Board) -> Option<(usize, Option<String>)> {
    let mut state = lock(&board.state);
    loop {
        let mut is_last = true;
        for place in 0..state.len() {
            if state[place].0 {
                continue;
            }
            is_last = false;
            // What was not asked for stands in nobody's way.
            let known = |number: &&str| board.cases.iter().position(|case| case.number == *number);
            let needs: Vec<_> = board.cases[place]
                .needs
                .iter()
                .filter_map(|number| Some((number, state[known(number)?].1)))
                .collect();
            let missing = needs.iter().find(|(_, passed)| *passed == Some(false));
            if missing.is_none() && needs.iter().any(|(_, passed)| passed.is_none()) {
                continue;
            }
            let why = missing.map(|(number, _)| format!("needs {number}"));
            state[place].0 = true;
            return Some((place, why));
        }
        if is_last {
            return None;
        }
        state = board.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
    }
}

/// Runs a case, and returns whether it passed.
fn run(board: &Board, case: &'static Case, place: usize, sender: &Sender<Done>) -> bool {
    if Instant::now() >= board.setting.last {
        send(sender, place, Outcome::Skipped("no time was left".to_owned()), None);
        return false;
    }
    let bench = Bench::new(&board.setting);
    // A defect of the checker must not look like one of the program.
    let verdict = catch_unwind(AssertUnwindSafe(|| (case.script)(&bench)))
        .unwrap_or_else(|_| Err(Failure::ours("the script of this case failed")));
    let passed = verdict.is_ok();
    let outcome = match (verdict, hindrance::since(bench.clock.begun())) {
        (Ok(()), _) => Outcome::Pass,
        (Err(_), Some(why)) => Outcome::Hindered(why),
        (Err(failure), None) => Outcome::Fail(failure),
    };
    send(sender, place, outcome, Some(&bench));
    // What went wrong in a peer's thread shows when it is joined; it is no affair of other cases.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(bench)));
    passed
}

fn send(sender: &Sender<Done>, place: usize, outcome: Outcome, bench: Option<&Bench>) {
    let is_failure = matches!(outcome, Outcome::Fail(_));
    let words = bench.filter(|_| is_failure).map(Bench::last_words).unwrap_or_default();
    let notes = bench.map(|bench| [bench.clock.notes(), bench.outputs()].concat());
    // The report may have ended without waiting any longer.
    let _ = sender.send(Done { place, outcome, words, notes: notes.unwrap_or_default() });
}
