//! A minimal HTTP client for the status page and for WebDriver.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{BOUND, Program, proxy};

/// A proxy with a status page.
pub struct Watched {
    /// The proxy and its port.
    pub proxy: (Program, u16),
    /// The status page's port.
    pub status: u16,
}

/// Starts our proxy on a free port, with its status page on another.
pub fn watched(arguments: &[&str]) -> Watched {
    let proxy = proxy(&[&["-status", "0"], arguments].concat());
    let line = proxy.0.line("Serving the status page on http://127.0.0.1:");
    let status = line.trim_end_matches('/').rsplit(':').next().and_then(|port| port.parse().ok());
    Watched { proxy, status: status.unwrap_or_else(|| panic!("no port: {line}")) }
}

impl Watched {
    /// Returns a document, which must exist.
    pub fn get(&self, path: &str) -> String {
        let answer = Http::connect(self.status).get(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.body
    }

    /// Returns the current `/table.json`.
    pub fn table(&self) -> Value {
        let text = self.get("/table.json");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Waits until the table meets the condition, and returns it.
    pub fn table_when(&self, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + BOUND;
        loop {
            let table = self.table();
            if condition(&table) {
                return table;
            }
            assert!(Instant::now() < end, "waited in vain for {what}: {table:#}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns the series of a metric: labels and value of each.
    pub fn metric(&self, name: &str) -> Vec<(String, f64)> {
        let text = self.get("/metrics");
        let lines = text.lines().filter_map(|line| {
            let (series, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
            let is_whole_name = series.is_empty() || series.starts_with('{');
            is_whole_name.then(|| (series.to_owned(), value.parse().expect("a number")))
        });
        lines.collect()
    }
}

/// An HTTP connection.
pub struct Http {
    stream: BufReader<TcpStream>,
    port: u16,
}

/// A response.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers, with names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
}

impl Answer {
    /// Returns a header's value; empty if it is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }
}

impl Http {
    /// Connects to a local port.
    pub fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("somebody listens there");
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(3 * BOUND)).unwrap();
        stream.set_write_timeout(Some(BOUND)).unwrap();
        Http { stream: BufReader::new(stream), port }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(bytes.as_ref()).expect("the peer reads");
    }

    /// Ends the sending side.
    pub fn half_close(&self) {
        self.stream.get_ref().shutdown(Shutdown::Write).unwrap();
    }

    /// Requests a document.
    pub fn get(&mut self, path: &str) -> Answer {
        self.request("GET", path, "", "")
    }

    /// Sends a request, with further header lines and a body unless empty, and reads the response.
    pub fn request(&mut self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let mut request = format!("{method} {path} HTTP/1.1\r\n{headers}");
        if !headers.contains("Host:") {
            let _ = write!(request, "Host: 127.0.0.1:{}\r\n", self.port);
        }
        if !body.is_empty() {
            let _ = write!(request, "Content-Length: {}\r\n", body.len());
        }
        self.send(request + "\r\n" + body);
        self.answer(method != "HEAD")
    }

    /// Reads a response; its head must state the body's length.
    pub fn answer(&mut self, has_body: bool) -> Answer {
        let first = self.line();
        let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no answer: {first:?}"));
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut answer = Answer { status, headers, body: String::new() };
        if has_body {
            let length = answer.header("content-length").parse().expect("a length");
            let mut body = vec![0; length];
            self.stream.read_exact(&mut body).expect("the whole body");
            answer.body = String::from_utf8(body).expect("text");
        }
        answer
    }

    /// Returns all that comes until the peer closes; a reset is an error.
    pub fn rest(&mut self) -> String {
        let mut rest = String::new();
        self.stream.read_to_string(&mut rest).expect("an orderly end of the connection");
        rest
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap_or_else(|error| panic!("no answer: {error}"));
        line
    }
}
