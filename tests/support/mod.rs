//! Starts and stops the real programs, and talks to them as any peer would.
//!
//! Everything waits for a condition with a bound, and says everything it knows when the bound is
//! passed. A program ends with the value that stands for it.

pub mod browser;
pub mod dialect;
pub mod fake;
pub mod http;
pub mod leased;
pub mod load;
pub mod mutation;
pub mod stopwatch;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub mod peers;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

pub use rustix::process::Signal;

/// The bound on every wait: far more than anything here takes, even on a busy machine.
pub const BOUND: Duration = Duration::from_secs(20);

/// Where one of the three binaries is.
pub fn binary(name: &str) -> PathBuf {
    // This program is in target/PROFILE/deps or target/PROFILE/examples; they are beside that.
    let own = std::env::current_exe().expect("a running program has a path");
    let profile = own.parent().and_then(|folder| folder.parent()).expect("target/PROFILE/deps");
    profile.join(name)
}

/// Where a program of the system is, if it is installed.
pub fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let files = std::env::split_paths(&path).map(|folder| folder.join(name));
    files.chain([Path::new("/usr/sbin").join(name)]).find(|file| file.is_file())
}

/// A TCP socket, not yet bound. The programs that tests start do not inherit it.
pub fn tcp_socket() -> OwnedFd {
    socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
}

/// Says why a test does nothing on this machine.
pub fn skipped(why: &str) {
    // Not by eprintln, which a test that passes is not heard by.
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}

#[derive(Default)]
struct Output {
    out: Vec<String>,
    err: Vec<String>,
    /// Both streams' bytes as they came.
    raw: Vec<u8>,
    /// How many of the two streams have ended.
    ended: usize,
}

/// A running program, killed when dropped.
pub struct Program {
    name: String,
    child: Child,
    output: Arc<(Mutex<Output>, Condvar)>,
    readers: Vec<JoinHandle<()>>,
}

impl Program {
    /// Starts one of the three programs with these arguments.
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(binary(name));
        command.args(arguments);
        Self::run(command)
    }

    /// Starts a command, whose output is read as it comes.
    pub fn run(command: Command) -> Self {
        Self::run_with_input(command, "")
    }

    /// As [`run`](Self::run), with this on its standard input.
    pub fn run_with_input(mut command: Command, input: &str) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let name = format!("{command:?}");
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        let output = Arc::<(Mutex<Output>, Condvar)>::default();
        let out = child.stdout.take().expect("piped");
        let err = child.stderr.take().expect("piped");
        let mut stdin = child.stdin.take().expect("piped");
        match stdin.write_all(input.as_bytes()) {
            // A program that has ended by now had no use for it.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            result => result.unwrap_or_else(|error| panic!("{name}: {error}")),
        }
        drop(stdin);
        let readers = vec![
            read_lines(out, &output, |output| &mut output.out),
            read_lines(err, &output, |output| &mut output.err),
        ];
        Program { name, child, output, readers }
    }

    /// Waits until `look` finds what it looks for in the lines of standard output and error.
    pub fn wait<T>(
        &self,
        what: &str,
        mut look: impl FnMut(&[String], &[String]) -> Option<T>,
    ) -> T {
        let (output, changed) = &*self.output;
        let end = Instant::now() + BOUND;
        let mut output = output.lock().unwrap();
        loop {
            if let Some(found) = look(&output.out, &output.err) {
                return found;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || output.ended == 2 {
                drop(output);
                panic!("waited in vain for {what}\n{}", self.report());
            }
            output = changed.wait_timeout(output, left).unwrap().0;
        }
    }

    /// Waits for a line of standard output that contains `part`, and returns it.
    pub fn line(&self, part: &str) -> String {
        self.wait(part, |out, _| out.iter().find(|line| line.contains(part)).cloned())
    }

    /// Waits for a line of standard error that contains `part`, and returns it.
    pub fn warning(&self, part: &str) -> String {
        self.wait(part, |_, err| err.iter().find(|line| line.contains(part)).cloned())
    }

    /// The lines of standard output so far.
    pub fn out(&self) -> Vec<String> {
        self.output.0.lock().unwrap().out.clone()
    }

    /// The lines of standard error so far.
    pub fn err(&self) -> Vec<String> {
        self.output.0.lock().unwrap().err.clone()
    }

    /// Returns the warnings: the lines of standard error so far, without a server's status lines.
    pub fn complaints(&self) -> Vec<String> {
        let mut lines = self.err();
        lines.retain(|line| !line.starts_with("server: registered ") && line != "server: stopped");
        lines
    }

    /// Every byte that it wrote on standard output and error so far.
    pub fn raw(&self) -> Vec<u8> {
        self.output.0.lock().unwrap().raw.clone()
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many descriptors it has open, as the system counts them.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("a running program").count()
    }

    /// Whether it has a handler for this signal.
    pub fn catches(&self, signal: Signal) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("a running program");
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("a mask");
        let mask = u64::from_str_radix(mask.trim(), 16).expect("hexadecimal");
        mask & (1 << (signal.as_raw() - 1)) != 0
    }

    /// How many threads it has, as the system counts them.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("a running program").count()
    }

    /// Stops all of its threads, until a [`CONT`](Signal::CONT).
    pub fn stand_still(&self) {
        self.signal(Signal::STOP);
        let end = Instant::now() + BOUND;
        // A thread that has not stopped yet would still see what comes.
        while !self.is_stopped() {
            assert!(Instant::now() < end, "it goes on\n{}", self.report());
            thread::yield_now();
        }
    }

    /// Whether all of its threads are stopped.
    fn is_stopped(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid()));
        tasks.expect("a running program").all(|task| {
            let path = task.expect("a thread").path().join("status");
            // A thread may just have ended.
            std::fs::read_to_string(path).map_or(true, |status| status.contains("State:\tT"))
        })
    }

    /// Its memory in bytes, by the name that it has in `/proc/PID/status`.
    pub fn memory(&self, name: &str) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("a running program");
        let line = status.lines().find(|line| line.starts_with(name)).expect("a name");
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    }

    /// Sends a signal. Our programs handle those that end them, but not at once after their start.
    pub fn signal(&self, signal: Signal) {
        let end = Instant::now() + BOUND;
        while [Signal::TERM, Signal::INT].contains(&signal) && !self.catches(signal) {
            assert!(Instant::now() < end, "it does not handle the signal\n{}", self.report());
            thread::sleep(Duration::from_millis(1));
        }
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal)
            .expect("the program is ours and was not waited for");
    }

    /// Waits for the program to end by itself, and for the rest of its output.
    pub fn end(&mut self) -> ExitStatus {
        self.end_within(BOUND)
    }

    /// As [`end`](Self::end), for a program whose work takes a while.
    pub fn end_within(&mut self, bound: Duration) -> ExitStatus {
        let end = Instant::now() + bound;
        let status = loop {
            match self.child.try_wait().expect("our child") {
                Some(status) => break status,
                None if Instant::now() > end => panic!("it does not end\n{}", self.report()),
                None => thread::sleep(Duration::from_millis(2)),
            }
        };
        self.readers.drain(..).for_each(|reader| reader.join().unwrap());
        status
    }

    /// Kills the program at once.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Command, status, standard output and error.
    pub fn report(&self) -> String {
        let output = self.output.0.lock().unwrap();
        let mut report = format!("command: {}\n", self.name);
        for (name, lines) in [("out", &output.out), ("err", &output.err)] {
            for line in lines.iter().rev().take(40).rev() {
                let _ = writeln!(report, "  {name}| {line}");
            }
        }
        report
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("{}", self.report());
        }
    }
}

fn read_lines(
    stream: impl Read + Send + 'static,
    output: &Arc<(Mutex<Output>, Condvar)>,
    lines: impl Fn(&mut Output) -> &mut Vec<String> + Send + 'static,
) -> JoinHandle<()> {
    let output = Arc::clone(output);
    thread::spawn(move || {
        let (output, changed) = &*output;
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let mut output = output.lock().unwrap();
            output.raw.extend_from_slice(&line);
            let text = line.strip_suffix(b"\n").unwrap_or(&line);
            lines(&mut output).push(String::from_utf8_lossy(text).into_owned());
            changed.notify_all();
            line.clear();
        }
        output.lock().unwrap().ended += 1;
        changed.notify_all();
    })
}

/// The port that a line such as `Listening on port 2105` ends with.
pub fn last_port(line: &str) -> u16 {
    line.rsplit(' ')
        .next()
        .and_then(|port| port.parse().ok())
        .expect("a line that ends with a port")
}

/// A free port that the system gives to nobody who does not ask for it, so that a program can end
/// and come back to it.
pub fn fixed_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(97);
    let mut ports = std::iter::repeat_with(|| {
        // Far apart, so that processes with numbers side by side do not come upon the same ports.
        let next = first.wrapping_add(NEXT.fetch_add(7919, Ordering::Relaxed));
        u16::try_from(10_000 + next % 20_000).expect("below 30,000")
    });
    let free = |port| match TcpListener::bind(("127.0.0.1", port)) {
        Ok(_) => Some(port),
        Err(error) if error.kind() == ErrorKind::AddrInUse => None,
        Err(error) => panic!("port {port}: {error}"),
    };
    ports.find_map(free).expect("there are many")
}

/// Waits until a program that was told to stop takes no more connections.
pub fn wait_until_nobody_listens(port: u16) {
    let end = Instant::now() + BOUND;
    while TcpStream::connect(("127.0.0.1", port)).is_ok() {
        assert!(Instant::now() < end, "it still accepts");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Our proxy on a free port.
pub fn proxy(arguments: &[&str]) -> (Program, u16) {
    proxy_on(0, arguments)
}

/// Our proxy on a certain port.
pub fn proxy_on(port: u16, arguments: &[&str]) -> (Program, u16) {
    let program = Program::start("revproc", &[&["-port", &port.to_string()], arguments].concat());
    let port = last_port(&program.line("Running the reverse proxy on port "));
    (program, port)
}

/// One of our servers on a free port; it may not be registered yet.
pub fn server(id: &str, policy: &str, proxy: u16, arguments: &[&str]) -> (Program, u16) {
    let proxy = proxy.to_string();
    let common = ["-id", id, "-pp", policy, "-listen", "0", "-revproc", &proxy];
    let program = Program::start("server", &[&common, arguments].concat());
    let port = last_port(&program.line("Listening on port "));
    (program, port)
}

/// One of our servers, registered with a proxy of ours.
pub fn registered(id: &str, policy: &str, proxy: &(Program, u16), arguments: &[&str]) -> Program {
    let (program, port) = server(id, policy, proxy.1, arguments);
    let line =
        format!("Receiving setup message from server id {id} privacy policy {policy} port {port}");
    proxy.0.line(&line);
    program
}

/// Runs a client of ours to its end.
pub fn client(
    proxy: u16,
    files: &[&str],
    arguments: &[&str],
) -> (ExitStatus, Vec<String>, Vec<String>) {
    run_client(proxy, &[arguments, &["-pkt"], files].concat(), "")
}

/// Runs a client of ours to its end, which finds its packets on standard input.
pub fn client_with_input(proxy: u16, input: &str) -> (ExitStatus, Vec<String>, Vec<String>) {
    run_client(proxy, &["-pkt", "-"], input)
}

/// Runs a client of ours to its end with these arguments besides its id and the proxy, and this on its
/// standard input.
pub fn run_client(
    proxy: u16,
    arguments: &[&str],
    input: &str,
) -> (ExitStatus, Vec<String>, Vec<String>) {
    let mut command = Command::new(binary("client"));
    command.args(["-id", "50", "-revproc", &proxy.to_string()]).args(arguments);
    let mut program = Program::run_with_input(command, input);
    let status = program.end();
    (status, program.out(), program.err())
}

/// A data packet as the homework's clients write it.
pub fn message(client: &str, policy: &str, payload: &str) -> String {
    (dialect::INTEGERS.message)(client, policy, payload.len(), &format!("\"{payload}\""))
}

/// A data packet as ours, with further fields, which are JSON as they stand.
pub fn message_with(client: &str, policy: &str, payload: &str, more: &str) -> String {
    dialect::with(&message(client, policy, payload), more)
}

/// A peer that speaks the protocol by hand.
pub struct Peer {
    stream: BufReader<TcpStream>,
}

impl Peer {
    /// Connects to a port of this machine.
    pub fn connect(port: u16) -> Self {
        Self::new(TcpStream::connect(("127.0.0.1", port)).expect("somebody listens there"))
    }

    /// Speaks on this connection.
    pub fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        stream.set_write_timeout(Some(BOUND)).unwrap();
        Peer { stream: BufReader::new(stream) }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(bytes.as_ref()).expect("the peer reads");
    }

    /// Says that nothing more will be sent.
    pub fn half_close(&self) {
        self.stream.get_ref().shutdown(Shutdown::Write).unwrap();
    }

    /// The next line, or an empty one at the end of the stream (which a reset is, too).
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => String::new(),
            result => {
                result.unwrap_or_else(|error| panic!("no answer: {error}; so far {line:?}"));
                line
            }
        }
    }

    /// The next packet.
    pub fn packet(&mut self) -> serde_json::Value {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// The socket.
    pub fn stream(&self) -> &TcpStream {
        self.stream.get_ref()
    }
}
