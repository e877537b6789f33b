//! The checked programs: a command with places for its ports, run in a process group of its own.
//!
//! Whatever a program does, it is gone when its value is dropped: its group is killed, and so is
//! every process elsewhere that carries its mark in its environment, as a daemon does.

use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid,
};

use crate::fair;
use crate::hindrance;

/// The name of the mark in a program's environment.
const MARK: &str = "REVPROC_CHECK";

/// How much of each stream is kept: the beginning and the end.
const KEPT: usize = 32 << 10;

/// What a program may write before it is read more slowly, and how much slower: a flood must not
/// take the time of the others.
const FLOOD: u64 = 1 << 20;
const PAUSE: Duration = Duration::from_millis(10);

/// For how long processes that come anew are hunted, where a program keeps forking.
const HUNT: Duration = Duration::from_secs(2);

/// The programs that run. Programs start under its lock, so that none starts once it is closed.
static RUNNING: Mutex<Running> = Mutex::new(Running { is_closed: false, groups: Vec::new() });

struct Running {
    is_closed: bool,
    groups: Vec<(Pid, String)>,
}

/// One of the three roles' programs, as the command line gives it.
#[derive(Debug, Clone)]
pub struct Template(pub String);

impl Template {
    /// Returns the command line, with its places filled in.
    pub fn fill(&self, values: &[(&str, &str)]) -> String {
        values
            .iter()
            .fold(self.0.clone(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
    }
}

/// What came on one of its streams.
#[derive(Default)]
struct Text {
    head: Vec<u8>,
    tail: Vec<u8>,
    total: u64,
}

impl Text {
    fn add(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let room = KEPT.saturating_sub(self.head.len()).min(bytes.len());
        self.head.extend_from_slice(&bytes[..room]);
        self.tail.extend_from_slice(&bytes[room..]);
        if self.tail.len() > 2 * KEPT {
            self.tail.drain(..self.tail.len() - KEPT);
        }
    }

    fn shown(&self) -> String {
        let skipped = self.total - (self.head.len() + self.tail.len()) as u64;
        let mut text = String::from_utf8_lossy(&self.head).into_owned();
        if skipped > 0 {
            text.push_str(&format!("\n[... {skipped} bytes ...]\n"));
        }
        text + &String::from_utf8_lossy(&self.tail)
    }
}

/// A running program.
pub struct Program {
    /// Its command line.
    pub command: String,
    child: Child,
    group: Pid,
    mark: String,
    out: Arc<Mutex<Text>>,
    err: Arc<Mutex<Text>>,
}

impl Program {
    /// Starts a command line in the shell. Returns why it cannot be started.
    pub fn start(command: String) -> Result<Self, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{}-{number}", std::process::id());
        let mut shell = Command::new("sh");
        shell
            .arg("-c")
            .arg(&command)
            // What Python prints would wait in a buffer, and be lost when it is killed.
            .env("PYTHONUNBUFFERED", "1")
            .env(MARK, &mark)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut running = lock(&RUNNING);
        if running.is_closed {
            return Err("the checker ends".to_owned());
        }
        let mut child = shell.spawn().map_err(|error| format!("sh: {error}"))?;
        let group = Pid::from_child(&child);
        running.groups.push((group, mark.clone()));
        drop(running);
        let [out, err] = [Arc::<Mutex<Text>>::default(), Arc::default()];
        read(child.stdout.take(), &out);
        read(child.stderr.take(), &err);
        Ok(Program { command, child, group, mark, out, err })
    }

    /// Returns its exit status, if it has ended by itself. It is not reaped before it is dropped, so
    /// that its group's number is nobody else's.
    pub fn ended(&self) -> Option<ExitStatus> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(self.group), options).ok()??;
        let signal = status.terminating_signal().unwrap_or(0);
        Some(ExitStatus::from_raw(status.exit_status().map_or(signal, |code| code << 8)))
    }

    /// Waits until `end`, by [`fair`] time, for it to end by itself.
    pub fn wait(&self, end: Instant) -> Option<ExitStatus> {
        loop {
            match self.ended() {
                None if fair::now() < end => thread::sleep(Duration::from_millis(2)),
                status => {
                    // What it wrote last is read by other threads.
                    let quiet = fair::now() + Duration::from_millis(200);
                    while status.is_some() && fair::now() < quiet && self.is_read() {
                        thread::sleep(Duration::from_millis(1));
                    }
                    return status;
                }
            }
        }
    }

    /// Returns whether its streams are still being read.
    fn is_read(&self) -> bool {
        [&self.out, &self.err].iter().any(|text| Arc::strong_count(text) > 1)
    }

    /// Returns what it wrote on standard output.
    pub fn out(&self) -> String {
        lock(&self.out).shown()
    }

    /// Returns what it wrote on standard output and standard error.
    pub fn output(&self) -> String {
        [&self.out, &self.err].map(|text| lock(text).shown()).concat()
    }

    /// Returns what explains a failure: how it ended, and the last line of its standard error.
    /// `may_end` is whether its end with 0 is nothing to speak of.
    pub fn last_words(&self, may_end: bool) -> Option<String> {
        let err = lock(&self.err).shown();
        let last = err.lines().rev().find(|line| !line.trim().is_empty());
        let status = self.ended().filter(|status| !(may_end && status.success()));
        let ended = status.map(|status| format!("has ended ({status})"));
        match (ended, last) {
            (None, None) => None,
            (Some(ended), None) => Some(ended),
            (ended, Some(line)) => {
                let ended = ended.map(|ended| ended + " and ").unwrap_or_default();
                Some(format!("{ended}wrote on standard error: {}", shorten(line.trim())))
            }
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let mut running = lock(&RUNNING);
        running.groups.retain(|(group, _)| *group != self.group);
        let _ = kill_process_group(self.group, Signal::KILL);
        drop(running);
        let _ = self.child.wait();
        hunt(&[&self.mark]);
    }
}

/// Ends all programs, and lets none start any more. They stay locked, so that the process should end.
pub fn end_all() {
    let mut running = lock(&RUNNING);
    running.is_closed = true;
    for (group, _) in &running.groups {
        let _ = kill_process_group(*group, Signal::KILL);
    }
    // Those, too, that left the group of a program which has ended.
    hunt(&[&format!("{}-", std::process::id())]);
    std::mem::forget(running);
}

/// The same program with this in its environment is a guard; the value is the checker's process id.
const GUARD: &str = "REVPROC_CHECK_GUARD";

/// A process that ends what the checker started, should the checker itself be killed.
pub struct Guard(Option<Child>);

impl Guard {
    /// Starts it. It waits for the end of its standard input, which the checker holds.
    pub fn start() -> Self {
        let start = |path| {
            let mut command = Command::new(path);
            command.env(GUARD, std::process::id().to_string()).process_group(0);
            command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
        };
        // Without it the checker works as well, as long as it is let.
        Guard(std::env::current_exe().and_then(start).ok())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Does a guard's work, if this process is one.
pub fn is_guard(clean: impl FnOnce(&str)) -> bool {
    let Ok(checker) = std::env::var(GUARD) else { return false };
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    hunt(&[&format!("{checker}-")]);
    clean(&checker);
    true
}

/// Kills the processes whose mark begins like one of these, until there are none.
fn hunt(marks: &[&str]) {
    let end = Instant::now() + HUNT;
    let starts: Vec<_> = marks.iter().map(|mark| format!("{MARK}={mark}").into_bytes()).collect();
    loop {
        let mut found = false;
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let number = process.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(pid) = number.and_then(Pid::from_raw) else { continue };
            let environment = fs::read(process.path().join("environ")).unwrap_or_default();
            let is_marked = |entry: &[u8]| {
                starts.iter().any(|start| match entry.strip_prefix(&start[..]) {
                    Some(rest) => rest.is_empty() || start.ends_with(b"-"),
                    None => false,
                })
            };
            if environment.split(|byte| *byte == 0).any(is_marked) {
                found |= kill_process(pid, Signal::KILL).is_ok();
            }
        }
        if !found || Instant::now() > end {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn read(stream: Option<impl Read + Send + 'static>, text: &Arc<Mutex<Text>>) {
    let (Some(mut stream), text) = (stream, Arc::clone(text)) else { return };
    let thread = thread::Builder::new().spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            lock(&text).add(&bytes[..count]);
            if lock(&text).total > FLOOD {
                thread::sleep(PAUSE);
            }
        }
    });
    if let Err(error) = thread {
        hindrance::note(format_args!("a program's output could not be read: {error}"));
    }
}

/// Returns the beginning of a text, on one line.
pub fn shorten(text: &str) -> String {
    const MOST: usize = 160;
    let mut shown: String =
        text.chars().take(MOST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().count() > MOST {
        shown.push_str(&format!("... ({} bytes)", text.len()));
    }
    shown
}

/// A panic leaves nothing half done in what these locks guard.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
