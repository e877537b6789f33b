//! One run of a command: its input, its output, its time and its end, all watched by one thread.

use std::io::{self, ErrorKind, PipeReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{ChildStderr, ChildStdin, ChildStdout, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::process::{PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};

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

/// How often a process is looked at where the system gives no descriptor for it.
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
    /// Readable when the process has ended, where the system gives that.
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
    phase: Phase,
    /// When the phase is over, whatever the command does.
    until: Instant,
    /// Why it is ended, if it does not end by itself.
    cut: Option<Failure>,
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Until its time is over.
    Running,
    /// Its group was asked to end, and is killed then.
    Asked,
    /// Its group was killed, and is left alone then.
    Killed,
    /// It has ended; its output may be held open until then.
    Exited,
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
        let (stdin, stdout, stderr) = (
            our_end(child.stdin.take())?,
            our_end(child.stdout.take())?,
            our_end(child.stderr.take())?,
        );
        Ok(Run {
            // A container may forbid it.
            exit: pidfd_open(group.pid, PidfdFlags::empty()).ok(),
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
            phase: Phase::Running,
            until: limits.deadline,
            limits,
            cut: None,
        })
    }

    /// Watches over the command to its end, and returns its result.
    ///
    /// # Errors
    ///
    /// Why it failed; the outer ones, where the system does not let us watch.
    pub fn watch(&mut self, groups: &Groups) -> io::Result<Result<Vec<u8>, Failure>> {
        self.send_input();
        loop {
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
            if ready.has_exited {
                self.stdin = None;
                self.enter(Phase::Exited, OUTPUT_GRACE);
            } else if ready.all_end {
                self.end(Failure::new("the server stopped before the command had ended"));
            }
            let is_read = self.cut.is_some() || (self.stdout.is_none() && self.stderr.is_none());
            let is_over = Instant::now() >= self.until;
            match self.phase {
                Phase::Exited if is_read => break,
                _ if !is_over => {}
                Phase::Running => {
                    let limit = self.limits.limit.as_secs_f64();
                    self.end(Failure::new(format!("the command took longer than {limit} s")));
                }
                Phase::Asked => {
                    self.group.kill();
                    self.enter(Phase::Killed, KILL_GRACE);
                }
                Phase::Killed | Phase::Exited => break,
            }
        }
        self.finish()
    }

    fn enter(&mut self, phase: Phase, length: Duration) {
        (self.phase, self.until) = (phase, Instant::now() + length);
    }

    /// Waits until there is something to do.
    fn wait(&self, ended: &PipeReader) -> io::Result<Ready> {
        let is_running = self.phase != Phase::Exited;
        let sources: [(Option<BorrowedFd<'_>>, PollFlags); 5] = [
            (Some(ended.as_fd()).filter(|_| self.phase == Phase::Running), PollFlags::IN),
            (self.exit.as_ref().map(AsFd::as_fd).filter(|_| is_running), PollFlags::IN),
            (self.stdin.as_ref().map(AsFd::as_fd), PollFlags::OUT),
            (self.stdout.as_ref().map(AsFd::as_fd), PollFlags::IN),
            (self.stderr.as_ref().map(AsFd::as_fd), PollFlags::IN),
        ];
        let mut waiting: Vec<_> = sources
            .iter()
            .filter_map(|(source, flags)| Some(PollFd::from_borrowed_fd((*source)?, *flags)))
            .collect();
        let longest = if is_running && self.exit.is_none() { TICK } else { Duration::MAX };
        let left = self.until.saturating_duration_since(Instant::now()).min(longest);
        // A time that does not fit is as good as none.
        let left = Timespec::try_from(left).ok();
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

    /// Whether the process has ended. It is not waited for: its group is to be killed before.
    fn is_waitable(&self) -> io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Ok(waitid(WaitId::Pid(self.group.pid), options)?.is_some())
    }

    /// Ends the command, which has failed for this reason.
    fn end(&mut self, failure: Failure) {
        if self.cut.is_some() {
            return;
        }
        self.cut = Some(failure);
        (self.stdin, self.stdout) = (None, None);
        if self.phase == Phase::Running {
            self.group.terminate();
            self.enter(Phase::Asked, TERM_GRACE);
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
            if self.phase == Phase::Killed {
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

/// Our end of a pipe, which is not waited for; the command's is, as usual.
fn our_end<P: AsFd>(pipe: Option<P>) -> io::Result<Option<P>> {
    pipe.as_ref().map_or(Ok(()), |pipe| ioctl_fionbio(pipe, true))?;
    Ok(pipe)
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
