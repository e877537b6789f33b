//! The checker (`examples/check`) against programs with one classic mistake each: they fail the cases
//! that are about it, and no others.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{BOUND, Program, Signal, binary};

/// How long a run may take, whatever it is given.
const LONGEST: Duration = Duration::from_secs(240);

/// The places of each role's command line.
const PLACES: [(&str, &str); 3] = [
    ("revproc", "-port {port}"),
    ("server", "-id {id} -pp {pp} -listen {listen} -revproc {revproc}"),
    ("client", "-id {id} -revproc {revproc} -pkt {pkt}"),
];

fn checker(arguments: &[&str]) -> Program {
    let path = binary("examples/check");
    assert!(path.exists(), "cargo test --test does not build examples: run cargo build --examples");
    let mut command = Command::new(path);
    command.args(arguments);
    Program::run(command)
}

fn run(arguments: &[&str]) -> (ExitStatus, Vec<String>, Vec<String>) {
    let mut program = checker(arguments);
    let status = program.end_within(LONGEST);
    (status, program.out(), program.err())
}

fn has_python() -> bool {
    let found = python().is_some();
    if !found {
        eprintln!("skipped: there is no python3");
    }
    found
}

/// Where Python itself is: what is found by its name may be a script that looks for it.
fn python() -> Option<&'static str> {
    static FOUND: LazyLock<Option<String>> = LazyLock::new(|| {
        let print = ["-c", "import sys; print(sys.executable, end='')"];
        String::from_utf8(Command::new("python3").args(print).output().ok()?.stdout).ok()
    });
    FOUND.as_deref()
}

/// The command line of a role's program with this mistake.
fn mistaken(role: &str, mistake: &str) -> String {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/support/mistakes.py");
    let places = PLACES.iter().find(|(name, _)| *name == role).expect("a role").1;
    // With -S, a start takes half the time.
    format!("exec '{}' -S '{}' {role} {mistake} {places}", python().unwrap(), file.display())
}

/// Checks a role's program with this mistake, which must fail these cases and no others.
fn fails(role: &str, mistake: &str, expected: &[&str]) {
    fails_with(role, mistake, expected, &[]);
}

/// As [`fails`], in the sections that could have to do with it.
fn fails_in(sections: &str, role: &str, mistake: &str, expected: &[&str]) {
    fails_with(role, mistake, expected, &["-only", sections]);
}

fn fails_with(role: &str, mistake: &str, expected: &[&str], more: &[&str]) -> Option<Value> {
    if !has_python() {
        return None;
    }
    let option = format!("-{role}");
    let command = mistaken(role, mistake);
    let arguments = [&[&*option, &command, "-json", "-seconds", "3"], more].concat();
    let (status, out, err) = run(&arguments);
    let report: Value = serde_json::from_str(&out.concat()).unwrap_or_else(|_| panic!("{err:#?}"));
    let cases = report["cases"].as_array().expect("an array");
    let failed: Vec<_> = cases.iter().filter(|case| case["result"] == "fail").collect();
    let numbers: Vec<_> = failed.iter().map(|case| case["number"].as_str().unwrap()).collect();
    assert_eq!(numbers, expected, "{role} {mistake}: {failed:#?}");
    assert!(cases.len() >= 8 || more.iter().any(|only| only.contains('.')), "{cases:#?}");
    let is_required = failed.iter().any(|case| case["rank"] == "required");
    assert_eq!(status.code(), Some(i32::from(is_required)), "{err:#?}");
    assert_eq!(report["exit"], i64::from(is_required));
    Some(report)
}

/// As [`fails_in`], where each of the cases must explain itself like this.
fn fails_saying(sections: &str, role: &str, mistake: &str, expected: &[(&str, &str)]) {
    let numbers: Vec<_> = expected.iter().map(|(number, _)| *number).collect();
    let Some(report) = fails_with(role, mistake, &numbers, &["-only", sections]) else { return };
    for (number, part) in expected {
        let mut cases = report["cases"].as_array().unwrap().iter();
        let why = cases.find(|case| case["number"] == *number).unwrap()["why"].to_string();
        assert!(why.contains(part), "{role} {mistake}: {why}");
    }
}

#[test]
fn programs_without_mistakes_pass() {
    if !has_python() {
        return;
    }
    let commands = PLACES.map(|(role, _)| (format!("-{role}"), mistaken(role, "none")));
    let mut arguments: Vec<_> =
        commands.iter().flat_map(|(option, command)| [&**option, &**command]).collect();
    arguments.extend(["-only", "1,2"]);
    let (status, out, err) = run(&arguments);
    assert!(status.success(), "{out:#?}{err:#?}");
    assert_eq!(out.last().unwrap(), "36 pass, 0 fail");
}

#[test]
fn a_server_whose_packet_is_one_read() {
    fails("server", "one-recv", &["2.1", "2.3", "2.4"]);
}

#[test]
fn a_proxy_whose_packet_is_one_read() {
    fails("revproc", "one-recv", &["2.10", "2.12", "2.13", "2.14"]);
}

#[test]
fn a_client_whose_packet_is_one_read() {
    fails("client", "one-recv", &["2.9"]);
}

#[test]
fn programs_that_parse_two_packets_as_one() {
    fails("server", "two-packets", &["2.4"]);
    fails_in("1,2", "revproc", "two-packets", &["2.14"]);
}

#[test]
fn a_server_that_keeps_its_hash_object() {
    fails("server", "kept-hash", &["1.6"]);
}

#[test]
fn a_server_that_hashes_in_latin_1() {
    fails_in("1,2", "server", "latin-1", &["1.7"]);
}

#[test]
fn a_server_whose_acks_have_no_destid() {
    fails_in("1,5", "server", "no-destid", &["1.5"]);
}

#[test]
fn a_server_that_registers_before_it_listens() {
    fails("server", "late-listen", &["1.2"]);
}

#[test]
fn programs_that_serve_one_connection_at_a_time() {
    fails("server", "one-at-a-time", &["3.2"]);
    fails("revproc", "one-at-a-time", &["3.6", "3.7", "3.8"]);
}

#[test]
fn a_proxy_whose_rotation_begins_anew() {
    fails_in("1,3,4", "revproc", "rotation", &["1.17"]);
}

#[test]
fn a_proxy_without_an_answer_for_an_unknown_policy() {
    fails_in("1,4", "revproc", "no-answer", &["4.9"]);
}

#[test]
fn a_client_that_does_not_check() {
    fails("client", "no-check", &["1.11"]);
}

#[test]
fn programs_that_do_not_use_what_they_are_given() {
    let line = |value| format!("It is always {value}: the value from the command line is not used");
    let message = "It is always 50: the value from the message is not used";
    fails_saying("1,5", "server", "fixed-ids", &[("1.4", &line("100")), ("1.5", message)]);
    fails_saying("5.3", "server", "fixed-ids", &[("5.3", message)]);
    fails_saying("1", "server", "fixed-id", &[("1.1", &line("100"))]);
    fails_saying("1.1", "server", "fixed-policy", &[("1.1", &line("PP_1"))]);
    fails_saying("1.9", "client", "fixed-id", &[("1.9", &line("50"))]);
    fails_saying("1.9", "client", "file-id", &[("1.9", "It is the srcid of the packet file")]);
}

#[test]
fn a_server_with_another_hash_is_told_which() {
    fails_saying("1.3", "server", "whole-packet", &[("1.3", "the SHA-1 of the whole packet")]);
    fails_saying("1.3", "server", "quoted", &[("1.3", "the SHA-1 of the text as JSON")]);
    fails_saying("1.3", "server", "upper-case", &[("1.3", "in capitals")]);
    fails_saying("1.3", "server", "base64", &[("1.3", "in base64")]);
    fails_saying("1.3,1.6", "server", "no-zeros", &[("1.6", "The zeros in front are missing")]);
}

#[test]
fn strings_for_integers_are_no_mistake() {
    fails("server", "strings", &[]);
    fails_with("server", "strings", &[], &["-strings", "-only", "1,5"]);
    fails_with("client", "strings", &[], &["-strings", "-only", "1,2"]);
}

#[test]
fn the_report_says_what_was_sent_what_came_and_where_to_look() {
    if !has_python() {
        return;
    }
    let server = mistaken("server", "kept-hash");
    let (_, out, _) = run(&["-server", &server, "-only", "1.6", "-verbose"]);
    let text = out.join("\n");
    let hash = revproc::protocol::hash("the first".to_owned().as_str());
    for part in [
        "1   The homework\nFAIL 1.6  each message gets its own hash\n          sent     three messages",
        "\n          came     for message 2: the payload ",
        "\n          look     It is the SHA-1 of this text and those before it together",
        &format!("\"payload\": \"{hash}\""),
        "server| Listening on port ",
        "\n0 pass, 1 fail (1 required, 0 recommended)",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn a_program_that_cannot_be_started_is_shown_with_its_output() {
    let places = PLACES[1].1;
    let server = format!("echo 'no module named sockets' >&2; exit 3 # {places}");
    let (status, out, err) = run(&["-server", &server]);
    assert_eq!(status.code(), Some(2));
    let text = err.join("\n");
    assert!(text.starts_with("the server (-server) could not be started: "), "{text}");
    assert!(text.contains("  it has ended: exit status: 3\n  | no module named sockets"), "{text}");
    let last = out.last().unwrap();
    assert!(last.starts_with("0 pass, 0 fail, ") && last.ends_with(" skipped"), "{last}");
}

#[test]
fn a_program_that_sends_nothing_is_said_to_send_no_packet() {
    let (status, _, err) = run(&["-client", "exit 0 # {id} {revproc} {pkt}", "-only", "1.9"]);
    assert_eq!(status.code(), Some(2));
    assert_eq!(
        err[0],
        "the client (-client) could not be started: it sent no packet to the proxy's port"
    );
}

#[test]
fn what_hinders_the_checker_is_no_mistake_of_the_programs() {
    let run_with = |before: &str, after: &str| {
        let check = binary("examples/check").display().to_string();
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("{before} '{check}' -only 1 {after}"));
        let mut program = Program::run(shell);
        (program.end_within(LONGEST).code(), program.out(), program.err())
    };
    for files in [10, 25] {
        let (code, out, err) = run_with(&format!("ulimit -S -n {files}; exec"), "");
        assert_eq!(code, Some(2), "{out:#?}{err:#?}");
        assert!(out.iter().all(|line| !line.starts_with("FAIL")), "{out:#?}");
        let is_said = |line: &String| line.contains("the checker could not do its work: ");
        assert!(out.iter().any(is_said), "{out:#?}");
    }
    let (code, _, err) = run_with("exec", ">/dev/full");
    assert_eq!(code, Some(2), "{err:#?}");
    let (code, _, err) = run_with("TMPDIR=/proc exec", "");
    assert_eq!(code, Some(2));
    assert!(err[0].contains("set TMPDIR"), "{err:#?}");
}

#[test]
fn the_bytes_in_between_the_three_programs_have_the_checkers_name() {
    let (status, out, err) = run(&["-only", "1.20", "-verbose"]);
    assert!(status.success(), "{out:#?}{err:#?}");
    for part in ["the checker (to the client) reads ", "the checker (to the proxy) sends "] {
        assert!(out.iter().any(|line| line.contains(part)), "{out:#?}");
    }
    assert!(!out.iter().any(|line| line.contains(" s  the proxy reads ")), "{out:#?}");
}

#[test]
fn a_command_line_without_a_place_and_an_unknown_case_are_mistakes_of_the_command_line() {
    let (status, _, err) = run(&["-revproc", "python3 revproc.py -port 5000"]);
    assert_eq!(status.code(), Some(2));
    assert!(err[0].contains("-revproc needs {port}"), "{err:#?}");
    let (status, _, err) = run(&["-only", "7.1"]);
    assert_eq!(status.code(), Some(2));
    assert!(err[0].contains("there is no such section or case; see -list"), "{err:#?}");
}

#[test]
fn the_list_says_whose_each_case_is_and_whether_it_is_required() {
    let (status, out, _) = run(&["-list"]);
    assert!(status.success());
    assert!(out.contains(&"2   TCP is a stream".to_owned()), "{out:#?}");
    assert!(
        out.iter()
            .any(|line| { line.contains("1.16 proxy  five messages to two servers go 1 2 1 2 1") })
    );
    assert!(out.iter().any(|line| {
        line.contains("3.2  server a silent connection") && line.ends_with("(recommended)")
    }));
    assert!(out.len() > 60, "{out:#?}");
}

/// A proxy of ours that floods its output, and leaves a process in a session of its own.
fn wild(mark: u32) -> String {
    let ours = binary("revproc").display().to_string();
    format!("setsid sleep {mark} & yes & exec '{ours}' -port {{port}}")
}

/// How many processes sleep for so long.
fn sleepers(mark: u32) -> usize {
    let wanted = format!("sleep\0{mark}\0");
    let lines = fs::read_dir("/proc").unwrap().flatten();
    lines
        .filter(|entry| {
            fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == wanted.as_bytes())
        })
        .count()
}

#[test]
fn a_program_that_floods_and_forks_is_checked_and_leaves_nothing() {
    let mark = 1_000_000 + std::process::id();
    let (status, out, err) = run(&["-revproc", &wild(mark), "-only", "1.13,1.14,1.16"]);
    assert!(status.success(), "{out:#?}{err:#?}");
    assert_eq!(out.last().unwrap(), "3 pass, 0 fail");
    assert_eq!(sleepers(mark), 0);
}

#[test]
fn nothing_is_left_when_the_checker_is_interrupted_or_killed() {
    for (nth, signal, code) in [(2, Signal::INT, Some(130)), (3, Signal::KILL, None)] {
        ended_by(signal, code, nth * 1_000_000 + std::process::id());
    }
}

fn ended_by(signal: Signal, code: Option<i32>, mark: u32) {
    // It never answers, so that the checker is in the middle of its cases for a while.
    let sleeping = format!("setsid sleep {mark} & exec sleep {mark} # {}", PLACES[0].1);
    let mut program = checker(&["-revproc", &sleeping]);
    let end = Instant::now() + BOUND;
    while sleepers(mark) < 2 {
        assert!(Instant::now() < end, "{}", program.report());
        std::thread::sleep(Duration::from_millis(5));
    }
    program.signal(signal);
    assert_eq!(program.end().code(), code);
    if code.is_some() {
        assert_eq!(sleepers(mark), 0);
    }
    let end = Instant::now() + BOUND;
    while sleepers(mark) > 0 {
        assert!(Instant::now() < end, "{}", program.report());
        std::thread::sleep(Duration::from_millis(5));
    }
}
