//! One run of a command: its input, its output, its time and its end, all watched by one thread.

use std::io::{self, ErrorKind, PipeReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{ChildStderr, ChildStdin, ChildStdout, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use super::groups::{Group, Groups};
use super::lines::Lines;
use crate::cli::escape::{EscapedId, EscapedReason};
use crate::cli::terminal::{Kind, Terminal};
use crate::protocol::Id;
use crate::server::handler::{Failure, Message, too_long};

/// How long what a command has started may hold its output open when the command has ended.
const OUTPUT_GRACE: Duration = Duration::from_secs(1);

/// How long a group may take to end when it is asked to, before it is killed.
const TERM_GRACE: Duration = Duration::from_secs(1);

/// How long a killed process may take to end. Longer takes one that is none of ours to kill, since it is
/// another user's by now, or one that the system cannot end.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// How often a process is looked at where the system has no descriptor for it.
const TICK: Duration = Duration::from_millis(20);

/// As much as a pipe holds, in bytes.
const CHUNK: usize = 64 << 10;

/// What one run may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// When its time is over.
    pub deadline: Instant,
    /// That time, as it is told.
    pub limit: Duration,
    /// The longest result, in bytes.
    pub max_result: usize,
}

/// A running command.
pub struct Run<'a> {
    group: Group<'a>,
    /// Readable when the process has ended, where the system has that.
    exit: Option<OwnedFd>,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    /// What the command has not taken yet.
    unsent: &'a [u8],
    chunk: Vec<u8>,
    result: Vec<u8>,
    lines: Lines,
    client: &'a Id<'a>,
    terminal: &'a Terminal,
    limits: Limits,
    /// Why it is ended, if it does not end by itself.
    cut: Option<Failure>,
    /// When a group that was asked to end is killed.
    kill_at: Option<Instant>,
    /// When one that was killed is left alone.
    leave_at: Option<Instant>,
    exited_at: Option<Instant>,
}

/// What there is to do.
#[derive(Debug)]
struct Ready {
    all_end: bool,
    has_exited: bool,
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

impl<'a> Run<'a> {
    /// Watches over the process that was just started for this message.
    ///
    /// # Errors
    ///
    /// If the system does not let us.
    pub fn new(
        mut group: Group<'a>,
        message: &Message<'a>,
        limits: Limits,
        terminal: &'a Terminal,
    ) -> io::Result<Self> {
        let child = &mut group.child;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        // Only our ends of the pipes: the command's wait as usual.
        stdin.as_ref().map_or(Ok(()), |pipe| ioctl_fionbio(pipe, true))?;
        stdout.as_ref().map_or(Ok(()), |pipe| ioctl_fionbio(pipe, true))?;
        stderr.as_ref().map_or(Ok(()), |pipe| ioctl_fionbio(pipe, true))?;
        Ok(Run {
            exit: exit_descriptor(group.pid),
            group,
            stdin,
            stdout,
            stderr,
            unsent: message.payload.as_bytes(),
            chunk: vec![0; CHUNK],
            result: Vec::new(),
            lines: Lines::default(),
            client: message.client,
            terminal,
            limits,
            cut: None,
            kill_at: None,
            leave_at: None,
            exited_at: None,
        })
    }

    /// Watches over the command to its end, and returns its result.
    ///
    /// # Errors
    ///
    /// Why it failed; the outer ones, where the system does not let us watch.
    pub fn watch(&mut self, groups: &Groups) -> io::Result<Result<Vec<u8>, Failure>> {
        self.send_input();
        while !self.is_over(Instant::now()) {
            let ready = self.wait(groups.ended())?;
            if ready.stdin {
                self.send_input();
            }
            if ready.stdout {
                self.read_result();
            }
            if ready.stderr {
                self.read_lines();
            }
            let now = Instant::now();
            if ready.has_exited {
                self.exited_at = Some(now);
                self.stdin = None;
            } else if ready.all_end {
                self.end(Failure::new("the server stopped before the command had ended"));
            } else {
                self.keep_time(now);
            }
        }
        self.finish()
    }

    fn is_over(&self, now: Instant) -> bool {
        let Some(exited_at) = self.exited_at else {
            return self.leave_at.is_some_and(|at| now >= at);
        };
        let has_ended = self.stdout.is_none() && self.stderr.is_none();
        self.cut.is_some() || has_ended || now >= exited_at + OUTPUT_GRACE
    }

    /// Waits until there is something to do.
    fn wait(&self, ended: &PipeReader) -> io::Result<Ready> {
        let is_running = self.exited_at.is_none();
        let sources: [(Option<BorrowedFd<'_>>, PollFlags); 5] = [
            (Some(ended.as_fd()).filter(|_| is_running && self.cut.is_none()), PollFlags::IN),
            (self.exit.as_ref().map(AsFd::as_fd).filter(|_| is_running), PollFlags::IN),
            (self.stdin.as_ref().map(AsFd::as_fd), PollFlags::OUT),
            (self.stdout.as_ref().map(AsFd::as_fd), PollFlags::IN),
            (self.stderr.as_ref().map(AsFd::as_fd), PollFlags::IN),
        ];
        let mut waiting: Vec<_> = sources
            .iter()
            .filter_map(|(source, flags)| Some(PollFd::from_borrowed_fd((*source)?, *flags)))
            .collect();
        let left = self.wakes_at().map(|at| at.saturating_duration_since(Instant::now()));
        let left = if is_running && self.exit.is_none() {
            Some(left.map_or(TICK, |left| left.min(TICK)))
        } else {
            left
        };
        // A time that does not fit is as good as none.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut waiting, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut polled = waiting.iter().map(|waiting| !waiting.revents().is_empty());
        let [all_end, exited, stdin, stdout, stderr] =
            sources.map(|(source, _)| source.is_some() && polled.next() == Some(true));
        let has_exited = is_running && (exited || (self.exit.is_none() && self.is_waitable()?));
        Ok(Ready { all_end, has_exited, stdin, stdout, stderr })
    }

    /// When there is something to do, whatever the command does.
    fn wakes_at(&self) -> Option<Instant> {
        match (self.exited_at, &self.cut) {
            (Some(exited_at), _) => Some(exited_at + OUTPUT_GRACE),
            (None, None) => Some(self.limits.deadline),
            (None, Some(_)) => self.kill_at.or(self.leave_at),
        }
    }

    /// Whether the process has ended. It is not waited for: its group is to be killed before.
    fn is_waitable(&self) -> io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Ok(waitid(WaitId::Pid(self.group.pid), options)?.is_some())
    }

    fn keep_time(&mut self, now: Instant) {
        if self.exited_at.is_some() {
            return;
        }
        if self.cut.is_none() && now >= self.limits.deadline {
            let limit = self.limits.limit.as_secs_f64();
            self.end(Failure::new(format!("the command took longer than {limit} s")));
        }
        if self.kill_at.is_some_and(|at| now >= at) {
            self.group.kill();
            self.kill_at = None;
            self.leave_at = Some(now + KILL_GRACE);
        }
    }

    /// Ends the command, which has failed for this reason.
    fn end(&mut self, failure: Failure) {
        if self.cut.is_none() {
            self.cut = Some(failure);
            (self.stdin, self.stdout) = (None, None);
            self.group.terminate();
            self.kill_at = Some(Instant::now() + TERM_GRACE);
        }
    }

    fn send_input(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        while !self.unsent.is_empty() {
            match stdin.write(self.unsent) {
                Ok(sent) => self.unsent = &self.unsent[sent..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The command has no use for the rest, which is its own affair.
                Err(_) => break,
            }
        }
        self.stdin = None;
    }

    fn read_result(&mut self) {
        let Some(stdout) = &mut self.stdout else { return };
        match stdout.read(&mut self.chunk) {
            Ok(0) => self.stdout = None,
            Ok(read) => {
                self.result.extend_from_slice(&self.chunk[..read]);
                if self.result.len() > self.limits.max_result {
                    self.result = Vec::new();
                    self.end(too_long(self.limits.max_result));
                }
            }
            Err(error) if is_passing(&error) => {}
            Err(_) => self.stdout = None,
        }
    }

    fn read_lines(&mut self) {
        let Some(stderr) = &mut self.stderr else { return };
        match stderr.read(&mut self.chunk) {
            Ok(0) => self.stderr = None,
            Ok(read) => {
                let (terminal, client) = (self.terminal, self.client);
                self.lines.push(&self.chunk[..read], |line| print(terminal, client, line));
            }
            Err(error) if is_passing(&error) => {}
            Err(_) => self.stderr = None,
        }
    }

    fn finish(&mut self) -> io::Result<Result<Vec<u8>, Failure>> {
        let (terminal, client) = (self.terminal, self.client);
        self.lines.finish(|line| print(terminal, client, line));
        if let Some(failure) = self.cut.take() {
            if self.exited_at.is_none() {
                self.group.leave();
                print(
                    terminal,
                    client,
                    "the command was killed, but does not end; it is left alone",
                );
            }
            return Ok(Err(failure));
        }
        let status = self.group.reap()?;
        if self.stdout.is_some() || self.stderr.is_some() {
            let line =
                "what the command started held its output open after its end, and was killed";
            print(terminal, client, line);
        }
        if status.success() {
            return Ok(Ok(std::mem::take(&mut self.result)));
        }
        let mut reason = how_it_ended(status);
        if !self.lines.last().is_empty() {
            reason.push_str(": ");
            reason.push_str(self.lines.last());
        }
        Ok(Err(Failure::new(reason)))
    }
}

/// A descriptor that is readable when the process has ended.
#[cfg(target_os = "linux")]
fn exit_descriptor(pid: Pid) -> Option<OwnedFd> {
    use rustix::process::{PidfdFlags, pidfd_open};
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

#[cfg(not(target_os = "linux"))]
fn exit_descriptor(_: Pid) -> Option<OwnedFd> {
    None
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn print(terminal: &Terminal, client: &Id<'_>, line: &str) {
    let (client, line) = (EscapedId(client), EscapedReason(line));
    terminal.warn_limited(Kind::CommandOutput, format_args!("client {client}: {line}"));
}

fn how_it_ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("the command ended with exit code {code}"),
        (None, Some(signal)) => match signal_hook::low_level::signal_name(signal) {
            Some(name) => format!("the command was ended by {name}"),
            None => format!("the command was ended by signal {signal}"),
        },
        (None, None) => format!("the command ended with {status}"),
    }
}
