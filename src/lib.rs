//! An application-level reverse proxy for JSON messages over TCP.
//!
//! Servers register with the proxy for a *privacy policy*; a client hands the proxy a message that
//! names a policy, not a server; the proxy picks a server of that policy by strict round robin,
//! forwards the message, and brings back an acknowledgment whose payload is the SHA-1 of the
//! message's text; the client checks it. The three programs `revproc`, `server` and `client` are
//! thin: each role lives here, and can be run inside another program, as `examples/demo.rs` does.
//!
//! # The map
//!
//! From the bytes upwards:
//!
//! - [`packet`]: what the packets hold; reading and writing them.
//! - [`framer`]: where a packet ends in a stream of bytes.
//! - [`budget`]: memory that the connections share.
//! - [`wire`]: a connection that receives and sends packets, with limits and deadlines.
//! - [`listener`]: accepting connections, a thread each; [`affinity`], where these threads run.
//!
//! The proxy:
//!
//! - [`table`]: the switching table, which says whose turn it is.
//! - [`upstream`]: the connections to one server, and [`lane`], those that messages share.
//! - [`forward`]: a message's way to a server and the ack's way back, with its retries.
//! - [`replies`]: the replies to one client, in the order of its packets.
//! - [`trouble`]: what can go wrong on that way; [`mod@line`], where messages wait that a server cannot
//!   take yet.
//! - [`proxy`]: the role itself: who sent what, and what to do with it; [`admission`]: who may
//!   register.
//! - [`journal`]: what the proxy says and counts, and [`stats`], the counts themselves.
//! - [`status`]: the page, the data and the metrics for those who look.
//!
//! The other roles:
//!
//! - [`server`], which answers messages, and [`registration`], which keeps it known to its proxies.
//! - [`client`], which sends messages, and [`packet_file`], which reads them.
//!
//! And for all of them: [`terminal`], the lines they print; [`endpoint`], where a proxy is;
//! [`cli`], the command lines.

pub mod admission;
pub mod cli;
pub mod client;
pub mod forward;
pub mod journal;
pub mod lane;
pub mod line;
pub mod net;
pub mod protocol;
pub mod proxy;
pub mod registration;
pub mod replies;
pub mod server;
pub mod stats;
pub mod status;
pub mod table;
pub mod trouble;
pub mod upstream;
