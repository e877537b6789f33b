//! The process groups that run, so that all of them can be ended.

use std::collections::HashSet;
use std::io::{self, PipeReader, PipeWriter};
use std::process::{Child, ExitStatus};
use std::sync::{Mutex, MutexGuard, RwLock};

use rustix::process::{Pid, Signal, kill_process_group};

use super::super::handler::Failure;
use crate::net::lock::{lock, whole};

/// The groups of one server.
#[derive(Debug)]
pub struct Groups {
    /// Whether none is started any more. To start one, it is held for reading, so that the group is known
    /// before all are killed.
    is_closed: RwLock<bool>,
    running: Mutex<HashSet<Pid>>,
    /// Reaches its end when all must end: each thread that watches a process watches this, too.
    ended: PipeReader,
    ending: Mutex<Option<PipeWriter>>,
}

/// A process, whose group has its id. The group is killed when this is dropped.
#[derive(Debug)]
pub struct Group<'a> {
    /// The process.
    pub child: Child,
    /// Its id, and that of its group.
    pub pid: Pid,
    groups: &'a Groups,
    /// It has been waited for, or nobody is to wait for it.
    is_settled: bool,
}

impl Groups {
    /// None.
    ///
    /// # Errors
    ///
    /// If the system gives no pipe.
    pub fn new() -> io::Result<Self> {
        let (ended, writer) = io::pipe()?;
        let (is_closed, running) = Default::default();
        Ok(Groups { is_closed, running, ended, ending: Mutex::new(Some(writer)) })
    }

    /// Starts a process, which is to be the first of a group of its own.
    ///
    /// # Errors
    ///
    /// That it could not be started, or that all are to end.
    pub fn start(
        &self,
        spawn: impl FnOnce() -> Result<Child, Failure>,
    ) -> Result<Group<'_>, Failure> {
        let is_closed = whole(self.is_closed.read());
        if *is_closed {
            return Err(Failure::overloaded("the server stops"));
        }
        let child = spawn()?;
        let pid = Pid::from_child(&child);
        self.lock().insert(pid);
        Ok(Group { child, pid, groups: self, is_settled: false })
    }

    /// Has its end when all are to end.
    pub fn ended(&self) -> &PipeReader {
        &self.ended
    }

    /// Starts no more, and has those that watch the processes end them. Returns how many there are.
    pub fn end(&self) -> usize {
        *whole(self.is_closed.write()) = true;
        let count = self.lock().len();
        drop(lock(&self.ending).take());
        count
    }

    /// Starts no more, and kills all.
    pub fn kill(&self) {
        *whole(self.is_closed.write()) = true;
        // A process is reaped only after its id is removed under this lock: each id here is its group's.
        for pid in self.lock().iter() {
            let _ = kill_process_group(*pid, Signal::KILL);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Pid>> {
        lock(&self.running)
    }
}

impl Group<'_> {
    /// Asks all of the group to end.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends all of the group.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        // It fails if nothing of the group is left.
        let _ = kill_process_group(self.pid, signal);
    }

    /// Leaves the process alone, which was killed and does not end: nobody waits for it any more.
    pub fn leave(&mut self) {
        self.groups.lock().remove(&self.pid);
        self.is_settled = true;
    }

    /// Kills what is left of the group, waits for its first process, and returns how that ended.
    ///
    /// # Errors
    ///
    /// If the system does not say.
    pub fn reap(&mut self) -> io::Result<ExitStatus> {
        // Until it is waited for, its id is no other process's.
        self.kill();
        self.groups.lock().remove(&self.pid);
        self.is_settled = true;
        self.child.wait()
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        if !self.is_settled {
            let _ = self.reap();
        }
    }
}
