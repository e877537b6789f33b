//! The homework's example in one process: a proxy, two servers of PP_1, and five messages.
//!
//!     cargo run --release --example demo
//!
//! The roles are the ones that the three programs run; each one's lines have its name in front.
//! Ends with 0 if the messages went to servers 1 2 1 2 1 and every hash was right.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use revproc::cli::terminal::Terminal;
use revproc::client::{self, Client, CommandLine};
use revproc::net::endpoint::{Endpoint, LOOPBACK};
use revproc::net::listener;
use revproc::protocol::Id;
use revproc::protocol::packet_file::{self, ClientFields};
use revproc::proxy::{self, Proxy};
use revproc::server::{self, Server, Stop};

const MESSAGES: &str = r#"
    {"type": 0, "srcid": 50, "privPoliId": "PP_1", "payload": "hello"}
    {"type": 0, "srcid": 50, "privPoliId": "PP_1", "payload": "the second message"}
    {"type": 0, "srcid": 50, "privPoliId": "PP_1", "payload": "Grüße, 世界 🌍"}
    {"type": 0, "srcid": 50, "privPoliId": "PP_1", "payload": "the fourth message"}
    {"type": 0, "srcid": 50, "privPoliId": "PP_1", "payload": "good bye"}
"#;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let terminal = Terminal::new("demo", false);
    let proxy = Proxy::start(
        listener::bind(LOOPBACK, 0)?,
        proxy::Settings::default(),
        terminal.beside("revproc", "revproc  | "),
    )?;
    let port = proxy.address().port();
    terminal
        .beside("revproc", "revproc  | ")
        .line(format_args!("Running the reverse proxy on port {port}"));

    let one = start_server("1", "server 1 | ", port, &terminal)?;
    wait_for_servers(&proxy, 1)?;
    let two = start_server("2", "server 2 | ", port, &terminal)?;
    wait_for_servers(&proxy, 2)?;

    let id = Id::from_text("50");
    let client = Client::new(client::Settings::new(id.clone(), vec![endpoint(port)]));
    let terminal_of_client = terminal.beside("client", "client   | ");
    let mut client = CommandLine::new(client, terminal_of_client, Duration::ZERO);
    let outcomes: Vec<_> = packet_file::read(MESSAGES.as_bytes(), &ClientFields::new(id))?
        .iter()
        .map(|message| client.deliver(message).map(|reply| reply.server))
        .collect();
    drop(client);

    for server in [one, two] {
        server.stopper().send(Stop::Told)?;
        server.run()?;
    }
    let (stop, stopped) = channel();
    stop.send(())?;
    let is_whole = proxy.run_until(&stopped);

    let as_it_should_be = ["1", "2", "1", "2", "1"].map(|server| Ok(server.to_owned()));
    let is_right = outcomes == as_it_should_be && is_whole;
    if is_right {
        terminal
            .line(format_args!("The messages went to servers 1 2 1 2 1, and every hash is right."));
    } else {
        terminal.warn(format_args!("that is not 1 2 1 2 1 with every hash right: {outcomes:?}"));
    }
    terminal.flush();
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn endpoint(port: u16) -> Endpoint {
    Endpoint { host: LOOPBACK.to_owned(), port }
}

fn start_server(
    id: &str,
    prefix: &'static str,
    proxy: u16,
    terminal: &Terminal,
) -> Result<Server, Box<dyn Error>> {
    let id = Id::from_text(id).into_owned();
    let settings = server::Settings::new(id, Id::from_text("PP_1"), vec![endpoint(proxy)]);
    Ok(Server::start(listener::bind(LOOPBACK, 0)?, settings, terminal.beside("server", prefix))?)
}

/// A server registers on its own; the order of the messages depends on the order of the servers.
fn wait_for_servers(proxy: &Arc<Proxy>, wanted: usize) -> Result<(), Box<dyn Error>> {
    let end = Instant::now() + Duration::from_secs(10);
    while proxy.servers() < wanted {
        if Instant::now() > end {
            return Err(format!("server {wanted} did not register").into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
