//! What the three command lines share: options with one dash or two, their values and files, signals,
//! exit codes.

mod arguments;
pub(crate) mod escape;
mod files;
mod signals;
pub mod terminal;
mod values;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::Parser;

use crate::net::listener::default_max_connections;
use crate::net::os_error::reason;
use terminal::Terminal;

pub use arguments::parse;
pub use files::{read_packets, read_text, read_token};
pub use signals::{WatchedSignals, on_signal, watch_signals};
pub use values::{
    count, duration, host, id, listen_endpoint, memory, name, port, size, timeout, whole_seconds,
};

/// Something was not delivered, not verified or not reachable, or the system said no.
pub const FAILED: u8 = 1;

/// The command line or a packet file is wrong.
pub const USAGE: u8 = 2;

/// Runs a program whose lines go to `terminal`, and which does `work`, as [`run`] has it.
pub fn main<T: Parser>(
    terminal: impl FnOnce(&T) -> Terminal,
    work: impl FnOnce(&T, &Terminal) -> Result<ExitCode, Problem>,
) -> ExitCode {
    let options = match parse() {
        Ok(options) => options,
        Err(code) => return code,
    };
    let terminal = terminal(&options);
    run(&terminal, || work(&options, &terminal))
}

/// Does a program's work: says what went wrong in its name, and waits for its lines to be written.
pub fn run(terminal: &Terminal, work: impl FnOnce() -> Result<ExitCode, Problem>) -> ExitCode {
    let code = work().unwrap_or_else(|problem| {
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

/// The limit on connections, which is at most what the open-file limit allows: says so where more was
/// `asked` for.
pub fn max_connections(asked: Option<usize>, terminal: &Terminal) -> usize {
    let most = default_max_connections();
    if let Some(asked) = asked.filter(|asked| *asked > most) {
        terminal.warn(format_args!(
            "-max-connections {asked} is more than the open-file limit allows; taking {most} (see ulimit -n)",
        ));
    }
    asked.unwrap_or(most).min(most)
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
            ErrorKind::AddrInUse => {
                format!(
                    "another program listens there; choose another with {option}, or 0 for any free one"
                )
            }
            ErrorKind::PermissionDenied => {
                format!("ports below 1024 take special rights; choose a higher one with {option}")
            }
            ErrorKind::NotFound => "is it written right? see -host".to_owned(),
            ErrorKind::AddrNotAvailable => "this machine has no such address; see -host".to_owned(),
            _ => format!("see -host and {option}"),
        };
        let reason = reason(error);
        Self::failed(format!("could not listen on {host} port {port}: {reason} ({advice})"))
    }
}
