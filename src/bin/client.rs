//! A client: `client -id 50 -revproc 2100 -pkt packets/hello.json`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use revproc::cli::terminal::Terminal;
use revproc::cli::{self, Problem};
use revproc::client::{Client, Outcome, Settings};
use revproc::net::endpoint::Endpoint;
use revproc::protocol::Id;
use revproc::protocol::packet_file::{self, Outgoing};

/// Sends messages through the reverse proxy and checks that they arrived intact
#[derive(Debug, Parser)]
#[command(name = "client", version)]
struct Options {
    /// The client's id, which becomes each packet's srcid
    #[arg(long, value_name = "ID", value_parser = cli::name, allow_hyphen_values = true)]
    id: String,
    /// The reverse proxy's port, or HOST:PORT; again for others, of which the first that answers is taken
    #[arg(long, value_name = "PORT", required = true)]
    revproc: Vec<Endpoint>,
    /// Files with packets to send; - is standard input
    #[arg(long, value_name = "PKTFILE", required = true, num_args = 1..)]
    pkt: Vec<PathBuf>,
    /// Leave out the lines about single messages
    #[arg(long)]
    quiet: bool,
    /// For how long to try each message again while no proxy or no server is there
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = cli::duration)]
    wait: Duration,
    /// How long the answer to a message may take
    #[arg(long, value_name = "TIME", default_value = "15", value_parser = cli::timeout)]
    reply_timeout: Duration,
    /// The longest answer to take
    #[arg(long, value_name = "SIZE", default_value = "4M", value_parser = cli::size)]
    max_packet: usize,
}

fn main() -> ExitCode {
    let options: Options = match cli::parse() {
        Ok(options) => options,
        Err(code) => return code,
    };
    let terminal = Terminal::direct("client", options.quiet);
    cli::run(&terminal, || run(&options, &terminal))
}

fn run(options: &Options, terminal: &Terminal) -> Result<ExitCode, Problem> {
    let id = Id::from_text(&options.id);
    let mut messages = Vec::new();
    for file in &options.pkt {
        messages.append(&mut read(file, &id)?);
    }
    let settings = Settings {
        proxies: options.revproc.clone(),
        wait: options.wait,
        reply_timeout: options.reply_timeout,
        max_packet: options.max_packet,
        // What every proxy can, the homework's too.
        keep_connection: false,
    };
    let mut client = Client::new(settings, terminal.clone());
    // Each message is sent, whatever became of the one before.
    let mut code = ExitCode::SUCCESS;
    for message in &messages {
        if !matches!(client.deliver(message), Outcome::Verified(_)) {
            code = ExitCode::from(cli::FAILED);
        }
    }
    Ok(code)
}

fn read(file: &Path, id: &Id<'_>) -> Result<Vec<Outgoing>, Problem> {
    let (name, content) = cli::read_packets(file).map_err(Problem::usage)?;
    packet_file::read(&content, id).map_err(|error| Problem::usage(format!("{name}: {error}")))
}
