//! The reverse proxy: `revproc -port 2100`.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use clap::Parser;
use revproc::cli::terminal::Terminal;
use revproc::cli::{self, Problem};
use revproc::net::endpoint::{Endpoint, LOOPBACK};
use revproc::net::listener;
use revproc::net::os_error::reason;
use revproc::proxy::{Admission, Proxy, Settings, TableLimits, status};

/// Forwards each message to a server of the privacy policy that it names, in turn
#[derive(Debug, Parser)]
#[command(name = "revproc", version)]
struct Options {
    /// The port to listen on, for clients and servers alike; 0 takes any free one
    #[arg(long, value_name = "PORT", value_parser = cli::port)]
    port: u16,
    /// The address to listen on
    #[arg(long, value_name = "ADDR", default_value = LOOPBACK, value_parser = cli::host)]
    host: String,
    /// Leave out the lines about messages, and whatever else peers can cause without end
    #[arg(long)]
    quiet: bool,
    /// Put the time in front of each line, in UTC
    #[arg(long)]
    timestamps: bool,
    /// The longest packet to take
    #[arg(long, value_name = "SIZE", default_value = "4M", value_parser = cli::size)]
    max_packet: usize,
    /// Memory for packets over 16K, of all clients together; one of the longest always finds room
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = cli::memory)]
    max_memory: usize,
    /// Connections at once; further ones wait [default: half of the open-file limit]
    #[arg(long, value_name = "N", value_parser = cli::count)]
    max_connections: Option<usize>,
    /// Connections at once from one address, loopback excepted [default: a quarter of those]
    #[arg(long, value_name = "N", value_parser = cli::count)]
    max_per_address: Option<usize>,
    /// Registered servers at most
    #[arg(long, value_name = "N", default_value = "1000", value_parser = cli::count)]
    max_servers: usize,
    /// Privacy policies at most
    #[arg(long, value_name = "N", default_value = "1000", value_parser = cli::count)]
    max_policies: usize,
    /// How long connecting to a server may take
    #[arg(long, value_name = "TIME", default_value = "1", value_parser = cli::timeout)]
    connect_timeout: Duration,
    /// How long a server without a lease may take for its ack
    #[arg(long, value_name = "TIME", default_value = "5", value_parser = cli::timeout)]
    reply_timeout: Duration,
    /// How long a message may take in all, tries included, where it does not say itself
    #[arg(long, value_name = "TIME", default_value = "10", value_parser = cli::timeout)]
    message_timeout: Duration,
    /// The longest time that a message may ask for
    #[arg(long, value_name = "TIME", default_value = "60m", value_parser = cli::timeout)]
    max_timeout: Duration,
    /// Servers that a message is tried at, at most
    #[arg(long, value_name = "N", default_value = "3", value_parser = cli::count)]
    tries: usize,
    /// How long a client may be silent before its connection is closed
    #[arg(long, value_name = "TIME", default_value = "60", value_parser = cli::timeout)]
    idle_timeout: Duration,
    /// How long a packet may take to arrive, and a second more for each 64 KiB
    #[arg(long, value_name = "TIME", default_value = "5", value_parser = cli::timeout)]
    packet_timeout: Duration,
    /// How long an orderly stop may take, for messages on their way and replies that nobody has read
    #[arg(long, value_name = "TIME", default_value = "10", value_parser = cli::timeout)]
    stop_timeout: Duration,
    /// How long to go on before that, while /healthz says 503, so that a balancer sends no more
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = cli::duration)]
    stop_delay: Duration,
    /// Connections at once to a server that has no lease
    #[arg(long, value_name = "N", default_value = "4", value_parser = cli::count)]
    per_server: usize,
    /// Serve a status page, /table.json, /metrics and /healthz on this port, or HOST:PORT [default: off]
    #[arg(long, value_name = "PORT", value_parser = cli::listen_endpoint)]
    status: Option<Endpoint>,
    /// A file whose first line servers must know to register
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl Options {
    fn terminal(&self) -> Terminal {
        Terminal::new("revproc", self.quiet).with_timestamps(self.timestamps)
    }

    fn settings(&self, terminal: &Terminal) -> Result<Settings, Problem> {
        let defaults = Settings::default();
        let most = defaults.connections.connections;
        let connections = cli::max_connections(self.max_connections, terminal);
        let admission = match &self.token_file {
            Some(file) => Admission::with_token(&cli::read_token(file).map_err(Problem::usage)?),
            None => Admission::Loopback,
        };
        Ok(Settings {
            max_packet: self.max_packet,
            max_memory: self.max_memory,
            idle_timeout: self.idle_timeout,
            packet_timeout: self.packet_timeout,
            message_timeout: self.message_timeout,
            max_timeout: self.max_timeout,
            reply_timeout: self.reply_timeout,
            connect_timeout: self.connect_timeout,
            per_server: self.per_server,
            tries: self.tries,
            connections: listener::Limits {
                connections,
                servers: self.max_servers.min(most),
                per_address: self.max_per_address.unwrap_or((connections / 4).max(1)),
                ..defaults.connections
            },
            table: TableLimits {
                servers: self.max_servers,
                policies: self.max_policies,
                ..defaults.table
            },
            admission,
            keep_recent: self.status.is_some(),
            stop_delay: self.stop_delay,
            stop_timeout: self.stop_timeout,
        })
    }
}

fn main() -> ExitCode {
    cli::main(Options::terminal, run)
}

fn run(options: &Options, terminal: &Terminal) -> Result<ExitCode, Problem> {
    listener::raise_file_limit();
    let settings = options.settings(terminal)?;
    warn_of_times(options, terminal);
    let guarded = matches!(settings.admission, Admission::Token(_));
    let (stop, stopped) = channel();
    cli::on_signal(move || {
        // Once the proxy has stopped, nobody listens any more.
        let _ = stop.send(());
    })?;
    let socket = listener::bind(&options.host, options.port)
        .map_err(|error| Problem::cannot_listen(&options.host, options.port, "-port", &error))?;
    let port = socket.local_addr().map_or(options.port, |address| address.port());
    let page = options.status.as_ref().map(|at| bind_status(at, port)).transpose()?;
    let proxy = Proxy::start(socket, settings, terminal.clone())
        .map_err(|error| Problem::failed(format!("could not start: {}", reason(&error))))?;
    terminal.line(format_args!("Running the reverse proxy on port {}", proxy.address().port()));
    if !guarded && !proxy.address().ip().is_loopback() {
        terminal.warn(format_args!(
            "listening on {}: servers may register from this host only, unless -token-file is given",
            proxy.address()
        ));
    }
    if let Some((socket, address, host)) = page {
        status::start(socket, host, Arc::clone(&proxy)).map_err(|error| {
            Problem::failed(format!("could not start the status page: {}", reason(&error)))
        })?;
        terminal.line(format_args!("Serving the status page on http://{address}/"));
    }
    let is_whole = proxy.run_until(&stopped);
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::from(cli::FAILED) })
}

/// Listens for those who look, before anything is announced. The proxy itself listens on `own_port`.
fn bind_status(at: &Endpoint, own_port: u16) -> Result<(TcpListener, SocketAddr, &str), Problem> {
    let Endpoint { host, port } = at;
    listener::bind(host, *port)
        .and_then(|socket| Ok((socket.local_addr()?, socket)))
        .map(|(address, socket)| (socket, address, host.as_str()))
        .map_err(|error| match error.kind() {
            ErrorKind::AddrInUse if *port == own_port => Problem::usage(format!(
                "-port and -status both ask for port {port}; choose another one with -status, or 0 for any free one"
            )),
            _ => Problem::cannot_listen(host, *port, "-status", &error),
        })
}

/// Says where one option limits the other.
fn warn_of_times(options: &Options, terminal: &Terminal) {
    let (reply, message) = (options.reply_timeout, options.message_timeout);
    if reply > message {
        terminal.warn(format_args!(
            "-reply-timeout is {} s, but a message has {} s in all, which -message-timeout sets; \
             raise that, too, or give messages a time of their own (the client's -timeout)",
            reply.as_secs_f64(),
            message.as_secs_f64()
        ));
    }
}
