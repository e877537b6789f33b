//! What the three command lines share: options with one dash or two, sizes, durations, exit codes.

use std::ffi::OsString;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};

use crate::endpoint::{Endpoint, LOOPBACK};
use crate::terminal::Terminal;

/// Something was not delivered, not verified or not reachable, or the system said no.
pub const FAILED: u8 = 1;

/// The command line or a packet file is wrong.
pub const USAGE: u8 = 2;

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
    let parsed =
        command.try_get_matches_from(arguments).and_then(|matches| T::from_arg_matches(&matches));
    parsed.map_err(|error| {
        let terminal = Terminal::new("", false);
        // What one reads is what one types.
        let text = error.render().to_string().replace("--", "-");
        let code = if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            text.lines().for_each(|line| terminal.line(format_args!("{line}")));
            ExitCode::SUCCESS
        } else {
            let text = text.strip_prefix("error").unwrap_or(&text);
            format!("{name}{text}").lines().for_each(|line| terminal.error_line(line));
            ExitCode::from(USAGE)
        };
        terminal.flush();
        code
    })
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
    text.parse().map_err(|_| "a port is a number from 1 to 65535, or 0 for any free one".to_owned())
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
    let (number, unit) = split_unit(text);
    let shift = match unit {
        "" | "B" => Some(0),
        "K" | "KiB" => Some(10),
        "M" | "MiB" => Some(20),
        "G" | "GiB" => Some(30),
        _ => None,
    };
    let bytes = shift.and_then(|shift| number.parse::<usize>().ok()?.checked_mul(1 << shift));
    bytes
        .filter(|bytes| (256..=1 << 30).contains(bytes))
        .ok_or_else(|| "give bytes such as 65536, or 64K, or 4M; from 256 bytes to 1G".to_owned())
}

/// A number of things of which there must be at least one.
///
/// # Errors
///
/// What it is.
pub fn count(text: &str) -> Result<usize, String> {
    usize::from_str(text)
        .ok()
        .filter(|count| (1..=1_000_000).contains(count))
        .ok_or_else(|| "give a whole number, 1 or more".to_owned())
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
pub fn read_token(path: &std::path::Path) -> Result<String, String> {
    let shown = path.display();
    let content = std::fs::read_to_string(path).map_err(|error| {
        format!("could not read the token file {shown}: {}", crate::wire::reason(&error))
    })?;
    match content.lines().next().map(str::trim) {
        Some(token) if !token.is_empty() => Ok(token.to_owned()),
        _ => Err(format!("the token file {shown} is empty; its first line is the token")),
    }
}

/// Runs a role's program: says what went wrong in its name, and waits for its lines to be written.
pub fn run(terminal: &Terminal, role: impl FnOnce() -> Result<ExitCode, Problem>) -> ExitCode {
    let code = role().unwrap_or_else(|problem| {
        terminal.warn(format_args!("{}", problem.message));
        ExitCode::from(problem.code)
    });
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
            std::io::ErrorKind::AddrNotAvailable => {
                "this machine has no such address; see -host".to_owned()
            }
            _ => format!("see -host and {option}"),
        };
        let reason = crate::wire::reason(error);
        Self::failed(format!("could not listen on {host} port {port}: {reason} ({advice})"))
    }
}

/// Calls `stop` at the first SIGINT, SIGTERM or SIGHUP; a second one ends the process at once.
///
/// # Errors
///
/// Where the system does not let us.
pub fn on_signal(stop: impl Fn() + Send + 'static) -> Result<(), Problem> {
    let mut told = false;
    ctrlc::set_handler(move || {
        if std::mem::replace(&mut told, true) {
            std::process::exit(FAILED.into());
        }
        stop();
    })
    .map_err(|error| Problem::failed(format!("could not watch for signals: {error}")))
}
