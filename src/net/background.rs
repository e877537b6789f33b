//! A thread for timers and for bytes that a peer does not take yet.
//!
//! It is started with its role and never waits for a single peer, so that its work is done even if the
//! system gives no further thread.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};

use crate::net::lock::lock;
use crate::net::os_error::thread_failure;

/// The longest wait between two looks at the clock. What is due later gets another look.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

type Work = Box<dyn FnOnce() + Send>;

/// Bytes that a peer has not taken yet.
pub struct Unsent {
    /// The peer's socket.
    pub stream: Arc<TcpStream>,
    /// What is left to be sent.
    pub bytes: Vec<u8>,
    /// When the peer must have taken all of it.
    pub deadline: Instant,
    /// How long it may take none of it.
    pub stall_limit: Duration,
    /// Called when all of it is sent, or cannot be sent any more.
    pub then: Box<dyn FnOnce(io::Result<()>) + Send>,
}

/// A handle to the thread, which ends with [`stop`](Self::stop).
pub struct Background {
    state: Mutex<State>,
    /// A byte in this pipe wakes the thread.
    waker: PipeWriter,
}

#[derive(Default)]
struct State {
    /// What is to be done, by its time and a number: what is for one instant is done in its order.
    timers: BTreeMap<(Instant, u64), Work>,
    next_number: u64,
    /// What the thread has not yet taken over.
    unsent: Vec<Unsent>,
    /// A byte is in the pipe.
    is_woken: bool,
    stopped: bool,
}

impl Background {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// If the system gives no thread or no pipe.
    pub fn start() -> io::Result<Arc<Self>> {
        let (reader, waker) = io::pipe()?;
        let background = Arc::new(Background { state: Mutex::default(), waker });
        let own = Arc::clone(&background);
        let thread = thread::Builder::new().name("background".to_owned());
        thread.spawn(move || own.run(reader)).map_err(thread_failure)?;
        Ok(background)
    }

    /// One without a thread: work stays until it is [taken](Self::take_timers).
    #[cfg(test)]
    pub fn without_thread() -> Arc<Self> {
        let (_, waker) = io::pipe().unwrap();
        Arc::new(Background { state: Mutex::default(), waker })
    }

    /// Takes the work that waits for its time, whatever that is.
    #[cfg(test)]
    pub fn take_timers(&self) -> Vec<Work> {
        std::mem::take(&mut self.lock().timers).into_values().collect()
    }

    /// Runs `work` at that time or soon after. It must not wait for anything.
    pub fn at(&self, at: Instant, work: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if state.stopped {
            return;
        }
        let key = (at, state.next_number);
        state.next_number += 1;
        state.timers.insert(key, Box::new(work));
        if state.timers.first_key_value().is_some_and(|(first, _)| *first == key) {
            self.wake(state);
        }
    }

    /// Sends the rest of what a peer did not take at once.
    pub fn send(&self, unsent: Unsent) {
        let mut state = self.lock();
        if state.stopped {
            drop(state);
            (unsent.then)(Err(ErrorKind::TimedOut.into()));
            return;
        }
        state.unsent.push(unsent);
        self.wake(state);
    }

    /// Ends the thread. What it had left to do is dropped.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        self.wake(state);
    }

    fn wake(&self, mut state: MutexGuard<'_, State>) {
        if !std::mem::replace(&mut state.is_woken, true) {
            drop(state);
            // The pipe has room for the one byte, and its reader lives as long as the thread.
            let _ = (&self.waker).write(&[0]);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn run(&self, mut woken: PipeReader) {
        let mut unsent: Vec<Sending> = Vec::new();
        loop {
            let now = Instant::now();
            let mut state = self.lock();
            unsent.extend(state.unsent.drain(..).map(|unsent| Sending {
                unsent,
                sent: 0,
                moved_at: now,
            }));
            let mut due = Vec::new();
            while let Some(first) = state.timers.first_entry().filter(|first| first.key().0 <= now)
            {
                due.push(first.remove());
            }
            let next_timer = state.timers.first_key_value().map(|((at, _), _)| *at);
            if state.stopped {
                let timers = std::mem::take(&mut state.timers);
                // Dropping them runs code of others, which may come back here.
                drop(state);
                return drop((timers, due, unsent));
            }
            drop(state);
            // What it leaves to do wakes this thread; going back to it at once would starve the sockets.
            due.into_iter().for_each(run_work);
            let now = Instant::now();
            let deadlines = unsent.iter().map(Sending::deadline);
            let next = deadlines.chain(next_timer).min();
            let wait = next.map_or(LONGEST_WAIT, |next| next.saturating_duration_since(now));
            let (is_woken, writable) = wait_until_ready(&woken, &unsent, wait);
            if is_woken {
                let mut state = self.lock();
                state.is_woken = false;
                // It has a byte, so this does not wait.
                let _ = woken.read(&mut [0]);
            }
            let now = Instant::now();
            let rest = std::mem::take(&mut unsent);
            for (mut sending, is_writable) in rest.into_iter().zip(writable) {
                let result = if is_writable { sending.send_some() } else { None };
                let is_over = now >= sending.deadline();
                match result.or_else(|| is_over.then(|| Err(ErrorKind::TimedOut.into()))) {
                    Some(result) => run_work(Box::new(move || (sending.unsent.then)(result))),
                    None => unsent.push(sending),
                }
            }
        }
    }
}

/// Bytes of which some may be sent.
struct Sending {
    unsent: Unsent,
    sent: usize,
    /// When the peer last took some.
    moved_at: Instant,
}

impl Sending {
    /// When it is given up, unless some of it moves.
    fn deadline(&self) -> Instant {
        self.unsent.deadline.min(self.moved_at + self.unsent.stall_limit)
    }

    /// Sends what the peer takes now. Returns how it has ended, if it has.
    fn send_some(&mut self) -> Option<io::Result<()>> {
        match send_now(&self.unsent.stream, &self.unsent.bytes[self.sent..]) {
            Ok(some) => {
                self.sent += some;
                if some > 0 {
                    self.moved_at = Instant::now();
                }
                (self.sent == self.unsent.bytes.len()).then_some(Ok(()))
            }
            Err(error) => Some(Err(error)),
        }
    }
}

/// Sends without waiting, and returns how many bytes the system took.
///
/// # Errors
///
/// If the connection broke.
pub fn send_now(stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        match send(stream, &bytes[sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(some) => sent += some,
            Err(rustix::io::Errno::AGAIN) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(sent)
}

/// Waits, and returns whether the thread was woken and which sockets take bytes again.
fn wait_until_ready(woken: &PipeReader, unsent: &[Sending], wait: Duration) -> (bool, Vec<bool>) {
    let mut waiting = vec![PollFd::new(woken, PollFlags::IN)];
    let streams = unsent.iter().map(|sending| &*sending.unsent.stream);
    waiting.extend(streams.map(|stream| PollFd::new(stream, PollFlags::OUT)));
    // Rounded up, so that what is due then is due.
    let wait = wait.min(LONGEST_WAIT) + Duration::from_millis(1);
    // A time of at most an hour fits. Where the system fails to wait, the clock decides.
    let _ = poll(&mut waiting, Timespec::try_from(wait).ok().as_ref());
    let mut ready = waiting.iter().map(|waiting| !waiting.revents().is_empty());
    (ready.next() == Some(true), ready.collect())
}

/// Work that panics ends by itself alone: whatever it held answers when it is dropped.
fn run_work(work: Work) {
    let _ = catch_unwind(AssertUnwindSafe(work));
}

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc::channel;

    use super::*;

    const BOUND: Duration = Duration::from_secs(20);

    fn pair() -> (Arc<TcpStream>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Arc::new(listener.accept().unwrap().0), peer)
    }

    #[test]
    fn work_is_done_in_the_order_in_which_it_is_due_and_outlives_a_panic() {
        let background = Background::start().unwrap();
        let (sender, done) = channel();
        let now = Instant::now();
        for (number, after) in [(3, 40), (1, 0), (2, 20), (4, 40)] {
            let sender = sender.clone();
            background.at(now + Duration::from_millis(after), move || {
                sender.send((number, now.elapsed())).unwrap();
                panic!("work may panic");
            });
        }
        for expected in 1..=4 {
            let (number, after) = done.recv_timeout(BOUND).unwrap();
            assert_eq!(number, expected);
            assert!(after >= Duration::from_millis([0, 20, 40, 40][expected - 1]));
        }
    }

    #[test]
    fn what_a_peer_does_not_take_at_once_is_sent_when_it_does() {
        let background = Background::start().unwrap();
        let (stream, mut peer) = pair();
        let (sender, done) = channel();
        let bytes: Vec<u8> = (0..16_u32 << 20).map(|at| at as u8).collect();
        background.send(Unsent {
            stream,
            bytes: bytes.clone(),
            deadline: Instant::now() + BOUND,
            stall_limit: BOUND,
            then: Box::new(move |result| sender.send(result).unwrap()),
        });
        let mut read = vec![0; bytes.len()];
        peer.read_exact(&mut read).unwrap();
        assert!(read == bytes);
        done.recv_timeout(BOUND).unwrap().unwrap();
    }

    #[test]
    fn who_does_not_read_is_given_up_in_time_and_keeps_nobody_waiting() {
        let background = Background::start().unwrap();
        let [(silent, _peer), (good, mut reader)] = [pair(), pair()];
        let (sender, done) = channel();
        for (stream, millis) in [(silent, 100), (good, 10_000)] {
            let (sender, limit) = (sender.clone(), Duration::from_millis(millis));
            background.send(Unsent {
                stream,
                bytes: vec![b'x'; 16 << 20],
                deadline: Instant::now() + BOUND,
                stall_limit: limit,
                then: Box::new(move |result| sender.send((millis, result.is_ok())).unwrap()),
            });
        }
        assert_eq!(done.recv_timeout(BOUND).unwrap(), (100, false));
        reader.read_exact(&mut vec![0; 16 << 20]).unwrap();
        assert_eq!(done.recv_timeout(BOUND).unwrap(), (10_000, true));
    }

    #[test]
    fn what_is_left_when_it_stops_is_dropped() {
        let background = Background::start().unwrap();
        let (sender, done) = channel::<()>();
        background.at(Instant::now() + BOUND, move || sender.send(()).unwrap());
        background.stop();
        assert!(done.recv_timeout(BOUND / 2).is_err());
        let (sender, done) = channel();
        let then = Box::new(move |result: io::Result<()>| sender.send(result.is_ok()).unwrap());
        let deadline = Instant::now() + BOUND;
        background.send(Unsent {
            stream: pair().0,
            bytes: vec![0],
            deadline,
            stall_limit: BOUND,
            then,
        });
        assert_eq!(done.recv_timeout(BOUND), Ok(false));
    }

    #[test]
    fn sockets_are_served_though_work_is_always_due() {
        fn again(background: Arc<Background>) {
            let own = Arc::clone(&background);
            background.at(Instant::now(), move || again(own));
        }
        let background = Background::start().unwrap();
        let (stream, mut peer) = pair();
        again(Arc::clone(&background));
        let bytes = vec![1; 16 << 20];
        let deadline = Instant::now() + BOUND;
        let (sender, done) = channel();
        let then = Box::new(move |result: io::Result<()>| sender.send(result.is_ok()).unwrap());
        background.send(Unsent { stream, bytes, deadline, stall_limit: BOUND, then });
        let reader = std::thread::spawn(move || peer.read_exact(&mut vec![0; 16 << 20]));
        let result = done.recv_timeout(Duration::from_secs(5));
        background.stop();
        assert_eq!(result, Ok(true));
        drop(reader);
    }
}
