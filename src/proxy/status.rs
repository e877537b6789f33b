//! The status page, its data, and the metrics: read-only, over plain HTTP.
//!
//! | path | what it answers |
//! |---|---|
//! | `/` | the page, which reads `/table.json` each second |
//! | `/table.json` | the switching table, the counts, and the latest messages |
//! | `/metrics` | the counts for Prometheus |
//! | `/healthz` | 200 while the proxy serves, 503 while it stops |
//! | `/healthz?policy=PP` | 503 also where no server of the policy is up: none is registered, or all are set aside |
//!
//! The policy is percent-encoded; where several are named (`&policy=`), each must have a server. One
//! whose time aside is over counts as up: only a message can tell, and a balancer that asks sends none
//! before the answer is 200.
//!
//! A listener of its own serves it, a thread per connection like everything here, so that looking
//! never takes a place from a client. Requests have no body and are few, so this speaks as little
//! HTTP as browsers, Prometheus and health checks need.

mod json;
mod metrics;

use std::io::Read;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Proxy;
use crate::cli::escape::Escaped;
use crate::net::connection::Connection;
use crate::net::listener::{Limits, Listener, Peer, Place, Serve};

const PAGE: &str = include_str!("status/page.html");

/// The page needs nothing from anywhere else, and nothing else may be put into it.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                           connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'";

/// The longest request head, in bytes.
const MAX_HEAD: usize = 8 << 10;

/// A request must come whole, and the next one begin, within this time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The most connections at once. A further one ends the oldest: slow ones must not keep a health check
/// waiting.
const CONNECTIONS: Limits = Limits { per_address: 16, lobby: 8, ..Limits::of_connections(64) };

/// Serves the status of `proxy` to the connections that `socket` accepts. `host` is the name under
/// which it was asked to listen.
///
/// # Errors
///
/// If the system gives no thread, or does not say where the socket listens.
pub fn start(socket: TcpListener, host: &str, proxy: Arc<Proxy>) -> std::io::Result<()> {
    // There is one page; of a second one nobody is told.
    let _ = proxy.page.set(socket.local_addr()?);
    let listener = Listener::new(socket, CONNECTIONS);
    let status = Status { proxy, host: host.to_owned(), listener: Arc::clone(&listener) };
    listener.start(&Arc::new(status))
}

#[derive(Debug)]
struct Status {
    proxy: Arc<Proxy>,
    host: String,
    listener: Arc<Listener>,
}

/// What is answered to a request.
struct Response {
    status: &'static str,
    media_type: &'static str,
    body: Vec<u8>,
    /// The body is left out.
    is_head: bool,
    keeps_alive: bool,
}

impl Response {
    fn new(status: &'static str, media_type: &'static str, body: Vec<u8>) -> Self {
        Response { status, media_type, body, is_head: false, keeps_alive: false }
    }

    fn text(status: &'static str, text: &str) -> Self {
        Self::new(status, "text/plain; charset=utf-8", format!("{text}\n").into_bytes())
    }
}

impl Serve for Status {
    fn serve(self: &Arc<Self>, connection: Connection, peer: Peer) {
        if peer.over_limit {
            return;
        }
        if peer.place == Place::Lobby {
            let deadline = Instant::now() + REQUEST_TIMEOUT;
            if !self.listener.take_oldest_place(peer.number, deadline) {
                return;
            }
        }
        let mut unread = Vec::new();
        // A browser that breaks off is no event.
        while let Some(response) = self.next_response(&connection, &mut unread) {
            let Response { status, media_type, body, is_head, keeps_alive } = response;
            let mut bytes = format!(
                "HTTP/1.1 {status}\r\nAllow: GET, HEAD\r\nContent-Type: {media_type}\r\n\
                 Content-Length: {}\r\nConnection: {}\r\n\
                 Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n\
                 Content-Security-Policy: {PAGE_POLICY}\r\n\r\n",
                body.len(),
                if keeps_alive { "keep-alive" } else { "close" },
            )
            .into_bytes();
            if !is_head {
                bytes.extend(body);
            }
            if connection.send(&bytes).is_err() {
                return;
            }
            if !keeps_alive {
                return connection.lingering_close();
            }
        }
    }

    fn warn(&self, message: &str) {
        self.proxy.dispatcher.events.terminal.warn(format_args!("status page: {message}"));
    }

    fn max_packet(&self) -> usize {
        MAX_HEAD
    }
}

impl Status {
    /// Reads a request's head, and answers it; `None` if none comes whole in time.
    fn next_response(&self, connection: &Connection, unread: &mut Vec<u8>) -> Option<Response> {
        let mut stream = &**connection.stream();
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 64];
            let mut request = httparse::Request::new(&mut headers);
            match request.parse(unread) {
                Ok(httparse::Status::Complete(length)) => {
                    let response = self.answer(&request);
                    unread.drain(..length);
                    return Some(response);
                }
                Ok(httparse::Status::Partial) if unread.len() < MAX_HEAD => {}
                _ => {
                    let reason = "this is no HTTP request that is served here";
                    return Some(Response::text("400 Bad Request", reason));
                }
            }
            let left =
                deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            stream.set_read_timeout(Some(left)).ok()?;
            let mut bytes = [0; 1 << 10];
            match stream.read(&mut bytes) {
                Ok(0) | Err(_) => return None,
                Ok(read) => unread.extend_from_slice(&bytes[..read]),
            }
        }
    }

    fn answer(&self, request: &httparse::Request<'_, '_>) -> Response {
        let header = |name: &str| {
            let header =
                request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
            Some(String::from_utf8_lossy(header.value))
        };
        let is_head = request.method == Some("HEAD");
        let has_body = header("content-length").is_some_and(|length| length.trim() != "0")
            || header("transfer-encoding").is_some();
        let keeps_alive = request.version == Some(1)
            && !has_body
            && !header("connection")
                .is_some_and(|value| value.to_ascii_lowercase().contains("close"));
        let named = header("host");
        let (host, target) = origin(request.path.unwrap_or("/"), named.as_deref());
        let response = if !is_head && request.method != Some("GET") {
            Response::text("405 Method Not Allowed", "this can only be looked at: GET or HEAD")
        } else if !self.is_for_us(host) {
            Response::text("421 Misdirected Request", "ask for this by its address")
        } else {
            self.document(target)
        };
        Response { is_head, keeps_alive, ..response }
    }

    /// A web page elsewhere can have a name of its own resolve to this machine and then read what
    /// is served here. A browser says which name it asked for; an address cannot be made up so.
    fn is_for_us(&self, host: Option<&str>) -> bool {
        let Some(host) = host else { return true };
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            _ => host,
        };
        let name = name.trim_start_matches('[').trim_end_matches(']');
        name.parse::<IpAddr>().is_ok()
            || ["localhost", &self.host].iter().any(|own| name.eq_ignore_ascii_case(own))
    }

    fn document(&self, target: &str) -> Response {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let ok = |media_type, body| Response::new("200 OK", media_type, body);
        match path {
            "/" => ok("text/html; charset=utf-8", PAGE.as_bytes().to_vec()),
            "/table.json" => ok("application/json", json::json(&self.proxy)),
            "/metrics" => ok(metrics::MEDIA_TYPE, metrics::text(&self.proxy)),
            "/healthz" => self.health(query),
            _ => Response::text("404 Not Found", "there are /, /table.json, /metrics and /healthz"),
        }
    }

    fn health(&self, query: &str) -> Response {
        let unavailable = |reason: &str| Response::text("503 Service Unavailable", reason);
        if self.proxy.stop.has_begun() {
            return unavailable("stopping");
        }
        let (table, now) = (self.proxy.dispatcher.table.snapshot(), Instant::now());
        for value in query.split('&').filter_map(|pair| pair.strip_prefix("policy=")) {
            let Some(policy) = percent_decoded(value) else {
                return Response::text("400 Bad Request", "the policy is no percent-encoded UTF-8");
            };
            let mut servers = table.get(&policy).into_iter().flatten();
            if !servers.any(|server| server.is_eligible(now)) {
                let policy = Escaped(&policy);
                return unavailable(&format!("no server of privacy policy \"{policy}\" is up"));
            }
        }
        Response::text("200 OK", "serving")
    }
}

/// Returns the host that is asked, and for which path: those of the target where it is a whole URL,
/// whatever the header says (RFC 9112, 3.2.2).
fn origin<'a>(target: &'a str, host: Option<&'a str>) -> (Option<&'a str>, &'a str) {
    const SCHEME: &str = "http://";
    let scheme = target.get(..SCHEME.len());
    if !scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME)) {
        return (host, target);
    }
    let url = &target[SCHEME.len()..];
    let (host, path) = url.split_at(url.find(['/', '?']).unwrap_or(url.len()));
    (Some(host), if path.is_empty() { "/" } else { path })
}

/// Returns what a part of a URL stands for; `None` if it is not percent-encoded UTF-8.
fn percent_decoded(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        bytes.extend(hex::decode(part.get(..2)?).ok()?);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}
