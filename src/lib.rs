//! An application-level reverse proxy for JSON messages over TCP.
//!
//! Servers register with the proxy for a *privacy policy*; a client hands the proxy a message that
//! names a policy, not a server; the proxy picks a server of that policy by strict round robin,
//! forwards the message, and brings back an acknowledgment whose payload is the SHA-1 of the
//! message's text; the client checks it. The three programs `revproc`, `server` and `client` are
//! thin: each role lives here, and can be run inside another program, as `examples/demo.rs` does.
//!
//! The *homework* is the specification of the protocol that this extends; the *tutorial* describes sample
//! programs that speak it.
//!
//! # The map
//!
//! From the bytes upwards. What is further down uses only what is above it, and no role uses
//! another.
//!
//! - [`protocol`]: what goes over the wire, and no I/O: the packets, where one ends in a stream, and
//!   the files that a client sends.
//! - [`net`]: sockets, threads and memory: a connection with its limits and deadlines, a listener
//!   with a thread per connection, and where a proxy is.
//! - [`cli`]: what the three programs share: options, exit codes, the lines they print.
//! - [`proxy`]: the reverse proxy; its page follows a message from the client's bytes to the ack's.
//! - [`server`], which answers messages, with a hash and with what a handler or a command makes of
//!   them, and keeps itself registered with its proxies.
//! - [`client`], which sends messages, checks their acks and brings back their results; its page has
//!   an example of all three roles in one program.

#[doc = include_str!("performance.md")]
pub mod performance {}

pub mod cli;
pub mod client;
pub mod net;
pub mod protocol;
pub mod proxy;
pub mod server;
