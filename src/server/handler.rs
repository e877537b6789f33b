//! What a server does with a message besides hashing it.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::semaphore::{NoPermit, Semaphore};
use crate::protocol::{Code, Data, Id};

/// The longest reason of a [`Failure`], in bytes: it has to fit a packet.
const MAX_REASON: usize = 4 << 10;

/// An answer may take a twentieth of its message's time on its way, and this at most. Were it later than
/// the proxy waits, the client would not learn what became of the message.
const MAX_WAY: Duration = Duration::from_millis(100);

/// A message, as a [`Handler`] gets it.
#[derive(Debug, Clone)]
pub struct Message<'a> {
    /// The client's id.
    pub client: &'a Id<'a>,
    /// The policy that the client asked for.
    pub policy: &'a Id<'a>,
    /// The text.
    pub payload: &'a str,
    /// The client's own id for the message.
    pub msgid: Option<&'a str>,
    /// Whether the message must not be carried out twice. Only a handler that remembers `msgid`s
    /// can see a repeat; the proxy makes none.
    pub once: bool,
    /// The message's time, if it has one of its own.
    pub timeout: Option<Duration>,
    /// When the work is to be done: as much before the end of that time as an answer may take on its
    /// way. The time began when this server read the message, so a wait for a permit is part of it.
    pub deadline: Option<Instant>,
}

impl<'a> Message<'a> {
    fn new(data: &'a Data<'_>, received: Instant) -> Self {
        let timeout = data.timeout.map(Duration::from_secs);
        let deadline =
            |timeout: Duration| received.checked_add(timeout - MAX_WAY.min(timeout / 20));
        Message {
            client: &data.srcid,
            policy: &data.policy,
            payload: &data.payload,
            msgid: data.msgid.as_deref(),
            once: data.once,
            timeout,
            deadline: timeout.and_then(deadline),
        }
    }
}

/// The work on a message failed. Its client gets a refusal with the reason and the code `failed`, or that of
/// [`overloaded`](Self::overloaded).
///
/// Every error that can be shown becomes one, so that a handler can use `?`, and so does a text:
/// `Err("no such picture".into())`.
#[derive(Clone, PartialEq, Eq)]
pub struct Failure {
    pub(super) code: Code,
    pub(super) reason: String,
}

impl Failure {
    /// The work failed for this reason, which is for people.
    pub fn new(reason: impl Into<String>) -> Self {
        Failure::with(Code::Failed, reason)
    }

    /// The work was not begun, since this server lacks something just now. The proxy sends the
    /// message to another server, if there is one, and blames nobody.
    pub fn overloaded(reason: impl Into<String>) -> Self {
        Failure::with(Code::Overloaded, reason)
    }

    pub(super) fn with(code: Code, reason: impl Into<String>) -> Self {
        let mut reason = reason.into();
        if reason.len() > MAX_REASON {
            let is_boundary = |at: &usize| reason.is_char_boundary(*at);
            reason.truncate((0..=MAX_REASON).rev().find(is_boundary).unwrap_or_default());
            reason.push('…');
        }
        Failure { code, reason }
    }
}

impl<E: fmt::Display> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::new(error.to_string())
    }
}

/// Without `Display`, by which it would be turned into itself.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.reason, self.code)
    }
}

/// A server's work. Every `Fn(&Message<'_>) -> Result<Option<Vec<u8>>, Failure>` is one.
pub trait Handler: Send + Sync + 'static {
    /// Does the work on a message and returns the result, which goes into the ack's `result`: as
    /// text if it is UTF-8, else in base64. `None` leaves that out.
    ///
    /// It is called by the thread of the message's connection: for the messages of one connection
    /// one after another, for those of several at once.
    ///
    /// # Errors
    ///
    /// What the client is to be told. A panic fails the message, too.
    fn handle(&self, message: &Message<'_>) -> Result<Option<Vec<u8>>, Failure>;

    /// The server stops, and the time for that is over: work that still runs is to end soon, and to
    /// fail. Returns on how many messages it still runs.
    fn end(&self) -> usize {
        0
    }
}

impl<F> Handler for F
where
    F: Fn(&Message<'_>) -> Result<Option<Vec<u8>>, Failure> + Send + Sync + 'static,
{
    fn handle(&self, message: &Message<'_>) -> Result<Option<Vec<u8>>, Failure> {
        self(message)
    }
}

/// The handler, with a permit for each message that the server takes at once.
pub(super) struct Work {
    handler: Option<Box<dyn Handler>>,
    semaphore: Option<Arc<Semaphore>>,
}

impl Work {
    pub(super) fn new(handler: Option<Box<dyn Handler>>, at_once: Option<usize>) -> Self {
        Work { handler, semaphore: at_once.map(Semaphore::new) }
    }

    /// Whether there is nothing to do or to wait for but the hash.
    pub(super) fn is_hash_only(&self) -> bool {
        self.handler.is_none() && self.semaphore.is_none()
    }

    /// Waits for a permit, and does the work on a message that was `received` at that time.
    pub(super) fn carry_out(
        &self,
        data: &Data<'_>,
        received: Instant,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let message = Message::new(data, received);
        let permit =
            self.semaphore.as_ref().map(|semaphore| semaphore.take(message.deadline)).transpose();
        let _permit = match permit {
            Err(NoPermit::Closed) => return Err(Failure::overloaded("the server stops")),
            Ok(permit) if message.deadline.is_none_or(|deadline| Instant::now() < deadline) => {
                permit
            }
            _ => {
                let time = message.timeout.unwrap_or_default().as_secs();
                let reason = format!("the {time} s of the message were over before its turn came");
                return Err(Failure::with(Code::Timeout, reason));
            }
        };
        let Some(handler) = &self.handler else { return Ok(None) };
        // What the handler shares with other messages is its own to keep whole.
        catch_unwind(AssertUnwindSafe(|| handler.handle(&message)))
            .unwrap_or_else(|panic| Err(Failure::new(panic_reason(&*panic))))
    }

    /// Ends the work. Returns on how many messages it still ran.
    pub(super) fn end(&self) -> usize {
        if let Some(semaphore) = &self.semaphore {
            semaphore.close();
        }
        self.handler.as_ref().map_or(0, |handler| handler.end())
    }
}

fn panic_reason(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    match text.or_else(|| panic.downcast_ref::<&str>().copied()) {
        Some(text) => format!("the server's work panicked: {text}"),
        None => "the server's work panicked".to_owned(),
    }
}

/// A result does not fit a packet, which has at most `limit` bytes.
pub(super) fn too_long(limit: usize) -> Failure {
    Failure::new(format!("its result is longer than a packet of {limit} bytes (-max-packet)"))
}

/// A result as it is written in an ack, and its encoding if it is no text.
pub(super) fn encode(result: Vec<u8>) -> (String, Option<&'static str>) {
    match String::from_utf8(result) {
        Ok(text) => (text, None),
        Err(error) => (BASE64.encode(error.as_bytes()), Some("base64")),
    }
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").field("semaphore", &self.semaphore).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carry_out(handler: impl Handler, data: &Data<'_>) -> Result<Option<Vec<u8>>, Failure> {
        Work::new(Some(Box::new(handler)), Some(1)).carry_out(data, Instant::now())
    }

    fn data(payload: &str) -> Data<'_> {
        Data::new(Id::Integer(50), Id::Text("P".into()), payload)
    }

    #[test]
    fn a_handler_sees_the_message_and_may_fail_with_any_error() {
        let data = Data { timeout: Some(2), once: true, msgid: Some("m".into()), ..data("five") };
        let begun = Instant::now();
        let handler = move |message: &Message<'_>| {
            assert_eq!((message.client.text(), message.policy.text()), ("50".into(), "P".into()));
            assert_eq!((message.msgid, message.once), (Some("m"), true));
            let left = message.deadline.unwrap() - begun;
            assert!(left >= Duration::from_millis(1900) && left < Duration::from_secs(2));
            Ok(Some(vec![message.payload.parse::<u8>()?]))
        };
        let failure = carry_out(handler, &data).unwrap_err();
        assert_eq!(failure, Failure::new("invalid digit found in string"));
        assert_eq!(failure.code, Code::Failed);
    }

    #[test]
    fn a_panic_is_a_failure_with_its_text_and_gives_the_permit_back() {
        let handler = |message: &Message<'_>| match message.payload {
            "text" => panic!("no number"),
            "format" => panic!("no {}", "number"),
            "other" => std::panic::panic_any(5),
            _ => Ok(None),
        };
        let work = Work::new(Some(Box::new(handler)), Some(1));
        let carry_out = |payload| work.carry_out(&data(payload), Instant::now());
        for payload in ["text", "format"] {
            let failure = carry_out(payload).unwrap_err();
            assert_eq!(failure, Failure::new("the server's work panicked: no number"));
        }
        assert_eq!(carry_out("other").unwrap_err(), Failure::new("the server's work panicked"));
        assert_eq!(carry_out("none"), Ok(None));
    }

    #[test]
    fn a_long_reason_is_shortened() {
        let failure = Failure::new("é".repeat(MAX_REASON));
        assert_eq!(failure.reason, "é".repeat(MAX_REASON / 2) + "…");
    }

    #[test]
    fn a_result_is_text_where_it_can_be() {
        assert_eq!(encode("Grüße\0".into()), ("Grüße\0".into(), None));
        assert_eq!(encode(vec![0xff, 0]), ("/wA=".into(), Some("base64")));
    }
}
