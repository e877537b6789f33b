//! Moves a connection's thread to the CPU that receives its packets.
//!
//! Most of a message's cost is waking threads, and waking one on another CPU costs several times as
//! much as on the same one. The kernel reports the CPU that received a connection's packets: the
//! client's own if the client is on this host, else that of the network card's queue. So a thread
//! checks from time to time, and moves there. It is not pinned: if the scheduler moves it away each
//! time, the thread backs off.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Returns the CPU that this thread runs on.
pub use rustix::thread::sched_getcpu as current_cpu;

/// Bursts of packets between two checks. A move takes about 50 us (on a virtual machine with two
/// CPUs), little for that many bursts, and few checks lead to one.
const MIN_INTERVAL: u32 = 32;

/// The interval at the end of the back-off.
const MAX_INTERVAL: u32 = MIN_INTERVAL << 8;

/// Moves the calling thread to its packets.
#[derive(Debug)]
pub struct Follower {
    /// Bursts until the next check.
    remaining: u32,
    /// Bursts between two checks.
    interval: u32,
    /// Whether the last check moved the thread.
    moved: bool,
}

impl Default for Follower {
    fn default() -> Self {
        Follower { remaining: MIN_INTERVAL, interval: MIN_INTERVAL, moved: false }
    }
}

impl Follower {
    /// Counts a burst of packets. When a check is due, moves the thread to the CPU that `wanted`
    /// returns.
    pub fn follow(&mut self, wanted: impl FnOnce() -> Option<usize>) {
        self.remaining -= 1;
        if self.remaining > 0 {
            return;
        }
        let target = wanted().filter(|wanted| *wanted != current_cpu());
        self.interval = match target {
            Some(_) if self.moved => (2 * self.interval).min(MAX_INTERVAL),
            _ => MIN_INTERVAL,
        };
        self.remaining = self.interval;
        self.moved = target.is_some_and(move_to);
    }
}

/// Returns the CPU that received the connection's latest packet.
pub fn incoming_cpu(stream: &std::net::TcpStream) -> Option<usize> {
    rustix::net::sockopt::socket_incoming_cpu(stream).ok()?.try_into().ok()
}

/// Moves this thread to a CPU, if its affinity mask allows that. Returns whether it did.
fn move_to(cpu: usize) -> bool {
    let Ok(allowed) = sched_getaffinity(None) else { return false };
    if cpu >= CpuSet::MAX_CPU || !allowed.is_set(cpu) {
        return false;
    }
    let mut only = CpuSet::new();
    only.set(cpu);
    // The first call moves the thread, the second restores its mask.
    sched_setaffinity(None, &only).is_ok() && sched_setaffinity(None, &allowed).is_ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use super::*;

    fn allowed() -> Vec<usize> {
        let allowed = sched_getaffinity(None).unwrap();
        (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect()
    }

    /// Returns the bursts until the follower's next check.
    fn next_check(follower: &mut Follower, wanted: usize) -> u32 {
        let mut bursts = 0;
        let mut checked = false;
        while !checked {
            bursts += 1;
            follower.follow(|| {
                checked = true;
                Some(wanted)
            });
        }
        bursts
    }

    fn another_cpu(cpus: &[usize]) -> usize {
        let here = current_cpu();
        *cpus.iter().find(|cpu| **cpu != here).unwrap_or(&here)
    }

    #[test]
    fn a_thread_moves_to_where_it_is_wanted_and_is_not_bound_to_it() {
        let cpus = allowed();
        // Twice, so that the thread has to move wherever it starts.
        for &cpu in cpus.iter().chain(&cpus) {
            // The scheduler may move the thread away at any moment, but not every time.
            let arrives = (0..100).any(|_| {
                next_check(&mut Follower::default(), cpu);
                current_cpu() == cpu
            });
            assert!(arrives, "never seen on CPU {cpu} of {cpus:?}");
            assert_eq!(allowed(), cpus);
        }
    }

    #[test]
    fn a_thread_that_is_moved_away_each_time_checks_less_often() {
        let cpus = allowed();
        if cpus.len() == 1 {
            return;
        }
        let mut follower = Follower::default();
        let mut intervals = [0; 40];
        for interval in &mut intervals {
            // Always another CPU, as if the scheduler had moved the thread away.
            *interval = next_check(&mut follower, another_cpu(&cpus));
        }
        let allowed = MIN_INTERVAL..=MAX_INTERVAL;
        assert_eq!(intervals[0], MIN_INTERVAL);
        assert!(intervals.iter().all(|interval| allowed.contains(interval)), "{intervals:?}");
        assert!(intervals.contains(&(MIN_INTERVAL << 3)), "{intervals:?}");
        next_check(&mut follower, usize::MAX);
        let has_recovered = (0..100).any(|_| {
            next_check(&mut follower, current_cpu());
            next_check(&mut follower, current_cpu()) == MIN_INTERVAL
        });
        assert!(has_recovered, "it still checks rarely: {follower:?}");
    }

    /// Runs `work` in a thread of its own, bound to one CPU.
    fn bound_to<T: Send + 'static>(cpu: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
        let bound = thread::spawn(move || {
            let mut only = CpuSet::new();
            only.set(cpu);
            sched_setaffinity(None, &only).unwrap();
            work()
        });
        bound.join().unwrap()
    }

    #[test]
    fn a_thread_stays_among_the_cpus_that_it_may_run_on() {
        let cpus = allowed();
        let (first, last) = (cpus[0], *cpus.last().unwrap());
        bound_to(first, move || {
            for wanted in [last, CpuSet::MAX_CPU, usize::MAX] {
                let mut follower = Follower::default();
                next_check(&mut follower, wanted);
                assert!(!follower.moved);
                assert_eq!(allowed(), [first]);
            }
        });
    }

    #[test]
    fn a_packet_comes_in_where_its_sender_runs() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        for cpu in allowed() {
            let mut client = client.try_clone().unwrap();
            bound_to(cpu, move || client.write_all(b"x").unwrap());
            stream.read_exact(&mut [0]).unwrap();
            assert_eq!(incoming_cpu(&stream), Some(cpu));
        }
    }
}
