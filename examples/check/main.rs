//! Checks anybody's reverse proxy, server and client, and says what to look at:
//!
//! ```text
//! cargo build --release
//! cargo run --release --example check -- \
//!     -revproc 'python3 revproc.py -port {port}' \
//!     -server  'python3 server.py -id {id} -pp {pp} -listen {listen} -revproc {revproc}' \
//!     -client  'python3 client.py -id {id} -revproc {revproc} -pkt {pkt}'
//! ```
//!
//! Of the three, those that are given are checked; with none, ours. Ends with 0 where everything
//! passes that the homework demands, 1 where something does not, 2 where a program cannot be started,
//! the command line is wrong, or the checker could not do its work. `examples/check/README.md` is for
//! those who mark.

mod bench;
mod cases;
mod fair;
mod hindrance;
mod peers;
mod ports;
mod program;
mod report;
mod run;
mod sites;
mod start;
#[path = "../../tests/support/mod.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod support;
mod wire;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use clap::Parser;
use revproc::cli::terminal::Terminal;
use revproc::cli::{self, FAILED, Problem, USAGE};

use bench::Setting;
use cases::{Case, Rank, Role};
use program::{Guard, Template};
use report::Report;
use support::dialect::{INTEGERS, STRINGS};

/// How long a run may take, whatever it is given; its end takes a few seconds more.
const LONGEST: Duration = Duration::from_secs(210);

/// How long what is under way then may take to end.
const ENDING: Duration = Duration::from_secs(15);

/// Each role's program, and the places that its command line must have.
const PROGRAMS: [(Role, &str, &[&str]); 3] = [
    (Role::Proxy, "revproc", &["port"]),
    (Role::Server, "server", &["id", "pp", "listen", "revproc"]),
    (Role::Client, "client", &["id", "revproc", "pkt"]),
];

/// Checks a reverse proxy, a server and a client: those that are given, or ours
#[derive(Debug, Parser)]
#[command(name = "check", version)]
struct Options {
    /// The proxy's command line, with {port}
    #[arg(long, value_name = "COMMAND", value_parser = cli::name)]
    revproc: Option<String>,
    /// The server's command line, with {id}, {pp}, {listen} and {revproc}
    #[arg(long, value_name = "COMMAND", value_parser = cli::name)]
    server: Option<String>,
    /// The client's command line, with {id}, {revproc} and {pkt}
    #[arg(long, value_name = "COMMAND", value_parser = cli::name)]
    client: Option<String>,
    /// Speak the tutorial's dialect, in which all values are strings
    #[arg(long)]
    strings: bool,
    /// Only these sections or cases, such as 2 or 2.1; again, or with commas, for more
    #[arg(long, value_name = "NUMBER", value_delimiter = ',', value_parser = number)]
    only: Vec<String>,
    /// List the cases and end
    #[arg(long)]
    list: bool,
    /// Say everything as one JSON object, in the end
    #[arg(long)]
    json: bool,
    /// Show the bytes of each case with their times, and what the programs wrote
    #[arg(long)]
    verbose: bool,
    /// How long a case may wait for something; longer where the machine is busy
    #[arg(long, value_name = "N", default_value = "5", value_parser = cli::timeout)]
    seconds: Duration,
}

fn number(text: &str) -> Result<String, String> {
    let is_known = |case: &&Case| is_in(case, text);
    match cases::all().iter().find(|case| is_known(case)) {
        Some(_) => Ok(text.to_owned()),
        None => Err("there is no such section or case; see -list".to_owned()),
    }
}

fn is_in(case: &Case, number: &str) -> bool {
    case.number == number || case.section().to_string() == number
}

fn main() -> ExitCode {
    if program::is_guard(|checker| drop(fs::remove_dir_all(folder(checker)))) {
        return ExitCode::SUCCESS;
    }
    let options: Options = match cli::parse() {
        Ok(options) => options,
        Err(code) => return code,
    };
    hindrance::watch_panics();
    let terminal = Terminal::direct("check", false);
    let code = cli::run(&terminal, || run(&options, &terminal));
    // A report that cannot be written says nothing about the programs.
    if terminal.failure().is_some() { ExitCode::from(USAGE) } else { code }
}

fn run(options: &Options, terminal: &Terminal) -> Result<ExitCode, Problem> {
    let given = [&options.revproc, &options.server, &options.client];
    let is_checked = |role| match role {
        Role::All => true,
        role => given.iter().all(|given| given.is_none()) || given[role as usize].is_some(),
    };
    let mut chosen = cases::all();
    chosen.retain(|case| is_checked(case.role));
    if !options.only.is_empty() {
        chosen.retain(|case| options.only.iter().any(|number| is_in(case, number)));
    }
    if options.list {
        list(&chosen, terminal);
        return Ok(ExitCode::SUCCESS);
    }
    let folder = folder(&std::process::id().to_string());
    let setting = Arc::new(Setting {
        programs: programs(given, options.strings)?,
        ours: given.map(|given| given.is_none()),
        dialect: if options.strings { STRINGS } else { INTEGERS },
        other: if options.strings { INTEGERS } else { STRINGS },
        limit: options.seconds,
        last: Instant::now() + LONGEST,
        folder: folder.clone(),
    });
    fs::create_dir_all(&folder).map_err(|error| {
        Problem::usage(format!(
            "the checker could not do its work: {}: {error}; set TMPDIR to a folder that can be \
             written to",
            folder.display()
        ))
    })?;
    cli::on_signal({
        let folder = folder.clone();
        move || {
            end(&folder);
            std::process::exit(130);
        }
    })?;
    let guard = Guard::start();
    fair::start(setting.last);
    let code = check(options, &chosen, &setting, terminal);
    end(&folder);
    drop(guard);
    Ok(ExitCode::from(code))
}

/// Where a checker writes packet files.
fn folder(checker: &str) -> PathBuf {
    std::env::temp_dir().join(format!("revproc-check-{checker}"))
}

/// Ends every program, for good.
fn end(folder: &Path) {
    program::end_all();
    // What is left of it is a few small files.
    let _ = fs::remove_dir_all(folder);
}

fn check(
    options: &Options,
    chosen: &[&'static Case],
    setting: &Arc<Setting>,
    terminal: &Terminal,
) -> u8 {
    let begun = Instant::now();
    let broken = start::start_each(chosen, setting);
    if !options.json {
        let said = broken.iter().flat_map(|broken| broken.said.lines());
        said.for_each(|line| terminal.error_line(line));
    }
    let mut report = Report::new(chosen, terminal, options.verbose, options.json);
    let done = run::start(chosen, setting, &broken);
    for _ in chosen {
        let end = setting.last + ENDING;
        match done.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(done) => report.add(done),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    report.finish(hindrance::since(begun));
    let code = match report.is_passed() {
        _ if report.is_hindered() || !broken.is_empty() => USAGE,
        false => FAILED,
        true => 0,
    };
    if options.json {
        terminal.line(format_args!("{}", report.to_json(code, &broken)));
    } else {
        report.summary();
    }
    code
}

/// Returns the command lines of the three roles.
fn programs(given: [&Option<String>; 3], strings: bool) -> Result<[Template; 3], Problem> {
    let mut templates = [const { Template(String::new()) }; 3];
    for (role, name, places) in PROGRAMS {
        let command = match given[role as usize] {
            Some(command) => command.clone(),
            None => ours(name, places, strings)?,
        };
        if let Some(place) = places.iter().find(|place| !command.contains(&format!("{{{place}}}")))
        {
            return Err(Problem::usage(format!(
                "-{name} needs {{{place}}} where the checker's own value goes: '{command}'"
            )));
        }
        templates[role as usize] = Template(command);
    }
    Ok(templates)
}

/// Returns the command line of our own program, which lies beside this one's folder.
fn ours(name: &str, places: &[&str], strings: bool) -> Result<String, Problem> {
    let path = support::binary(name);
    if !path.exists() {
        return Err(Problem::usage(format!(
            "there is no {}, which takes the place of the program that is not given with -{name}; \
             build it with cargo build, and --release if this one was",
            path.display()
        )));
    }
    let mut command = format!("exec '{}'", path.display().to_string().replace('\'', r"'\''"));
    for place in places {
        command.push_str(&format!(" -{place} {{{place}}}"));
    }
    if name == "server" && strings {
        command.push_str(" -strings");
    }
    Ok(command)
}

fn list(cases: &[&Case], terminal: &Terminal) {
    let mut section = 0;
    for case in cases {
        if case.section() != section {
            section = case.section();
            terminal.line(format_args!("{section}   {}", cases::SECTIONS[section - 1]));
        }
        let rank = match case.rank {
            Rank::Required => String::new(),
            rank => format!(" ({})", rank.name()),
        };
        terminal.line(format_args!("     {:<5}{:<7}{}{rank}", case.number, case.role, case.title));
    }
}
