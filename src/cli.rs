//! What the three command lines share: options with one dash or two, sizes, durations, exit codes.

pub(crate) mod escape;
pub mod terminal;

use std::ffi::{OsString, c_int};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use clap::builder::UnknownArgumentValueParser;
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::net::endpoint::{Endpoint, LOOPBACK};
use crate::net::os_error::{reason, thread_failure};
use terminal::Terminal;

/// Something was not delivered, not verified or not reachable, or the system said no.
pub const FAILED: u8 = 1;

/// The command line or a packet file is wrong.
pub const USAGE: u8 = 2;

/// The most of anything that is counted.
const MAX_COUNT: usize = 1_000_000;

/// The longest token, in bytes.
const MAX_TOKEN: u64 = 4096;

/// The most that is read of a packet file, in bytes: a device would have no end.
const MAX_PACKET_FILE: u64 = 256 << 20;

/// Parses this process's command line, in which options have one dash or two.
///
/// # Errors
///
/// The exit code, when there is nothing to run: help was asked for, or the command line is wrong,
/// which has been said.
pub fn parse<T: CommandFactory + FromArgMatches>() -> Result<T, ExitCode> {
    let arguments = std::env::args_os().map(two_dashes);
    let command = T::command().disable_help_flag(true).disable_version_flag(true).args([
        clap::Arg::new("help")
            .long("help")
            .short('h')
            .action(clap::ArgAction::Help)
            .help("Say this and end"),
        clap::Arg::new("version")
            .long("version")
            .short('V')
            .action(clap::ArgAction::Version)
            .help("Say which version this is and end"),
    ]);
    let name = command.get_name().to_owned();
    let command = match name.as_str() {
        "client" => command.arg(mistaken("port", "--revproc")),
        "server" => command.arg(mistaken("port", "--listen")),
        _ => command.arg(mistaken("listen", "--port")),
    };
    let parsed =
        command.try_get_matches_from(arguments).and_then(|matches| T::from_arg_matches(&matches));
    parsed.map_err(|error| {
        let terminal = Terminal::direct("", false);
        // What one reads is what one types.
        let text = error.render().to_string().replace("--", "-");
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            text.lines().for_each(|line| terminal.line(format_args!("{line}")));
            ExitCode::SUCCESS
        } else {
            let text = text.strip_prefix("error").unwrap_or(&text);
            format!("{name}{text}").lines().for_each(|line| terminal.error_line(line));
            ExitCode::from(USAGE)
        }
    })
}

/// An option that another of the programs has, and what is it called in this one.
fn mistaken(option: &'static str, meant: &'static str) -> clap::Arg {
    let parser = UnknownArgumentValueParser::suggest_arg(meant);
    clap::Arg::new(option).long(option).value_name("PORT").hide(true).value_parser(parser)
}

/// `-port` as `--port`, which is how clap knows long options.
fn two_dashes(argument: OsString) -> OsString {
    match argument.to_str().and_then(|text| text.strip_prefix('-')) {
        Some(name)
            if name.len() > 1 && name.starts_with(|first: char| first.is_ascii_lowercase()) =>
        {
            format!("--{name}").into()
        }
        _ => argument,
    }
}

/// A port to listen on; 0 is any free one.
///
/// # Errors
///
/// What a port is.
pub fn port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            format!("give the port alone, {port}, and the address with -host {host}")
        }
        _ => "a port is a number from 1 to 65535, or 0 for any free one".to_owned(),
    })
}

/// An id or a policy.
///
/// # Errors
///
/// That it is empty, as where a shell's variable is.
pub fn name(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("it is empty".to_owned()) } else { Ok(text.to_owned()) }
}

/// An address to listen on, or a name; an IPv6 address with its brackets or without.
///
/// # Errors
///
/// That it is empty.
pub fn host(text: &str) -> Result<String, String> {
    name(text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text))
}

/// Where to listen: a port, which may be 0, on the loopback address unless a host is given.
///
/// # Errors
///
/// How it is written.
pub fn listen_endpoint(text: &str) -> Result<Endpoint, String> {
    match text.strip_suffix(":0").or((text == "0").then_some(LOOPBACK)) {
        Some(host) => Ok(Endpoint { port: 0, ..format!("{host}:1").parse()? }),
        None => text.parse(),
    }
}

/// A length of time: `5` or `2.5` seconds, `300ms`, `5s`, `2m`.
///
/// # Errors
///
/// How it is written.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text);
    let seconds = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        _ => f64::NAN,
    };
    number
        .parse::<f64>()
        .ok()
        .and_then(|number| Duration::try_from_secs_f64(number * seconds).ok())
        .filter(|length| *length <= Duration::from_secs(86_400))
        .ok_or_else(|| "give seconds such as 5 or 2.5, or 300ms, or 2m; a day at most".to_owned())
}

/// As [`duration`], but not nothing.
///
/// # Errors
///
/// How it is written.
pub fn timeout(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        length if length >= Duration::from_millis(1) => Ok(length),
        _ => Err("a timeout must be at least 1ms".to_owned()),
    }
}

/// A size in bytes: `65536`, `64K` or `64KiB`, `4M` or `4MiB`, `1G`.
///
/// # Errors
///
/// How it is written.
pub fn size(text: &str) -> Result<usize, String> {
    bytes(text)
        .filter(|bytes| (256..=1 << 30).contains(bytes))
        .ok_or_else(|| "give bytes such as 65536, or 64K, or 4M; from 256 bytes to 1G".to_owned())
}

/// As [`size`], but as large as one likes.
///
/// # Errors
///
/// How it is written.
pub fn memory(text: &str) -> Result<usize, String> {
    bytes(text).ok_or_else(|| "give bytes such as 268435456, or 256M, or 4G".to_owned())
}

fn bytes(text: &str) -> Option<usize> {
    let (number, unit) = split_unit(text);
    let shift = match unit {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(1 << shift)
}

/// A number of things of which there must be at least one.
///
/// # Errors
///
/// What it is.
pub fn count(text: &str) -> Result<usize, String> {
    usize::from_str(text)
        .ok()
        .filter(|count| (1..=MAX_COUNT).contains(count))
        .ok_or_else(|| format!("give a whole number from 1 to {MAX_COUNT}"))
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text.split_at(end)
}

/// Reads a token file: its first line.
///
/// # Errors
///
/// What is wrong with the file; never what is in it.
pub fn read_token(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let mut line = Vec::new();
    File::open(path)
        .and_then(|file| BufReader::new(file.take(MAX_TOKEN + 1)).read_until(b'\n', &mut line))
        .map_err(|error| format!("could not read the token file {shown}: {}", reason(&error)))?;
    if line.len() as u64 > MAX_TOKEN {
        return Err(format!(
            "the first line of the token file {shown}, which is the token, is longer than {MAX_TOKEN} bytes"
        ));
    }
    match String::from_utf8(line).as_deref().map(str::trim) {
        Err(_) => Err(format!("the first line of the token file {shown} is not UTF-8")),
        Ok("") => Err(format!("the token file {shown} is empty; its first line is the token")),
        Ok(token) => Ok(token.to_owned()),
    }
}

/// Reads a packet file, or with `-` standard input. Returns it with the name to show.
///
/// # Errors
///
/// That it cannot be read, or has no end in sight.
pub fn read_packets(path: &Path) -> Result<(String, Vec<u8>), String> {
    let (name, input): (_, io::Result<Box<dyn Read>>) = if path == Path::new("-") {
        ("standard input".to_owned(), Ok(Box::new(io::stdin())))
    } else {
        (path.display().to_string(), File::open(path).map(|file| Box::new(file) as _))
    };
    let mut content = Vec::new();
    input
        .and_then(|input| input.take(MAX_PACKET_FILE + 1).read_to_end(&mut content))
        .map_err(|error| format!("could not read {name}: {}", reason(&error)))?;
    if content.len() as u64 > MAX_PACKET_FILE {
        return Err(format!(
            "{name} has more than {} MiB; split it into several files",
            MAX_PACKET_FILE >> 20
        ));
    }
    Ok((name, content))
}

/// Runs a role's program: says what went wrong in its name, and waits for its lines to be written.
pub fn run(terminal: &Terminal, role: impl FnOnce() -> Result<ExitCode, Problem>) -> ExitCode {
    let code = role().unwrap_or_else(|problem| {
        terminal.warn(format_args!("{}", problem.message));
        ExitCode::from(problem.code)
    });
    if let Some(reason) = terminal.failure() {
        terminal.warn(format_args!("could not write to standard output: {reason}"));
        return ExitCode::from(FAILED);
    }
    terminal.flush();
    code
}

/// Why a program ends early.
#[derive(Debug, Clone)]
pub struct Problem {
    /// What happened, to what, and what to do.
    pub message: String,
    /// [`FAILED`] or [`USAGE`].
    pub code: u8,
}

impl Problem {
    /// The system said no.
    pub fn failed(message: impl Into<String>) -> Self {
        Problem { message: message.into(), code: FAILED }
    }

    /// The command line or a file is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Problem { message: message.into(), code: USAGE }
    }

    /// A port cannot be listened on. `option` is the one that says which.
    pub fn cannot_listen(host: &str, port: u16, option: &str, error: &std::io::Error) -> Self {
        let advice = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                format!(
                    "another program listens there; choose another with {option}, or 0 for any free one"
                )
            }
            std::io::ErrorKind::PermissionDenied => {
                format!("ports below 1024 take special rights; choose a higher one with {option}")
            }
            std::io::ErrorKind::NotFound => "is it written right? see -host".to_owned(),
            std::io::ErrorKind::AddrNotAvailable => {
                "this machine has no such address; see -host".to_owned()
            }
            _ => format!("see -host and {option}"),
        };
        let reason = reason(error);
        Self::failed(format!("could not listen on {host} port {port}: {reason} ({advice})"))
    }
}

/// Calls `stop` at the first SIGINT, SIGTERM or SIGHUP; a second one ends the process at once. A
/// SIGHUP that is ignored, as `nohup` has it, stays ignored.
///
/// # Errors
///
/// Where the system does not let us.
pub fn on_signal(stop: impl Fn() + Send + 'static) -> Result<(), Problem> {
    let mut signals = vec![SIGINT, SIGTERM];
    if !is_ignored(SIGHUP) {
        signals.push(SIGHUP);
    }
    let failed = |error| {
        Problem::failed(format!("could not watch for signals: {}", reason(&thread_failure(error))))
    };
    let mut signals = Signals::new(signals).map_err(failed)?;
    let watch = move || {
        let mut arriving = signals.forever();
        if arriving.next().is_some() {
            stop();
        }
        if arriving.next().is_some() {
            std::process::exit(FAILED.into());
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(watch).map(drop).map_err(failed)
}

/// Whether the program was started with this signal ignored, as far as the system says.
fn is_ignored(signal: c_int) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_dash_is_as_good_as_two_before_a_word() {
        let changed =
            [("-port", "--port"), ("-port=1", "--port=1"), ("-max-packet", "--max-packet")];
        for (argument, meant) in changed {
            assert_eq!(two_dashes(argument.into()), meant);
        }
        for same in ["--port", "-h", "-V", "-", "-5", "-PP", "port", "", "--"] {
            assert_eq!(two_dashes(same.into()), same);
        }
    }

    #[test]
    fn ports_go_from_0_to_65535() {
        assert_eq!(port("0"), Ok(0));
        assert_eq!(port("65535"), Ok(65535));
        for wrong in ["", "65536", "-1", "http", "1.0", " 1", ":1", "host:port"] {
            assert!(port(wrong).unwrap_err().contains("from 1 to 65535"), "{wrong}");
        }
        let expected = "give the port alone, 2106, and the address with -host [::1]";
        assert_eq!(port("[::1]:2106").unwrap_err(), expected);
    }

    #[test]
    fn lengths_of_time_are_seconds_unless_they_have_a_unit() {
        for (text, milliseconds) in [
            ("0", 0),
            ("5", 5000),
            ("2.5", 2500),
            ("5s", 5000),
            ("300ms", 300),
            ("2m", 120_000),
            ("86400", 86_400_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for wrong in
            ["", "s", "-1", "1h", "5 s", "1e3", "inf", "86401", "1.2.3", "9".repeat(400).as_str()]
        {
            assert!(duration(wrong).unwrap_err().starts_with("give seconds"), "{wrong}");
        }
    }

    #[test]
    fn a_timeout_is_not_nothing() {
        assert_eq!(timeout("1ms"), Ok(Duration::from_millis(1)));
        for wrong in ["0", "0ms", "0.0001"] {
            assert_eq!(timeout(wrong).unwrap_err(), "a timeout must be at least 1ms");
        }
        assert!(timeout("soon").unwrap_err().starts_with("give seconds"));
    }

    #[test]
    fn sizes_are_bytes_unless_they_have_a_unit() {
        for (text, bytes) in [
            ("256", 256),
            ("65536B", 65536),
            ("64K", 65536),
            ("64KiB", 65536),
            ("4M", 4 << 20),
            ("4MiB", 4 << 20),
            ("1G", 1 << 30),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for wrong in
            ["", "K", "255", "2G", "4T", "1.5M", "-1", "99999999999999999999", "17179869185G"]
        {
            assert!(size(wrong).unwrap_err().starts_with("give bytes"), "{wrong}");
            assert_eq!(
                memory(wrong).is_err(),
                size(wrong).is_err() && !["255", "2G"].contains(&wrong)
            );
        }
    }

    #[test]
    fn counts_begin_with_1() {
        assert_eq!(count("1"), Ok(1));
        assert_eq!(count("1000000"), Ok(1_000_000));
        for wrong in ["0", "-1", "1000001", "1.5", "", "many"] {
            let expected = "give a whole number from 1 to 1000000";
            assert_eq!(count(wrong).unwrap_err(), expected, "{wrong}");
        }
    }

    #[test]
    fn a_token_is_the_first_line_of_its_file() {
        let folder = std::env::temp_dir();
        let path = folder.join(format!("token-of-test-{}", std::process::id()));
        let mut read = |content: &str| {
            std::fs::write(&path, content).unwrap();
            read_token(&path)
        };
        let outcomes = ["secret", " secret \r\nnot this\n", "", "\n\nsecret"].map(&mut read);
        let longest = ["x".repeat(4096), "x".repeat(4097)].map(|content| read(&content));
        let missing = std::fs::remove_file(&path).map(|()| read_token(&path)).unwrap();
        assert_eq!(outcomes[0].as_deref(), Ok("secret"));
        assert_eq!(outcomes[1].as_deref(), Ok("secret"));
        let shown = path.display();
        let empty = format!("the token file {shown} is empty; its first line is the token");
        assert_eq!(outcomes[2..], [Err(empty.clone()), Err(empty)]);
        assert_eq!(longest[0].as_ref().map(String::len), Ok(4096));
        assert!(longest[1].as_ref().unwrap_err().ends_with("is longer than 4096 bytes"));
        let gone = format!("could not read the token file {shown}: no such file or directory");
        assert_eq!(missing, Err(gone));
    }
}
