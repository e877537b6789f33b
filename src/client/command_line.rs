//! A client as the program `client` runs it: with lines on the terminal, patience and advice.

use std::borrow::Cow;
use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use super::reply::Answer;
use super::{Client, Error, Reply};
use crate::cli::escape::Escaped;
use crate::cli::terminal::Terminal;
use crate::net::endpoint::{Endpoint, LOOPBACK};
use crate::protocol::{Code, Outgoing};

/// Pause before another attempt, where the client was told to keep trying.
const PAUSE: Duration = Duration::from_millis(100);

/// A client that says on a terminal what it does.
#[derive(Debug)]
pub struct CommandLine {
    client: Client,
    terminal: Terminal,
    wait: Duration,
    /// The policies of which it was said how to start a server.
    advised: HashSet<String>,
}

impl CommandLine {
    /// A client that tries each message again for `wait`, as long as [`Error::may_repeat`] allows.
    pub fn new(client: Client, terminal: Terminal, wait: Duration) -> Self {
        CommandLine { client, terminal, wait, advised: HashSet::new() }
    }

    /// Sends a message, and says on the terminal how it ended.
    ///
    /// # Errors
    ///
    /// As [`Client::send`]; it was said.
    pub fn deliver(&mut self, message: &Outgoing) -> Result<Reply, Error> {
        let until = Instant::now() + self.wait;
        let (mut warned, mut was_said) = (false, false);
        loop {
            let mut through = None;
            let attempt = self.client.attempt(message, |proxy, failed| {
                // Once for a message, however often it is tried.
                if !was_said {
                    self.terminal.message(format_args!(
                        "Sending message {} to privacy policy {} through reverse proxy running on port {}",
                        Escaped(&message.payload),
                        Escaped(&message.policy),
                        proxy.port,
                    ));
                    was_said = true;
                }
                if let Some(reasons) = failed.filter(|_| !warned) {
                    self.terminal.warn(format_args!("{reasons}; sending it to {proxy}"));
                    warned = true;
                }
                through = Some(proxy.clone());
            });
            let error = match attempt {
                Ok(answer) => return self.conclude(answer),
                Err(error) => error,
            };
            if !error.may_repeat(message.once) || Instant::now() >= until {
                self.terminal.line(format_args!("Message not delivered: {error}"));
                self.advise(&message.policy, &error, through);
                return Err(error);
            }
            if !warned {
                self.terminal.warn(format_args!("{error}; trying again"));
                self.advise(&message.policy, &error, through);
                warned = true;
            }
            thread::sleep(PAUSE.min(until.saturating_duration_since(Instant::now())));
        }
    }

    /// Says what came.
    fn conclude(&self, answer: Answer) -> Result<Reply, Error> {
        self.terminal.message(format_args!(
            "Receiving a response from the server {} payload: {}",
            Escaped(&answer.server),
            Escaped(&answer.payload),
        ));
        if let Ok(Some(result)) = &answer.result {
            match std::str::from_utf8(result) {
                Ok(text) => self.terminal.message(format_args!("Result: {}", Escaped(text))),
                Err(_) => self.terminal.message(format_args!("Result: ({} bytes)", result.len())),
            }
        }
        let verdict = if answer.is_intact { "correct" } else { "not correct" };
        self.terminal.message(format_args!("Hash of payload is {verdict}"));
        let reply = answer.into_reply();
        if let Err(error @ Error::BadResult { .. }) = &reply {
            self.terminal.warn(format_args!("{error}"));
        }
        reply
    }

    /// Says how to start a server of this policy, once, where there is none.
    fn advise(&mut self, policy: &str, error: &Error, proxy: Option<Endpoint>) {
        let is_no_server = matches!(error, Error::Refused { code: Some(Code::NoServer), .. });
        let Some(proxy) = proxy.filter(|_| is_no_server) else { return };
        if !self.advised.insert(policy.to_owned()) {
            return;
        }
        let at = match proxy.host.as_str() {
            LOOPBACK => proxy.port.to_string(),
            _ => proxy.to_string(),
        };
        self.terminal.warn(format_args!(
            "start one: server -id 1 -pp {} -listen 0 -revproc {at}",
            shell_word(policy)
        ));
    }
}

/// Text as one word of a shell's command line.
fn shell_word(text: &str) -> Cow<'_, str> {
    let is_plain =
        |character: char| character.is_alphanumeric() || "_-.,:/@%+=".contains(character);
    if !text.is_empty() && text.chars().all(is_plain) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(format!("'{}'", text.replace('\'', r"'\''")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_quoted_for_the_shell_where_it_must_be() {
        for (text, word) in [
            ("PP_1", "PP_1"),
            ("999", "999"),
            ("", "''"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("$(rm)", "'$(rm)'"),
        ] {
            assert_eq!(shell_word(text), word);
        }
    }
}
