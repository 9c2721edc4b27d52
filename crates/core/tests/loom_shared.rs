//! Models of the shared channel's ring, block pool and parking: every interleaving is tried.
//!
//! The sources are the channel's own, compiled here against loom's atomics. The words lie in plain
//! vectors, and the bytes of a message are a cell each that loom watches for races.
#![cfg(loom)]

// What the sources name `crate::sync`.
use moirai_core::sync;
#[allow(dead_code)]
#[path = "../src/channel/shared/blocks.rs"]
mod blocks;
#[allow(dead_code)]
#[path = "../src/channel/shared/gate.rs"]
mod gate;
#[allow(dead_code)]
#[path = "../src/channel/shared/ring.rs"]
mod ring;
#[allow(dead_code)]
#[path = "../src/channel/shared/word.rs"]
mod word;

use blocks::{Blocks, Run};
use gate::Gate;
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use ring::{Front, Positions, Record, Ring};
use word::State;

struct Shared {
    positions: Positions,
    words: Vec<AtomicU64>,
    bytes: Vec<UnsafeCell<u64>>,
}

// SAFETY: the cells are only touched by whoever claimed or took the record; loom checks it.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(count: usize) -> Arc<Self> {
        Arc::new(Shared {
            positions: Positions::default(),
            words: (0..count).map(|_| AtomicU64::new(0)).collect(),
            bytes: (0..count).map(|_| UnsafeCell::new(0)).collect(),
        })
    }

    fn ring(&self) -> Ring<'_> {
        Ring::new(&self.positions, &self.words)
    }

    fn send(&self, owner: usize, value: u64) -> bool {
        let Ok(record) = self.ring().claim(0, owner, 8) else {
            return false;
        };
        // SAFETY: claimed.
        self.bytes[self.ring().index_of(record)].with_mut(|place| unsafe { *place = value });
        self.ring().publish(record);
        true
    }

    fn take(&self, owner: usize) -> Option<Record> {
        loop {
            let Front::Data(found) = self.ring().front() else {
                return None;
            };
            if let Some(record) = self.ring().take(found, owner) {
                return Some(record);
            }
        }
    }

    fn receive(&self, owner: usize) -> Option<u64> {
        let record = self.take(owner)?;
        // SAFETY: taken.
        let value = self.bytes[self.ring().index_of(record)].with(|place| unsafe { *place });
        self.ring().release(record);
        Some(value)
    }
}

fn bounded(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn two_senders_and_a_receiver_lose_and_double_nothing() {
    bounded(3, || {
        let shared = Shared::new(2);
        let senders: Vec<_> = (0..2)
            .map(|owner| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.send(owner, owner as u64 + 1))
            })
            .collect();
        let mut found: Vec<u64> = shared.receive(5).into_iter().collect();
        for sender in senders {
            assert!(sender.join().unwrap(), "there was room for both");
        }
        found.extend(std::iter::from_fn(|| shared.receive(5)));
        found.sort_unstable();
        assert_eq!(found, [1, 2]);
    });
}

#[test]
fn two_receivers_share_what_one_sends_over_the_end_of_the_ring() {
    bounded(2, || {
        let shared = Shared::new(2);
        assert!(shared.send(0, 1));
        let receivers: Vec<_> = (1..3)
            .map(|owner| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.receive(owner))
            })
            .collect();
        let mut sent = vec![1];
        for value in [2, 3] {
            if shared.send(0, value) {
                sent.push(value);
            }
        }
        let mut found: Vec<u64> = receivers
            .into_iter()
            .filter_map(|receiver| receiver.join().unwrap())
            .collect();
        assert!(!found.is_empty(), "one was there from the beginning");
        found.extend(std::iter::from_fn(|| shared.receive(1)));
        found.sort_unstable();
        assert_eq!(found, sent);
    });
}

#[test]
fn room_is_used_again_only_after_it_was_read() {
    bounded(3, || {
        let shared = Shared::new(1);
        assert!(shared.send(0, 1));
        let sender = {
            let shared = Arc::clone(&shared);
            // Loom reports a race if this writes to what the receiver still reads.
            thread::spawn(move || shared.send(0, 2))
        };
        assert_eq!(shared.receive(1), Some(1));
        let sent = sender.join().unwrap();
        assert_eq!(shared.receive(1), sent.then_some(2));
    });
}

/// A sender died between its claim and its message; one process skips the claim while another
/// sends and a third receives.
#[test]
fn a_dead_claim_is_skipped_and_nothing_else_is() {
    bounded(3, || {
        let shared = Shared::new(4);
        shared.ring().claim(0, 7, 8).unwrap(); // and dies
        let sender = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || assert!(shared.send(0, 1)))
        };
        let reaper = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let ring = shared.ring();
                ring.walk(|record| {
                    if record.word.owner() == 7 && record.word.state() == Some(State::Claimed) {
                        assert!(ring.skip_claim(record));
                    }
                });
            })
        };
        let early = shared.receive(1);
        sender.join().unwrap();
        reaper.join().unwrap();
        let found: Vec<u64> = early.into_iter().chain(shared.receive(1)).collect();
        assert_eq!(found, [1]);
        assert_eq!(shared.ring().front(), Front::Empty);
    });
}

/// A receiver died with a record in its hands, and with the head not moved on, or moved.
#[test]
fn a_record_that_a_dead_receiver_took_makes_room_again() {
    bounded(3, || {
        let shared = Shared::new(1);
        assert!(shared.send(0, 1));
        shared.take(7).unwrap(); // and dies
        let sender = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.send(0, 2))
        };
        let ring = shared.ring();
        ring.walk(|record| {
            if record.word.owner() == 7 && record.word.state() == Some(State::Taken) {
                assert!(ring.finish_taken(record));
            }
        });
        let sent = sender.join().unwrap() || shared.send(0, 2);
        assert!(sent);
        assert_eq!(shared.receive(1), Some(2));
    });
}

struct Pool {
    units: Vec<AtomicU64>,
    turns: AtomicU32,
    out: Vec<AtomicBool>,
}

impl Pool {
    fn new(count: usize) -> Arc<Self> {
        Arc::new(Pool {
            units: (0..count).map(|_| AtomicU64::new(0)).collect(),
            turns: AtomicU32::new(0),
            out: (0..count).map(|_| AtomicBool::new(false)).collect(),
        })
    }

    fn blocks(&self) -> Blocks<'_> {
        Blocks::new(&self.units, &self.turns)
    }

    fn claim(&self, count: usize, owner: usize) -> Option<Run> {
        let run = self.blocks().claim(count, owner)?.run;
        for at in run.start..run.start + count {
            assert!(
                !self.out[at].swap(true, Ordering::SeqCst),
                "unit {at} twice"
            );
        }
        Some(run)
    }

    fn free(&self, run: Run) {
        for at in run.start..run.start + run.count {
            self.out[at].store(false, Ordering::SeqCst);
        }
        self.blocks().free(run);
    }
}

#[test]
fn runs_never_overlap_and_all_come_back() {
    bounded(2, || {
        let pool = Pool::new(3);
        let threads: Vec<_> = [1, 2]
            .into_iter()
            .map(|count| {
                let pool = Arc::clone(&pool);
                thread::spawn(move || {
                    if let Some(run) = pool.claim(count, count) {
                        pool.free(run);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(pool.blocks().used_count(), 0);
        assert!(pool.claim(3, 1).is_some());
    });
}

/// What a dead process had is given back while another claims; a run that a message carries stays.
#[test]
fn the_dead_give_back_what_no_message_carries() {
    bounded(3, || {
        let pool = Pool::new(3);
        let carried = pool.blocks().claim(1, 7).unwrap().run;
        pool.blocks().claim(2, 7).unwrap(); // and dies
        let other = {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.claim(1, 1))
        };
        let freed = pool.blocks().reap(7, |run| run == carried);
        assert_eq!(freed, 1);
        let claimed = other.join().unwrap();
        assert!(claimed.is_none_or(|run| run.start != carried.start));
        assert!(pool.blocks().is_out(carried));
        assert!(pool.blocks().transfer(carried, 2));
        pool.blocks().free(carried);
        if let Some(run) = claimed {
            pool.free(run);
        }
        assert_eq!(pool.blocks().used_count(), 0);
    });
}

/// Whoever claims a run whose memory was given back is told; who is not told finds it there.
#[test]
fn no_run_is_written_without_memory_behind_it() {
    bounded(3, || {
        let pool = Pool::new(2);
        let is_there = Arc::new([AtomicBool::new(true), AtomicBool::new(true)]);
        let other = {
            let (pool, is_there) = (Arc::clone(&pool), Arc::clone(&is_there));
            thread::spawn(move || {
                let mut next = Some(0);
                while let Some(from) = next {
                    next = pool.blocks().hollow(from, 1, 1, |run| {
                        is_there[run.start].store(false, Ordering::SeqCst);
                        true
                    });
                }
            })
        };
        for count in [1, 2] {
            let Some(claim) = pool.blocks().claim(count, 2) else {
                continue;
            };
            for at in claim.run.start..claim.run.start + count {
                if claim.is_hollow {
                    is_there[at].store(true, Ordering::SeqCst);
                }
                assert!(is_there[at].load(Ordering::SeqCst), "unit {at} is missing");
            }
            pool.free(claim.run);
        }
        other.join().unwrap();
        let claim = pool.blocks().claim(2, 2).expect("all came back");
        let all = is_there.iter().all(|unit| unit.load(Ordering::SeqCst));
        assert!(claim.is_hollow || all);
    });
}

/// A futex: sleeps only while the word is as expected, which a wake cannot miss.
struct Futex {
    sleepers: Mutex<usize>,
    condition: Condvar,
}

impl Futex {
    fn new() -> Self {
        Futex {
            sleepers: Mutex::new(0),
            condition: Condvar::new(),
        }
    }

    fn wait(&self, word: &AtomicU32, expected: u32) {
        let mut sleepers = self.sleepers.lock().unwrap();
        if word.load(Ordering::SeqCst) == expected {
            *sleepers += 1;
            let before = *sleepers;
            // Woken ones are taken off by the waker.
            while *sleepers >= before {
                sleepers = self.condition.wait(sleepers).unwrap();
            }
        }
    }

    fn wake_one(&self) -> bool {
        let mut sleepers = self.sleepers.lock().unwrap();
        if *sleepers == 0 {
            return false;
        }
        *sleepers -= 1;
        self.condition.notify_all();
        true
    }
}

/// One side does something twice, the other waits for each; loom reports a deadlock if a wake is lost.
#[test]
fn a_wake_is_never_lost() {
    bounded(3, || {
        let gate = Arc::new(Gate::new());
        let futex = Arc::new(Futex::new());
        let work = Arc::new(AtomicU32::new(0));
        let waiter = {
            let (gate, futex, work) = (Arc::clone(&gate), Arc::clone(&futex), Arc::clone(&work));
            thread::spawn(move || {
                for wanted in [1, 2] {
                    while work.load(Ordering::Acquire) < wanted {
                        let count = gate.announce();
                        if work.load(Ordering::Acquire) < wanted {
                            futex.wait(gate.word(), count);
                        }
                    }
                }
            })
        };
        for _ in 0..2 {
            work.fetch_add(1, Ordering::Release);
            if gate.is_waited_at() {
                gate.wake(|_| futex.wake_one());
            }
        }
        waiter.join().unwrap();
    });
}

/// Two wait, two messages come, from two sides: both are woken.
#[test]
fn each_of_two_waiters_gets_its_message() {
    bounded(2, || {
        let gate = Arc::new(Gate::new());
        let futex = Arc::new(Futex::new());
        let messages = Arc::new(AtomicU32::new(0));
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let (gate, futex) = (Arc::clone(&gate), Arc::clone(&futex));
                let messages = Arc::clone(&messages);
                thread::spawn(move || {
                    let take = || {
                        let seen = messages.load(Ordering::Acquire);
                        seen > 0
                            && messages
                                .compare_exchange(
                                    seen,
                                    seen - 1,
                                    Ordering::AcqRel,
                                    Ordering::Relaxed,
                                )
                                .is_ok()
                    };
                    while !take() {
                        let count = gate.announce();
                        if messages.load(Ordering::Acquire) == 0 {
                            futex.wait(gate.word(), count);
                        }
                    }
                })
            })
            .collect();
        for _ in 0..2 {
            messages.fetch_add(1, Ordering::Release);
            if gate.is_waited_at() {
                gate.wake(|_| futex.wake_one());
            }
        }
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

/// An event loop arms itself and looks once more; what it does not see rings it.
#[test]
fn an_armed_event_loop_is_rung_or_sees_the_message() {
    loom::model(|| {
        let gate = Arc::new(Gate::new());
        let work = Arc::new(AtomicBool::new(false));
        let sender = {
            let (gate, work) = (Arc::clone(&gate), Arc::clone(&work));
            thread::spawn(move || {
                work.store(true, Ordering::Release);
                gate.is_waited_at() && gate.wake(|_| false)
            })
        };
        gate.arm();
        let seen = work.load(Ordering::Acquire);
        let rung = sender.join().unwrap();
        assert!(seen || rung);
    });
}
