//! A worker of one's own behind the proxy, in Rust: it answers each message with its text in upper case.
//!
//!     cargo run --release --example worker -- 2100
//!
//! There 2100 is the proxy's port. The server's role does all but the work: it registers with a lease,
//! renews it, comes back when the proxy does, and ends in order at Ctrl-C.

use std::env;
use std::error::Error;
use std::process;

use revproc::cli;
use revproc::cli::terminal::Terminal;
use revproc::net::endpoint::{Endpoint, LOOPBACK};
use revproc::net::listener;
use revproc::protocol::Id;
use revproc::server::{Failure, Message, Server, Settings, Stop};

const POLICY: &str = "upper";

/// The work: what it returns is the ack's `result`, an error is what the client is told instead.
fn work(message: &Message<'_>) -> Result<Option<Vec<u8>>, Failure> {
    if message.payload.is_empty() {
        return Err("there is nothing to write in upper case".into());
    }
    Ok(Some(message.payload.to_uppercase().into_bytes()))
}

fn main() -> Result<(), Box<dyn Error>> {
    let proxy: Endpoint = env::args().nth(1).ok_or("usage: worker PORT")?.parse()?;
    let id = Id::from_text(&format!("worker-{}", process::id())).into_owned();
    let settings = Settings {
        at_once: Some(4), // The proxy sends no more at once.
        ..Settings::new(id, Id::from_text(POLICY), vec![proxy])
    };
    let terminal = Terminal::new("worker", false);
    let socket = listener::bind(LOOPBACK, 0)?;
    let server = Server::start_with(work, socket, settings, terminal.clone())?;
    let stop = server.stopper();
    cli::on_signal(move || drop(stop.send(Stop::Told))).map_err(|problem| problem.message)?;
    server.run()?;
    terminal.flush();
    Ok(())
}
