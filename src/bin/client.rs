//! A client: `client -id 50 -revproc 2100 -pkt packets/hello.json`, or
//! `client -id 50 -revproc 2100 -pp PP_1 -text hello`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use revproc::cli::terminal::Terminal;
use revproc::cli::{self, Problem};
use revproc::client::{Client, CommandLine, Reply, Settings};
use revproc::net::endpoint::Endpoint;
use revproc::protocol::packet_file::{self, ClientFields};
use revproc::protocol::{Data, Id, Outgoing};

/// Sends messages through the reverse proxy and checks that they arrived intact
#[derive(Debug, Parser)]
#[command(
    name = "client",
    version,
    override_usage = "client -id ID -revproc PORT... (-pkt PKTFILE... | -pp PPID -text TEXT) [OPTIONS]"
)]
struct Options {
    /// The client's id, which becomes each packet's srcid
    #[arg(long, value_name = "ID", value_parser = cli::id, allow_hyphen_values = true)]
    id: String,
    /// The reverse proxy's port, or HOST:PORT; again for others, of which the first that answers is taken
    #[arg(long, value_name = "PORT", required = true)]
    revproc: Vec<Endpoint>,
    /// Files with packets to send; - is standard input
    #[arg(
        long,
        value_name = "PKTFILE",
        num_args = 1..,
        required_unless_present_any = ["pp", "text"],
        conflicts_with_all = ["pp", "text"]
    )]
    pkt: Vec<PathBuf>,
    /// The privacy policy of a message, which -text gives
    #[arg(
        long,
        value_name = "PPID",
        value_parser = cli::id,
        allow_hyphen_values = true,
        requires = "text"
    )]
    pp: Option<String>,
    /// A message's text, in place of a packet file; - is standard input
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, requires = "pp")]
    text: Option<String>,
    /// The time of each message, in whole seconds, in place of its file's or the proxy's
    #[arg(long, value_name = "TIME", value_parser = cli::whole_seconds)]
    timeout: Option<u64>,
    /// Have no message carried out twice: where a server may have done so, it is not sent again
    #[arg(long)]
    once: bool,
    /// The message's number, by which a server can recognise a repeat
    #[arg(long, value_name = "ID", value_parser = cli::id, allow_hyphen_values = true)]
    msgid: Option<String>,
    /// Write the results to standard output, and nothing else there
    #[arg(long)]
    result: bool,
    /// Leave out the lines about single messages
    #[arg(long)]
    quiet: bool,
    /// Put the time in front of each line, in UTC
    #[arg(long)]
    timestamps: bool,
    /// For how long to send each message again after what may pass: no proxy, no server, no answer
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = cli::duration)]
    wait: Duration,
    /// The longest answer to take, and the longest text from standard input
    #[arg(long, value_name = "SIZE", default_value = "4M", value_parser = cli::size)]
    max_packet: usize,
}

impl Options {
    fn terminal(&self) -> Terminal {
        let terminal = Terminal::direct("client", self.quiet).with_timestamps(self.timestamps);
        if self.result { terminal.lines_on_standard_error() } else { terminal }
    }

    fn messages(&self) -> Result<Vec<Outgoing>, Problem> {
        let srcid = Id::from_text(&self.id);
        if let (Some(policy), Some(text)) = (&self.pp, &self.text) {
            let payload = match text.as_str() {
                "-" => cli::read_text(self.max_packet).map_err(Problem::usage)?,
                text => text.to_owned(),
            };
            return Ok(vec![Outgoing::new(&Data {
                timeout: self.timeout,
                once: self.once,
                msgid: self.msgid.as_deref().map(Into::into),
                ..Data::new(srcid, Id::from_text(policy), payload)
            })]);
        }
        let fields = ClientFields {
            srcid,
            timeout: self.timeout,
            once: self.once,
            msgid: self.msgid.as_deref().map(Into::into),
        };
        let mut messages = Vec::new();
        for file in &self.pkt {
            let (name, content) = cli::read_packets(file).map_err(Problem::usage)?;
            let read = packet_file::read(&content, &fields);
            messages.append(&mut read.map_err(|error| Problem::usage(format!("{name}: {error}")))?);
        }
        if self.msgid.is_some() && messages.len() > 1 {
            // To servers, all but the first would look like repeats.
            return Err(Problem::usage(format!(
                "-msgid is one message's number, but there are {}; give each packet a \"msgid\" of its own",
                messages.len()
            )));
        }
        Ok(messages)
    }
}

fn main() -> ExitCode {
    cli::main(Options::terminal, run)
}

fn run(options: &Options, terminal: &Terminal) -> Result<ExitCode, Problem> {
    let messages = options.messages()?;
    let client = Client::new(Settings {
        max_packet: options.max_packet,
        // What every proxy can, the homework's too.
        keep_connection: false,
        ..Settings::new(Id::from_text(&options.id).into_owned(), options.revproc.clone())
    });
    let mut client = CommandLine::new(client, terminal.clone(), options.wait);
    // Each message is sent, whatever became of the one before.
    let mut code = ExitCode::SUCCESS;
    for message in &messages {
        match client.deliver(message) {
            Ok(_) if !options.result => {}
            Ok(Reply { result: Some(result), .. }) => terminal.bytes(&result),
            Ok(Reply { server, .. }) => {
                terminal.warn(format_args!("server {server} sent no result"));
                code = ExitCode::from(cli::FAILED);
            }
            Err(_) => code = ExitCode::from(cli::FAILED),
        }
    }
    Ok(code)
}
