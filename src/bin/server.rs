//! A server: `server -id 100 -pp PP_1 -listen 2105 -revproc 2100`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Parser;
use revproc::cli::terminal::Terminal;
use revproc::cli::{self, Problem};
use revproc::net::endpoint::{Endpoint, LOOPBACK};
use revproc::net::listener;
use revproc::net::os_error::reason;
use revproc::protocol::Id;
use revproc::server::{Command, CommandSettings, Server, Settings, Stop};

/// Answers each message with the SHA-1 of its payload, for a privacy policy, and with the result of a
/// command, if one is given
#[derive(Debug, Parser)]
#[command(name = "server", version)]
struct Options {
    /// The server's id
    #[arg(long, value_name = "ID", value_parser = cli::id, allow_hyphen_values = true)]
    id: String,
    /// The privacy policy that it serves
    #[arg(long, value_name = "PPID", value_parser = cli::id, allow_hyphen_values = true)]
    pp: String,
    /// The port to listen on for messages; 0 takes any free one
    #[arg(long, value_name = "LPORT", value_parser = cli::port)]
    listen: u16,
    /// The reverse proxy's port, or HOST:PORT; again for each further proxy
    #[arg(long, value_name = "RPPORT", required = true)]
    revproc: Vec<Endpoint>,
    /// The address to listen on
    #[arg(long, value_name = "ADDR", default_value = LOOPBACK, value_parser = cli::host)]
    host: String,
    /// Leave out the lines about messages, and whatever else peers can cause without end
    #[arg(long)]
    quiet: bool,
    /// Put the time in front of each line, in UTC
    #[arg(long)]
    timestamps: bool,
    /// Register as the tutorial's server does: all values as strings, and without a lease
    #[arg(long)]
    strings: bool,
    /// The longest packet to take
    #[arg(long, value_name = "SIZE", default_value = "4M", value_parser = cli::size)]
    max_packet: usize,
    /// Connections at once; further ones wait [default: half of the open-file limit]
    #[arg(long, value_name = "N", value_parser = cli::count)]
    max_connections: Option<usize>,
    /// How long a connection may be silent before it is closed
    #[arg(long, value_name = "TIME", default_value = "60", value_parser = cli::timeout)]
    idle_timeout: Duration,
    /// How long a packet may take to arrive, and a second more for each 64 KiB
    #[arg(long, value_name = "TIME", default_value = "5", value_parser = cli::timeout)]
    packet_timeout: Duration,
    /// A file whose first line the reverse proxy asks for
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Messages at once, further ones wait; the proxies are told [default: no limit; with a command, the
    /// number of cores]
    #[arg(long, value_name = "N", value_parser = cli::count)]
    at_once: Option<usize>,
    /// How long the command may run; a message's own shorter timeout counts instead
    #[arg(
        long,
        value_name = "TIME",
        default_value = "60",
        value_parser = cli::timeout,
        requires = "command"
    )]
    run_timeout: Duration,
    /// How long messages on their way may take when the server is told to stop
    #[arg(long, value_name = "TIME", default_value = "10", value_parser = cli::timeout)]
    stop_timeout: Duration,
    /// A program to run for each message, with its arguments: the payload is its standard input, its
    /// standard output the result
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Options {
    fn terminal(&self) -> Terminal {
        Terminal::new("server", self.quiet).with_timestamps(self.timestamps)
    }

    fn settings(&self, terminal: &Terminal) -> Result<Settings, Problem> {
        let owned = |text: &str| Id::from_text(text).into_owned();
        let defaults = Settings::new(owned(&self.id), owned(&self.pp), self.revproc.clone());
        let connections = cli::max_connections(self.max_connections, terminal);
        let token =
            self.token_file.as_deref().map(cli::read_token).transpose().map_err(Problem::usage)?;
        Ok(Settings {
            strings: self.strings,
            token,
            max_packet: self.max_packet,
            idle_timeout: self.idle_timeout,
            packet_timeout: self.packet_timeout,
            connections: listener::Limits {
                connections,
                per_address: connections,
                ..defaults.connections
            },
            at_once: self.at_once.or_else(|| self.has_command().then(cores)),
            stop_timeout: self.stop_timeout,
            ..defaults
        })
    }

    fn has_command(&self) -> bool {
        !self.command.is_empty()
    }

    fn command(&self, terminal: &Terminal) -> Result<Option<Arc<Command>>, Problem> {
        let Some((name, arguments)) = self.command.split_first() else { return Ok(None) };
        let settings = CommandSettings {
            id: Id::from_text(&self.id).into_owned(),
            run_timeout: self.run_timeout,
            max_result: self.max_packet,
        };
        let command = Command::new(name.clone(), arguments.to_vec(), settings, terminal.clone());
        command.map(Some).map_err(Problem::usage)
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn main() -> ExitCode {
    cli::main(Options::terminal, run)
}

fn run(options: &Options, terminal: &Terminal) -> Result<ExitCode, Problem> {
    // A command would have the same limit, and some programs go through all files that they might have.
    if !options.has_command() {
        listener::raise_file_limit();
    }
    let settings = options.settings(terminal)?;
    let command = options.command(terminal)?;
    // Before there is anything to end.
    let signals = cli::watch_signals()?;
    let socket = listener::bind(&options.host, options.listen).map_err(|error| {
        Problem::cannot_listen(&options.host, options.listen, "-listen", &error)
    })?;
    let started = match &command {
        Some(command) => {
            Server::start_with(Arc::clone(command), socket, settings, terminal.clone())
        }
        None => Server::start(socket, settings, terminal.clone()),
    };
    let server =
        started.map_err(|error| Problem::failed(format!("could not start: {}", reason(&error))))?;
    let stop = server.stopper();
    let kill = move || command.iter().for_each(|command| command.kill());
    // Once the server has stopped, nobody listens any more.
    let watched = signals.call(move || drop(stop.send(Stop::Told)), kill.clone());
    let result = watched.and_then(|()| server.run().map_err(Problem::failed));
    kill();
    result?;
    Ok(ExitCode::SUCCESS)
}
