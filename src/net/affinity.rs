//! Threads that run where their packets come in.
//!
//! Most of what a message costs is waking threads, and to wake one on another CPU costs several
//! times what it costs on the same one. The kernel says on which CPU it received a connection's
//! packets: for a client on this host the client's own, for one elsewhere that of the network
//! card's queue. So a thread moves there from time to time. It is moved, not bound: where the
//! scheduler moves it away again each time, the thread asks for it less and less often.

#[cfg(target_os = "linux")]
use rustix::thread::CpuSet;

/// Bursts of packets from one look at where a thread runs to the next. A move takes some 50 us (on a
/// virtual machine with two CPUs), which is little for so many, and few looks find one needed.
const FEW: u32 = 32;

/// As [`FEW`], where the scheduler has moved the thread away each time.
const MANY: u32 = FEW << 8;

/// Moves the thread that uses it.
#[derive(Debug)]
pub struct Follower {
    /// Bursts until the next look.
    left: u32,
    /// What `left` began with.
    pause: u32,
    /// The last look found it elsewhere, and it was moved.
    moved: bool,
}

impl Default for Follower {
    fn default() -> Self {
        Follower { left: FEW, pause: FEW, moved: false }
    }
}

impl Follower {
    /// A burst of packets has come, for which the thread should run on the CPU that `wanted` gives.
    pub fn follow(&mut self, wanted: impl FnOnce() -> Option<usize>) {
        self.left -= 1;
        if self.left > 0 {
            return;
        }
        let elsewhere = wanted().filter(|wanted| *wanted != current_cpu());
        self.pause = match elsewhere {
            Some(_) if self.moved => (2 * self.pause).min(MANY),
            _ => FEW,
        };
        self.left = self.pause;
        self.moved = elsewhere.is_some_and(move_to);
    }
}

/// The CPU that this thread runs on; where the system does not say, all are one.
pub fn current_cpu() -> usize {
    #[cfg(target_os = "linux")]
    return rustix::thread::sched_getcpu();
    #[cfg(not(target_os = "linux"))]
    0
}

/// The CPU on which the kernel received a connection's latest packet.
pub fn incoming_cpu(stream: &std::net::TcpStream) -> Option<usize> {
    #[cfg(target_os = "linux")]
    return rustix::net::sockopt::socket_incoming_cpu(stream).ok()?.try_into().ok();
    #[cfg(not(target_os = "linux"))]
    None
}

/// Moves this thread there, if it may run there.
#[cfg(target_os = "linux")]
fn move_to(cpu: usize) -> bool {
    use rustix::thread::{sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else { return false };
    if cpu >= CpuSet::MAX_CPU || !allowed.is_set(cpu) {
        return false;
    }
    let mut only = CpuSet::new();
    only.set(cpu);
    // The first call moves it, the second lets the scheduler move it again.
    sched_setaffinity(None, &only).is_ok() && sched_setaffinity(None, &allowed).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn move_to(_: usize) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use rustix::thread::{sched_getaffinity, sched_setaffinity};

    use super::*;

    fn allowed() -> Vec<usize> {
        let allowed = sched_getaffinity(None).unwrap();
        (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect()
    }

    /// Bursts until the follower looks again.
    fn next_look(follower: &mut Follower, wanted: usize) -> u32 {
        let mut bursts = 0;
        let mut looked = false;
        while !looked {
            bursts += 1;
            follower.follow(|| {
                looked = true;
                Some(wanted)
            });
        }
        bursts
    }

    fn other_than_here(cpus: &[usize]) -> usize {
        let here = current_cpu();
        *cpus.iter().find(|cpu| **cpu != here).unwrap_or(&here)
    }

    #[test]
    fn a_thread_moves_to_where_it_is_wanted_and_is_not_bound_to_it() {
        let cpus = allowed();
        // Twice, so that it has to move wherever it begins.
        for &cpu in cpus.iter().chain(&cpus) {
            // The scheduler may move it away again at any moment, but not each time.
            let arrives = (0..100).any(|_| {
                next_look(&mut Follower::default(), cpu);
                current_cpu() == cpu
            });
            assert!(arrives, "never seen on CPU {cpu} of {cpus:?}");
            assert_eq!(allowed(), cpus);
        }
    }

    #[test]
    fn a_thread_that_is_moved_away_each_time_is_asked_less_often() {
        let cpus = allowed();
        if cpus.len() == 1 {
            return;
        }
        let mut follower = Follower::default();
        let mut pauses = [0; 40];
        for pause in &mut pauses {
            // Wherever it was moved to is wrong again by now, if the scheduler did not put it there.
            *pause = next_look(&mut follower, other_than_here(&cpus));
        }
        assert_eq!(pauses[0], FEW);
        assert!(pauses.iter().all(|pause| (FEW..=MANY).contains(pause)), "{pauses:?}");
        assert!(pauses.contains(&(FEW << 3)), "{pauses:?}");
        next_look(&mut follower, usize::MAX);
        let at_home = (0..100).any(|_| {
            next_look(&mut follower, current_cpu());
            next_look(&mut follower, current_cpu()) == FEW
        });
        assert!(at_home, "still asked rarely: {follower:?}");
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
                next_look(&mut follower, wanted);
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
