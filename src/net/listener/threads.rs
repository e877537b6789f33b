//! How many threads a listener has: those that serve connections, and those that wait for one.
//!
//! A few wait, so that a connection is served at once. But waking one of them is most of what a short
//! connection costs, and is not needed where such come and go all the time: a thread that has just
//! seen the end of one finds the next in the backlog, and need not sleep. So while connections come
//! and go quickly nobody is kept waiting, and a keeper looks every [`LOOK`] whether the threads are
//! too few or too many for that.

use std::time::{Duration, Instant};

/// As long as fewer than these wait, each that gets a connection has another one begin; while
/// connections come and go quickly, only if these are stuck.
const MIN_WAITING: usize = 4;

/// A thread that finds this many waiting when its connection ends is not needed and ends too.
const MAX_WAITING: usize = 128;

/// While connections come and go quickly, the keeper looks this often: it takes one percent of a
/// core (measured), and a connection that finds all threads held waits hardly longer.
pub const LOOK: Duration = Duration::from_millis(1);

/// They do when this many of them end within [`BUSY_TIME`].
const BUSY_COUNT: u64 = 64;
const BUSY_TIME: Duration = Duration::from_millis(40);

/// They no longer do when fewer than these end within so many looks.
const CALM_COUNT: u64 = 50;
const CALM_LOOKS: usize = 100;

/// A connection that has been open for this many looks is not one of those.
const SHORT_LIVED: usize = 16;

/// When so many looks in a row find threads too few or too many, that is no chance.
const PATIENCE: u32 = 4;

/// So many threads per core keep it busy with short connections, unless they have to wait for others
/// than themselves. (Measured with 64 clients on 2 cores: from 9 to 31 the rates are within 6 %, and
/// the longest times grow with the number.)
const ENOUGH_PER_CORE: usize = 24;

/// A count of threads, and the rule by which they become more or fewer.
#[derive(Debug, Default)]
pub struct Threads {
    /// Serving and waiting together.
    limit: usize,
    /// So many that serve short-lived connections are enough, unless these are held.
    enough: usize,
    serving: usize,
    waiting: usize,
    /// Connections that were taken so far, and those of them that have ended.
    accepted: u64,
    ended: u64,
    /// When the latest connection ended whose number is a multiple of [`BUSY_COUNT`].
    marked: Option<Instant>,
    /// Connections come and go quickly.
    is_busy: bool,
    looks: usize,
    /// The counts at the latest look, and at the latest multiple of [`CALM_LOOKS`].
    accepted_before: u64,
    ended_before: u64,
    /// Open connections by the look before which they were taken; the places are used in a circle.
    short_lived: [usize; SHORT_LIVED],
    /// Hardly one of these ends: all threads may soon be held by such as do not.
    are_stuck: bool,
    /// More than enough threads serve these, and are soon done with them.
    are_plenty: bool,
    /// Looks in a row that found too few threads, or too many.
    too_few: u32,
    too_many: u32,
    /// Of those that wait, so many sleep because `accept` failed.
    paused: usize,
    /// So many are to end after their connections, as long as others wait or are plenty.
    unneeded: usize,
}

/// The number of the look before which a connection was taken.
#[derive(Debug, Clone, Copy)]
pub struct Taken(usize);

impl Threads {
    /// None yet, and never more than `limit`, on so many cores.
    pub fn new(limit: usize, cores: usize) -> Self {
        Threads { limit, enough: ENOUGH_PER_CORE * cores, ..Threads::default() }
    }

    /// Connections that were taken so far.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Whether the keeper is to look.
    pub fn is_busy(&self) -> bool {
        self.is_busy
    }

    /// So many begin to wait that a few do. They are to be started.
    pub fn refill(&mut self) -> usize {
        let lacking = self.lacking();
        self.waiting += lacking;
        lacking
    }

    /// One that waited, or was to, has ended.
    pub fn end(&mut self) {
        self.waiting -= 1;
    }

    /// One that waits sleeps: `accept` failed.
    pub fn pause(&mut self) {
        self.paused += 1;
    }

    /// It sleeps no longer.
    pub fn resume(&mut self) {
        self.paused -= 1;
    }

    /// One that waited has a connection. Says whether another is to begin to wait.
    pub fn take(&mut self) -> (Taken, bool) {
        self.waiting -= 1;
        self.serving += 1;
        self.accepted += 1;
        self.short_lived[self.looks % SHORT_LIVED] += 1;
        let is_another_to_begin = (!self.is_busy || self.are_stuck) && self.lacking() > 0;
        self.waiting += usize::from(is_another_to_begin);
        (Taken(self.looks), is_another_to_begin)
    }

    /// A connection has ended. Says whether its thread is to wait for another.
    pub fn release(&mut self, taken: Taken, now: impl FnOnce() -> Instant) -> bool {
        self.serving -= 1;
        self.ended += 1;
        if self.looks - taken.0 < SHORT_LIVED {
            self.short_lived[taken.0 % SHORT_LIVED] -= 1;
        }
        if self.ended.is_multiple_of(BUSY_COUNT) {
            let now = now();
            let before = self.marked.replace(now);
            if !self.is_busy && before.is_some_and(|before| now - before < BUSY_TIME) {
                self.become_busy();
            }
        }
        let is_last = self.waiting == 0 && !self.are_plenty;
        let is_needed = is_last || (self.waiting < MAX_WAITING && self.unneeded == 0);
        self.unneeded = self.unneeded.saturating_sub(1);
        self.waiting += usize::from(is_needed);
        is_needed
    }

    /// What was counted in a calm time says nothing, and who was taken then is not short-lived.
    fn become_busy(&mut self) {
        self.is_busy = true;
        self.looks += SHORT_LIVED;
        self.short_lived = [0; SHORT_LIVED];
        (self.too_few, self.too_many) = (0, 0);
    }

    /// Whether one that has waited for long is to go on.
    pub fn is_needed(&self) -> bool {
        self.waiting <= MIN_WAITING
    }

    /// The keeper's look, told whether a connection is in the backlog. Says how many are to begin to
    /// wait.
    pub fn look(&mut self, is_backlogged: bool) -> usize {
        let wanted = self.count_wanted(is_backlogged);
        self.waiting += wanted;
        wanted
    }

    fn count_wanted(&mut self, is_backlogged: bool) -> usize {
        let taken = usize::try_from(self.accepted - self.accepted_before).unwrap_or(usize::MAX);
        self.accepted_before = self.accepted;
        self.looks += 1;
        self.short_lived[self.looks % SHORT_LIVED] = 0;
        if self.looks.is_multiple_of(CALM_LOOKS) {
            self.is_busy = self.ended - self.ended_before >= CALM_COUNT;
            self.ended_before = self.ended;
            if !self.is_busy {
                (self.are_stuck, self.are_plenty, self.unneeded) = (false, false, 0);
                return self.lacking();
            }
        }
        if self.paused > 0 {
            // More of them would only fail as well, and these may soon be needed.
            (self.too_few, self.too_many, self.unneeded) = (0, 0, 0);
            return 0;
        }

        // A connection is open for so many looks, in the mean, as are open for each that is taken.
        let short_lived: usize = self.short_lived.iter().sum();
        let is_soon_over = 2 * short_lived <= taken.saturating_mul(3);
        self.are_stuck = is_backlogged && short_lived >= taken.saturating_mul(4);

        let excess = if is_soon_over { short_lived.saturating_sub(self.enough) } else { 0 };
        self.are_plenty = excess > 0;
        let are_too_many = (self.waiting > 0 && !is_backlogged) || self.are_plenty;
        self.too_many = if are_too_many { self.too_many + 1 } else { 0 };
        let is_one_to_end = are_too_many && self.too_many.is_multiple_of(PATIENCE);
        self.unneeded = if is_one_to_end { (self.waiting.max(excess) / 2).max(1) } else { 0 };

        let are_too_few = is_backlogged && self.waiting == 0;
        self.too_few = if are_too_few { self.too_few + 1 } else { 0 };
        let is_one_to_begin = are_too_few && self.too_few.is_multiple_of(PATIENCE);
        if self.are_stuck {
            self.lacking()
        } else if is_one_to_begin && (short_lived < self.enough || !is_soon_over) {
            self.lacking().min(1)
        } else {
            0
        }
    }

    /// How many more are to wait where connections do not come and go quickly.
    fn lacking(&self) -> usize {
        let threads = self.serving + self.waiting;
        MIN_WAITING.saturating_sub(self.waiting).min(self.limit.saturating_sub(threads))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Threads that do as they are told, and the connections they have, the oldest first.
    struct Listener {
        threads: Threads,
        open: VecDeque<Taken>,
        now: Instant,
    }

    impl Listener {
        fn new(limit: usize) -> Self {
            let mut threads = Threads::new(limit, 2);
            threads.refill();
            Listener { threads, open: VecDeque::new(), now: Instant::now() }
        }

        /// A connection comes, and is taken if a thread waits.
        fn connect(&mut self) {
            if self.threads.waiting > 0 {
                self.open.push_back(self.threads.take().0);
            }
        }

        fn connect_until_nobody_waits(&mut self) {
            while self.threads.waiting > 0 {
                self.connect();
            }
        }

        /// A connection comes and ends, beside those that are open.
        fn come_and_go_beside(&mut self) {
            self.connect();
            let latest = self.open.pop_back().expect("a thread has waited");
            self.threads.release(latest, || self.now);
        }

        /// The oldest connection ends.
        fn end(&mut self) {
            if let Some(taken) = self.open.pop_front() {
                self.threads.release(taken, || self.now);
            }
        }

        /// So much time in which so many connections end and others come.
        fn come_and_go(&mut self, count: usize, time: Duration) {
            for _ in 0..count {
                self.now += time / u32::try_from(count).unwrap();
                self.end();
                self.connect();
            }
        }

        /// So many clients, each of which connects again as soon as it was served.
        fn busy_with(clients: usize) -> Self {
            let mut listener = Listener::new(1000);
            (0..clients).for_each(|_| listener.connect());
            listener.come_and_go(2 * usize::try_from(BUSY_COUNT).unwrap(), BUSY_TIME);
            assert!(listener.threads.is_busy());
            listener
        }
    }

    #[test]
    fn somebody_always_waits_until_the_limit_is_reached() {
        let mut listener = Listener::new(10);
        for open in 1..=10 {
            listener.connect();
            assert_eq!(listener.open.len(), open);
        }
        assert_eq!((listener.threads.serving, listener.threads.waiting), (10, 0));
    }

    #[test]
    fn connections_that_come_and_go_slowly_leave_the_keeper_asleep() {
        let mut listener = Listener::new(100);
        (0..8).for_each(|_| listener.connect());
        listener.come_and_go(1000, 1000 * LOOK);
        assert!(!listener.threads.is_busy());
    }

    #[test]
    fn nobody_is_kept_waiting_while_connections_come_and_go_quickly() {
        let mut listener = Listener::busy_with(8);
        assert!(listener.threads.waiting > 1);
        for _ in 0..100 {
            listener.come_and_go(40, LOOK);
            assert_eq!(listener.threads.look(false), 0);
        }
        assert_eq!((listener.threads.serving, listener.threads.waiting), (8, 0));
    }

    #[test]
    fn nobody_ends_while_connections_are_left_in_the_backlog() {
        let mut listener = Listener::busy_with(8);
        let threads = listener.threads.serving + listener.threads.waiting;
        for _ in 0..100 {
            listener.come_and_go(40, LOOK);
            assert_eq!(listener.threads.look(true), 0);
        }
        assert_eq!(listener.threads.serving + listener.threads.waiting, threads);
    }

    #[test]
    fn one_is_added_where_connections_are_left_in_the_backlog_for_some_time() {
        let mut listener = Listener::busy_with(8);
        listener.connect_until_nobody_waits();
        let threads = listener.threads.serving;
        for _ in 0..PATIENCE {
            assert_eq!(listener.threads.serving + listener.threads.waiting, threads);
            listener.come_and_go(40, LOOK);
            listener.threads.look(true);
        }
        assert_eq!(listener.threads.serving + listener.threads.waiting, threads + 1);
    }

    #[test]
    fn threads_are_more_than_keep_the_cores_busy_only_while_connections_are_held() {
        let mut listener = Listener::busy_with(8);
        let mut threads_with = |ended_at_each_look| {
            for _ in 0..1000 {
                listener.connect();
                listener.come_and_go(ended_at_each_look, LOOK);
                listener.threads.look(true);
            }
            listener.threads.serving
        };
        let enough = ENOUGH_PER_CORE * 2;
        assert!((enough..=enough + 1).contains(&threads_with(100)));
        assert!(threads_with(25) > 2 * enough);
        assert!((enough..=enough + 1).contains(&threads_with(1000)));
    }

    #[test]
    fn connections_that_stay_open_say_nothing_about_those_that_come_and_go() {
        let mut listener = Listener::busy_with(8);
        (0..500).for_each(|_| {
            listener.threads.look(true);
            listener.connect();
        });
        let open = listener.open.len();
        assert!(open > 100);
        for _ in 0..100 {
            for _ in 0..40 {
                listener.come_and_go_beside();
            }
            listener.threads.look(false);
        }
        let threads = listener.threads.serving + listener.threads.waiting;
        assert!(threads <= open + 2, "{threads} threads, {open} connections that stay open");
    }

    #[test]
    fn connections_that_do_not_end_are_served_at_once_though_others_came_and_went() {
        let mut listener = Listener::busy_with(8);
        listener.connect_until_nobody_waits();
        // All threads are held, and one connection waits.
        assert!(listener.threads.look(true) + listener.threads.look(true) > 0);
        for open in listener.open.len() + 1..500 {
            listener.connect();
            assert_eq!(listener.open.len(), open);
        }
    }

    #[test]
    fn while_accept_fails_threads_become_neither_more_nor_fewer() {
        let mut listener = Listener::busy_with(8);
        (0..listener.threads.waiting).for_each(|_| listener.threads.pause());
        let threads = listener.threads.serving + listener.threads.waiting;
        for is_backlogged in [true, false].repeat(10) {
            listener.come_and_go(40, LOOK);
            assert_eq!(listener.threads.look(is_backlogged), 0);
        }
        assert_eq!(listener.threads.serving + listener.threads.waiting, threads);
    }

    #[test]
    fn connections_of_a_calm_time_are_not_taken_for_short_lived() {
        let mut listener = Listener::new(1000);
        (0..500).for_each(|_| listener.connect());
        for _ in 0..2 * BUSY_COUNT {
            listener.come_and_go_beside();
        }
        assert!(listener.threads.is_busy());
        listener.threads.look(false);
        assert_eq!(listener.threads.short_lived.iter().sum::<usize>(), 0);
        assert!(!listener.threads.are_plenty);
    }

    #[test]
    fn the_only_thread_stays() {
        let mut listener = Listener::busy_with(1);
        for _ in 0..100 {
            listener.come_and_go(10, LOOK);
            listener.threads.look(false);
            assert_eq!(listener.open.len(), 1);
        }
        listener.end();
        assert_eq!(listener.threads.waiting, 1);
    }

    #[test]
    fn when_it_is_calm_again_a_few_wait_again() {
        let mut listener = Listener::busy_with(8);
        listener.connect_until_nobody_waits();
        let looks = (0..2 * CALM_LOOKS).take_while(|_| {
            listener.threads.look(true);
            listener.threads.is_busy()
        });
        assert!(looks.count() < 2 * CALM_LOOKS);
        assert_eq!(listener.threads.waiting, MIN_WAITING);
        assert!(!listener.threads.are_stuck);
    }

    #[test]
    fn of_a_crowd_that_has_gone_not_all_wait() {
        let mut listener = Listener::new(1000);
        (0..500).for_each(|_| listener.connect());
        for _ in 0..500 {
            listener.now += BUSY_TIME;
            listener.end();
        }
        assert_eq!(listener.threads.waiting, MAX_WAITING);
    }

    proptest! {
        #[test]
        fn threads_are_never_more_than_the_limit_and_never_lost(
            limit in 1..20_usize,
            steps in prop::collection::vec((0..4_usize, any::<bool>(), 0..80_usize), 0..200),
        ) {
            let mut listener = Listener::new(limit);
            for (step, is_backlogged, count) in steps {
                match step {
                    0 => listener.connect(),
                    1 => listener.end(),
                    2 => listener.come_and_go(count.max(1), LOOK),
                    _ => drop(listener.threads.look(is_backlogged)),
                }
                let threads = &listener.threads;
                prop_assert_eq!(threads.serving, listener.open.len());
                prop_assert!((1..=limit).contains(&(threads.serving + threads.waiting)));
                prop_assert!(threads.short_lived.iter().sum::<usize>() <= threads.serving);
            }
            // However busy it was, who comes now is served after two looks, if there is room.
            if listener.threads.waiting == 0 && listener.open.len() < limit {
                listener.threads.is_busy = true;
                let wanted = listener.threads.look(true) + listener.threads.look(true);
                prop_assert!(wanted > 0);
            }
        }
    }
}
