//! As little HTTP as it takes to ask a status page or a WebDriver.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{BOUND, Program, proxy};

/// A proxy whose status is served.
pub struct Watched {
    /// The proxy and its port.
    pub proxy: (Program, u16),
    /// The port of its status page.
    pub status: u16,
}

/// Our proxy on a free port, with its status on another.
pub fn watched(arguments: &[&str]) -> Watched {
    let proxy = proxy(&[&["-status", "0"], arguments].concat());
    let line = proxy.0.line("Serving the status page on http://127.0.0.1:");
    let status = line.trim_end_matches('/').rsplit(':').next().and_then(|port| port.parse().ok());
    Watched { proxy, status: status.unwrap_or_else(|| panic!("no port: {line}")) }
}

impl Watched {
    /// One of the documents, which must be there.
    pub fn get(&self, path: &str) -> String {
        let answer = Http::connect(self.status).get(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.body
    }

    /// The table as it is now.
    pub fn table(&self) -> Value {
        let text = self.get("/table.json");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Waits until `is_so` holds of the table, and returns it.
    pub fn table_when(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + BOUND;
        loop {
            let table = self.table();
            if is_so(&table) {
                return table;
            }
            assert!(Instant::now() < end, "waited in vain for {what}: {table:#}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The values of the metric whose lines begin with `name`, each with its labels.
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

/// A connection on which requests are made.
pub struct Http {
    stream: BufReader<TcpStream>,
    port: u16,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The names, in lower case, and values of the head.
    pub headers: Vec<(String, String)>,
    /// What came after the head.
    pub body: String,
}

impl Answer {
    /// The header's value, or an empty one.
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }
}

impl Http {
    /// Connects to a port of this machine.
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

    /// Says that nothing more will be asked.
    pub fn half_close(&self) {
        self.stream.get_ref().shutdown(Shutdown::Write).unwrap();
    }

    /// Asks for a document.
    pub fn get(&mut self, path: &str) -> Answer {
        self.request("GET", path, "", "")
    }

    /// Makes a request, with further header lines and a body where they are not empty.
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

    /// Reads an answer, whose head says how long its body is.
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

    /// Whatever else comes before the other side closes, which a reset is not.
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
