//! A program as a server's work: it gets each message's payload on its standard input, and what it
//! writes to its standard output is the result.
//!
//! Each message has a process of its own, in a process group of its own. When the process has ended, or
//! its time is over, or the server stops, the whole group ends: whatever the program has started ends
//! with it, unless that went to a group of its own (as `setsid` does), where nobody finds it.

mod groups;
mod lines;
mod watch;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::handler::{Failure, Handler, Message};
use crate::cli::terminal::Terminal;
use crate::net::os_error::{is_local, reason};
use crate::protocol::Id;
use groups::Groups;
use watch::{Limits, Run};

/// A program that is run for each message.
#[derive(Debug)]
pub struct Command {
    program: PathBuf,
    /// As it was called.
    name: OsString,
    arguments: Vec<OsString>,
    settings: Settings,
    terminal: Terminal,
    groups: Groups,
}

/// What can be set for a command.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The server's id, which the program finds in its environment.
    pub id: Id<'static>,
    /// How long it may run for one message.
    pub run_timeout: Duration,
    /// The longest result that is read, in bytes: no longer one fits a packet.
    pub max_result: usize,
}

impl Command {
    /// The program `name`, looked for in the `PATH` unless it has a slash, with these arguments. Its
    /// standard error goes to the terminal.
    ///
    /// # Errors
    ///
    /// That there is no such program, or that it cannot be run; or that the system gives no pipe.
    pub fn new(
        name: OsString,
        arguments: Vec<OsString>,
        settings: Settings,
        terminal: Terminal,
    ) -> Result<Arc<Self>, String> {
        let program = find(&name, env::var_os("PATH").as_deref())?;
        let groups = Groups::new()
            .map_err(|error| format!("could not prepare for commands: {}", reason(&error)))?;
        Ok(Arc::new(Command { program, name, arguments, settings, terminal, groups }))
    }

    /// Kills all that runs, at once, and starts nothing any more: call it when the process ends.
    pub fn kill(&self) {
        self.groups.kill();
    }

    fn run(&self, message: &Message<'_>) -> Result<Vec<u8>, Failure> {
        let started = Instant::now();
        let longest = started + self.settings.run_timeout;
        // Where it waited for a permit, only the rest of its time is left.
        let own = message.deadline.zip(message.timeout);
        let (deadline, limit) = own
            .filter(|(deadline, _)| *deadline < longest)
            .unwrap_or((longest, self.settings.run_timeout));
        let group = self.groups.start(|| self.spawn(message))?;
        let limits = Limits { deadline, limit, max_result: self.settings.max_result };
        Run::new(group, message, limits, &self.terminal)
            .and_then(|mut run| run.watch(&self.groups))
            .map_err(|error| Failure::new(format!("lost the command: {}", reason(&error))))?
    }

    fn spawn(&self, message: &Message<'_>) -> Result<Child, Failure> {
        let mut command = process::Command::new(&self.program);
        command
            .arg0(&self.name)
            .args(&self.arguments)
            .env("REVPROC_CLIENT", &*message.client.text())
            .env("REVPROC_POLICY", &*message.policy.text())
            .env("REVPROC_SERVER", &*self.settings.id.text())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        match message.msgid {
            Some(msgid) => command.env("REVPROC_MSGID", msgid),
            // Not that of the server, should it be some server's command itself.
            None => command.env_remove("REVPROC_MSGID"),
        };
        command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => {
                Failure::new("an id of it has a zero byte, which no environment can hold")
            }
            _ if error.raw_os_error() == Some(Errno::AGAIN.raw_os_error()) => Failure::overloaded(
                "could not start the command: the system gives no more processes (ulimit -u, the \
                 container's limit, or memory)",
            ),
            _ if is_local(&error) => {
                Failure::overloaded(format!("could not start the command: {}", reason(&error)))
            }
            _ => Failure::new(format!("could not start the command: {}", reason(&error))),
        })
    }
}

impl Handler for Arc<Command> {
    fn handle(&self, message: &Message<'_>) -> Result<Option<Vec<u8>>, Failure> {
        self.run(message).map(Some)
    }

    fn end(&self) -> usize {
        self.groups.end()
    }
}

/// Returns the program's path, as the system would find it.
fn find(name: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, String> {
    let shown = name.display();
    let is_program = |file: &Path| match fs::metadata(file) {
        Ok(metadata) if !metadata.is_file() => Err("is no file".to_owned()),
        Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => {
            Err("is not executable".to_owned())
        }
        Ok(_) => Ok(()),
        Err(error) => Err(format!("cannot be run: {}", reason(&error))),
    };
    if name.as_encoded_bytes().contains(&b'/') {
        let file = PathBuf::from(name);
        return match is_program(&file) {
            Ok(()) => Ok(file),
            Err(why) => Err(format!("the command {shown} {why}")),
        };
    }
    let folders = env::split_paths(path.unwrap_or_default());
    // An empty name would be the folder itself.
    let mut files = folders.map(|folder| folder.join(name)).filter(|_| !name.is_empty());
    files.find(|file| is_program(file).is_ok()).ok_or_else(|| {
        format!("the command \"{shown}\" is not in the PATH; give its path if it is elsewhere")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_in_the_path_or_where_it_is_said_to_be() {
        let path = OsString::from("/nowhere:/:/bin");
        let find = |name: &str| find(OsStr::new(name), Some(&path));
        assert_eq!(find("sh"), Ok("/bin/sh".into()));
        assert_eq!(find("/bin/sh"), Ok("/bin/sh".into()));
        for name in ["no-such-program", "", "etc"] {
            let expected = format!(
                "the command \"{name}\" is not in the PATH; give its path if it is elsewhere"
            );
            assert_eq!(find(name), Err(expected));
        }
        for (name, why) in [
            ("/no/such/program", "cannot be run: no such file or directory"),
            ("/etc/passwd", "is not executable"),
            ("/etc/", "is no file"),
        ] {
            assert_eq!(find(name), Err(format!("the command {name} {why}")));
        }
    }
}
