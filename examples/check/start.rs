//! Starts each program once, before the cases: one that does not start fails none of them.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crate::PROGRAMS;
use crate::bench::{Bench, Setting, answer_with_ack};
use crate::cases::{Case, Failure, Role};
use crate::hindrance;
use crate::peers::ack_setup;
use crate::ports::listens;
use crate::program::{lock, shorten};

/// A program that cannot be started.
pub struct Broken {
    pub role: Role,
    /// Why its cases are skipped.
    pub why: String,
    /// What is said about it, with its output.
    pub said: String,
}

/// Starts each program that is needed once. Returns those that cannot be started.
pub fn start_each(chosen: &[&Case], setting: &Arc<Setting>) -> Vec<Broken> {
    let is_needed = |role| chosen.iter().any(|case| case.role == role || case.role == Role::All);
    let begun = Instant::now();
    thread::scope(|scope| {
        let start = |role| {
            let thread = thread::Builder::new();
            (role, thread.spawn_scoped(scope, move || try_start(&Bench::new(setting), role)))
        };
        let needed = PROGRAMS.iter().map(|(role, ..)| *role).filter(|role| is_needed(*role));
        let started: Vec<_> = needed.map(start).collect();
        let failed = started.into_iter().filter_map(|(role, thread)| {
            let result = match thread.map_err(Failure::ours) {
                Ok(thread) => thread.join().unwrap_or_else(|_| Err("it panicked".to_owned())),
                Err(failure) => Err(failure.came),
            };
            Some(broken(role, &result.err()?, hindrance::since(begun)))
        });
        failed.collect()
    })
}

fn broken(role: Role, problem: &str, hindrance: Option<String>) -> Broken {
    if let Some(why) = hindrance {
        return Broken { role, said: why.clone(), why };
    }
    let name = PROGRAMS[role as usize].1;
    Broken {
        role,
        why: format!("the {role} could not be started"),
        said: format!("the {role} (-{name}) could not be started: {problem}"),
    }
}

/// Checks that a role's program starts. Returns why it does not, with its output.
fn try_start(bench: &Bench, role: Role) -> Result<(), String> {
    let result = match role {
        Role::Proxy => bench.start_proxy().map(drop),
        Role::Server => try_server(bench),
        Role::Client => bench.client(&bench.message("hello"), answer_with_ack).map(drop),
        Role::All => Ok(()),
    };
    result.map_err(|failure| {
        let programs = lock(&bench.programs);
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

fn try_server(bench: &Bench) -> Result<(), Failure> {
    let proxy = bench.play_proxy(ack_setup, answer_with_ack)?;
    let (program, port) = bench.start_server(proxy.port)?;
    match bench.first_packet(&proxy, &program) {
        // What is wrong with its setup packet is for the cases to say.
        Err(_) if program.ended().is_none() && listens(port) => Ok(()),
        result => result.map(drop),
    }
}
