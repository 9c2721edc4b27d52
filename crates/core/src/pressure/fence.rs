//! A soft `RLIMIT_DATA` that follows what is left, so that an allocation which would cross the limit
//! fails instead of the process being killed.
//!
//! The kernel counts private writable memory when it is mapped, and the groups count it when it is
//! touched. The fence is therefore relative: at each sample the limit is what is mapped now and what
//! may still be touched. What was mapped and not touched yet is taken off for a while, since it is
//! probably about to be; what stays untouched (stacks, sparse arrays) is forgotten with a half-life
//! of half a second. What was touched and given back while it stays mapped, as by trimming a heap, is
//! likely to be touched again by the next requests, which map nothing: it is taken off for longer,
//! with a half-life of ten seconds. Processes that share a limit find each other by a file, in which each locks a
//! byte; each gets an equal share of the room.

use super::source::Sample;
use crate::os::{process, shared};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most processes that share a fence and are counted.
const SLOTS: u64 = 64;
/// The byte that the leader locks.
const LEADER: u64 = SLOTS;
/// The byte that is locked while somebody joins, or takes the file away.
const DOOR: u64 = LEADER + 1;
/// Tries to get at the door, a millisecond apart; it is open but for a few system calls.
const DOOR_TRIES: usize = 50;
const COUNT_NANOSECONDS: u64 = 20_000_000;
const HALF_LIFE_SECONDS: f64 = 0.5;
const RELEASED_HALF_LIFE_SECONDS: f64 = 10.0;
/// The limit is not moved for less.
const STEP_BYTES: u64 = 64 * 1024;

/// Where the fence stands.
#[derive(Clone, Debug)]
pub struct FenceSettings {
    /// Bytes to leave between the fence and the limit.
    pub margin_bytes: u64,
    /// A file by which the processes that share the limit find each other; `None` to be alone.
    pub ledger: Option<PathBuf>,
}

/// The process whose fence stands, or 0. A process has one such limit, so it has one fence. In a
/// forked child it is the parent's until the child has its own. A fork waits for samplers that are
/// being started, so a child finds [`BEFORE`] set too, and `Relaxed` suffices for both.
static STANDING: AtomicU32 = AtomicU32::new(0);
/// The soft limit before the fence that stands, or `u64::MAX`; for that process and its children.
static BEFORE: AtomicU64 = AtomicU64::new(u64::MAX);

/// The fence of this process; lifted when dropped.
pub(super) struct Fence {
    settings: FenceSettings,
    owner: u32,
    before: Option<u64>,
    current: Option<u64>,
    untouched: Untouched,
    ledger: Option<Ledger>,
    /// Why there is none, though it was asked for, as the system's number; 0 if it said none.
    ledger_error: Option<i32>,
    sharers: u64,
    counted_at: u64,
}

impl Fence {
    /// `None` if this process has a fence already.
    pub(super) fn new(settings: FenceSettings) -> Option<Self> {
        let owner = process::process_id();
        let standing = STANDING.load(Ordering::Relaxed);
        let before = match standing {
            0 => process::data_limits().0,
            parent if parent != owner => limit_before(),
            _ => return None,
        };
        STANDING
            .compare_exchange(standing, owner, Ordering::Relaxed, Ordering::Relaxed)
            .ok()?;
        BEFORE.store(before.unwrap_or(u64::MAX), Ordering::Relaxed);
        let mut fence = Fence {
            settings,
            owner,
            before,
            current: None,
            untouched: Untouched::default(),
            ledger: None,
            ledger_error: None,
            sharers: 1,
            counted_at: 0,
        };
        fence.join();
        Some(fence)
    }

    /// The soft limit before it stood.
    pub(super) fn before(&self) -> Option<u64> {
        self.before
    }

    /// Move the fence to what `sample` leaves; returns where it stands, as bytes still to be had.
    pub(super) fn follow(&mut self, sample: &Sample) -> u64 {
        if sample.time_nanoseconds.saturating_sub(self.counted_at) >= COUNT_NANOSECONDS {
            self.counted_at = sample.time_nanoseconds;
            self.count_sharers();
        }
        let pending = self.untouched.pending(sample);
        let room = room(sample, self.settings.margin_bytes, self.sharers, pending);
        let soft = sample.data.saturating_add(room);
        let soft = soft.min(self.before.unwrap_or(u64::MAX));
        if self
            .current
            .is_none_or(|current| current.abs_diff(soft) >= STEP_BYTES)
            && process::set_soft_data_limit(Some(soft))
        {
            self.current = Some(soft);
        }
        room
    }

    fn count_sharers(&mut self) {
        if self.ledger.as_ref().is_none_or(Ledger::is_gone) {
            self.join();
        }
        self.sharers = self.ledger.as_ref().map_or(1, Ledger::count);
    }

    /// Go where the others are; without a ledger, or one that cannot be opened, this one is alone.
    fn join(&mut self) {
        let joined = self.settings.ledger.as_deref().map(Ledger::join);
        (self.ledger, self.ledger_error) = match joined {
            None => (None, None),
            Some(Ok(ledger)) => (Some(ledger), None),
            Some(Err(error)) => (None, Some(error.raw_os_error().unwrap_or(0))),
        };
    }

    /// Why the ledger could not be opened or locked, as the system's number.
    pub(super) fn ledger_error(&self) -> Option<i32> {
        self.ledger_error
    }

    /// How many processes share the room, as last counted.
    pub(super) fn sharers(&self) -> u64 {
        self.sharers
    }

    /// Whether this process is the one of those that share to act for all.
    pub(super) fn is_leader(&self) -> bool {
        self.ledger.as_ref().is_none_or(Ledger::leads)
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        // In a child the limit is the child's: whoever forked it lifts or restarts it.
        if self.owner != process::process_id() {
            return;
        }
        if self.current.is_some() {
            process::set_soft_data_limit(self.before);
        }
        STANDING.store(0, Ordering::Relaxed);
    }
}

/// Bytes that may still be mapped.
fn room(sample: &Sample, margin: u64, sharers: u64, pending: u64) -> u64 {
    let left = sample.deadly_room.saturating_sub(margin) / sharers.max(1);
    left.saturating_sub(pending)
}

/// What is mapped and not touched, or not any more.
#[derive(Default)]
struct Untouched {
    last: Option<Seen>,
    /// Of what was never touched: what was mapped longer ago.
    settled: f64,
    /// What was touched, and given back.
    released: f64,
}

/// What the sample before said.
struct Seen {
    time_nanoseconds: u64,
    anonymous: u64,
    gap: f64,
}

impl Untouched {
    /// Bytes that are probably about to be touched.
    fn pending(&mut self, sample: &Sample) -> u64 {
        let gap = sample.data.saturating_sub(sample.anonymous) as f64;
        let seen = Seen {
            time_nanoseconds: sample.time_nanoseconds,
            anonymous: sample.anonymous,
            gap,
        };
        let Some(last) = self.last.replace(seen) else {
            self.settled = gap;
            return 0;
        };
        let elapsed = sample
            .time_nanoseconds
            .saturating_sub(last.time_nanoseconds) as f64
            / 1e9;
        self.released *= decay(elapsed, RELEASED_HALF_LIFE_SECONDS);
        let grown = gap - last.gap;
        if grown > 0.0 {
            // What is not there any more, and was not unmapped.
            let fell = last.anonymous.saturating_sub(sample.anonymous) as f64;
            self.released += grown.min(fell);
        } else {
            self.released = (self.released + grown).max(0.0);
        }
        self.released = self.released.min(gap);
        let never = gap - self.released;
        let recent = (never - self.settled) * decay(elapsed, HALF_LIFE_SECONDS);
        self.settled = never.min(never - recent);
        (gap - self.settled) as u64
    }
}

/// What is left of something after a while.
fn decay(elapsed_seconds: f64, half_life_seconds: f64) -> f64 {
    0.5f64.powf(elapsed_seconds / half_life_seconds)
}

/// The file by which processes that share a limit find each other.
struct Ledger {
    file: OwnedFd,
    own: Option<u64>,
}

impl Ledger {
    /// Lock a byte of the file, which is made if it is not there.
    fn join(path: &Path) -> io::Result<Self> {
        for _ in 0..DOOR_TRIES {
            let mut ledger = Ledger::open(path)?;
            if shared::try_lock(&ledger.file, DOOR)? {
                // Whoever took it away meanwhile has found nobody in it.
                if !ledger.is_gone() {
                    ledger.take_slot();
                    shared::unlock(&ledger.file, DOOR);
                    return Ok(ledger);
                }
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // Somebody was stopped at the door. Should the file go, that is noticed at the next count.
        let mut ledger = Ledger::open(path)?;
        ledger.take_slot();
        Ok(ledger)
    }

    fn open(path: &Path) -> io::Result<Self> {
        let made = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path);
        let file = OwnedFd::from(made?);
        Ok(Ledger { file, own: None })
    }

    fn take_slot(&mut self) {
        self.own = (0..SLOTS).find(|slot| shared::try_lock(&self.file, *slot).unwrap_or(false));
    }

    fn is_gone(&self) -> bool {
        !matches!(shared::about(&self.file), Ok((_, names, _)) if names > 0)
    }

    fn count(&self) -> u64 {
        (u64::from(self.own.is_some()) + self.count_others(0, SLOTS)).max(1)
    }

    /// Others with a byte from `first` up to `end`: the kernel names any one, which parts the rest.
    fn count_others(&self, first: u64, end: u64) -> u64 {
        if first >= end {
            return 0;
        }
        match shared::locked_elsewhere(&self.file, first, end - first) {
            Ok(Some(slot)) => 1 + self.count_others(first, slot) + self.count_others(slot + 1, end),
            _ => 0,
        }
    }

    /// Once the lock is had, taking it again changes nothing.
    fn leads(&self) -> bool {
        shared::try_lock(&self.file, LEADER).unwrap_or(false)
    }
}

/// Take a ledger away that nobody is in; whether it was. Who joins at the moment makes it anew.
pub fn sweep(path: &Path) -> bool {
    let Ok(file) = shared::open_path(path) else {
        return false;
    };
    let is_ours = matches!(shared::about(&file), Ok((0, names, true)) if names > 0);
    let is_used = || shared::is_locked_elsewhere(&file, 0, DOOR).unwrap_or(true);
    is_ours
        && shared::try_lock(&file, DOOR).unwrap_or(false)
        // Under the lock: whoever had it before may have taken the file away, and another come.
        && matches!(shared::about(&file), Ok((_, names, _)) if names > 0)
        && !is_used()
        && std::fs::remove_file(path).is_ok()
}

fn limit_before() -> Option<u64> {
    let before = BEFORE.load(Ordering::Relaxed);
    (before != u64::MAX).then_some(before)
}

/// Put the soft limit back to what it was before the parent's fence: for a forked child that has none
/// of its own.
pub fn lift_inherited() {
    process::set_soft_data_limit(limit_before());
}

#[cfg(test)]
mod tests {
    use super::super::source::Sample;
    use super::*;

    fn sample(seconds: f64, data: u64, anonymous: u64, room: u64) -> Sample {
        Sample {
            time_nanoseconds: (seconds * 1e9) as u64,
            kind: None,
            used: 0,
            without_cache: 0,
            limit: u64::MAX,
            deadly_room: room,
            deadly_limit: u64::MAX,
            resident: anonymous,
            anonymous,
            data,
            children: 0,
            faults: 0,
            stalled_millionths: None,
            limit_hits: None,
            kills: None,
        }
    }

    #[test]
    fn what_is_mapped_and_not_touched_is_pending_and_forgotten_with_time() {
        let mut untouched = Untouched::default();
        assert_eq!(untouched.pending(&sample(10.0, 1000, 400, 0)), 0);
        let pending = untouched.pending(&sample(10.0, 2000, 400, 0));
        assert_eq!(pending, 1000);
        assert_eq!(untouched.pending(&sample(10.5, 2000, 400, 0)), 500);
        assert_eq!(untouched.pending(&sample(10.5, 2000, 1400, 0)), 0);
    }

    #[test]
    fn what_was_touched_and_given_back_is_pending_for_longer() {
        let mut untouched = Untouched::default();
        assert_eq!(untouched.pending(&sample(10.0, 9000, 8000, 0)), 0);
        assert_eq!(untouched.pending(&sample(10.0, 9000, 4000, 0)), 4000);
        // Half of it is touched again.
        assert_eq!(untouched.pending(&sample(10.0, 9000, 6000, 0)), 2000);
        // All of it is, and something is mapped besides.
        assert_eq!(untouched.pending(&sample(10.0, 9500, 8000, 0)), 500);
        // What is unmapped is gone.
        assert_eq!(untouched.pending(&sample(10.0, 9000, 8000, 0)), 0);
        assert_eq!(untouched.pending(&sample(10.0, 9000, 7000, 0)), 1000);
        assert_eq!(untouched.pending(&sample(10.0, 8000, 7000, 0)), 0);
        assert_eq!(untouched.pending(&sample(10.0, 7000, 6000, 0)), 0);
        // Time halves it, slowly.
        assert_eq!(untouched.pending(&sample(20.0, 7000, 2000, 0)), 4000);
        let later = untouched.pending(&sample(21.0, 7000, 2000, 0));
        assert!((3732..4000).contains(&later), "{later}");
        let later = untouched.pending(&sample(81.0, 7000, 2000, 0));
        assert!(later < 80, "{later}");
    }

    #[test]
    fn the_room_is_shared_and_less_what_is_pending() {
        let sample = sample(0.0, 0, 0, 1000);
        assert_eq!(room(&sample, 200, 1, 0), 800);
        assert_eq!(room(&sample, 200, 4, 50), 150);
        assert_eq!(room(&sample, 2000, 1, 0), 0);
    }

    #[test]
    fn a_ledger_is_swept_when_nobody_is_in_it() {
        let path = std::env::temp_dir().join(format!("moirai-swept-{}", std::process::id()));
        assert!(!sweep(&path), "there is none");
        let first = Ledger::join(&path).expect("a file in the temporary folder");
        let second = Ledger::join(&path).expect("the same file");
        drop(first);
        assert!(!sweep(&path), "the second is in it");
        assert!(!second.is_gone());
        drop(second);
        assert!(sweep(&path));
        assert!(!path.exists());
        std::fs::write(&path, b"somebody's").expect("the temporary folder");
        assert!(!sweep(&path), "a ledger is empty");
        std::fs::remove_file(&path).expect("still there");
    }

    #[test]
    fn nobody_is_ever_in_a_ledger_that_was_swept() {
        let path = std::env::temp_dir().join(format!("moirai-door-{}", std::process::id()));
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| (0..2000).filter(|_| sweep(&path)).count());
            let joiner = || {
                for _ in 0..500 {
                    let ledger = Ledger::join(&path).expect("a file in the temporary folder");
                    assert!(!ledger.is_gone());
                    assert!(ledger.own.is_some());
                }
            };
            scope.spawn(joiner);
            scope.spawn(joiner);
            sweeper.join().expect("it does not panic");
        });
        sweep(&path);
        assert!(!path.exists());
    }

    #[test]
    fn all_of_a_ledger_are_counted_wherever_others_have_left() {
        let path = std::env::temp_dir().join(format!("moirai-gaps-{}", std::process::id()));
        let join = || Ledger::join(&path).expect("a file in the temporary folder");
        let mut all: Vec<_> = (0..SLOTS + 2).map(|_| join()).collect();
        assert_eq!(all[0].count(), SLOTS);
        assert_eq!(
            all[SLOTS as usize].count(),
            SLOTS,
            "it has no byte of its own"
        );
        // Those that stay have bytes 20, 21 and 50.
        let mut slot = 0;
        all.retain(|_| {
            slot += 1;
            matches!(slot - 1, 20 | 21 | 50)
        });
        assert!(all.iter().all(|ledger| ledger.count() == 3));
        std::fs::remove_file(&path).expect("still there");
    }

    #[test]
    fn those_who_join_a_ledger_count_each_other_and_one_leads() {
        let path = std::env::temp_dir().join(format!("moirai-ledger-{}", std::process::id()));
        let first = Ledger::join(&path).expect("a file in the temporary folder");
        let second = Ledger::join(&path).expect("the same file");
        assert_eq!((first.count(), second.count()), (2, 2));
        assert!(first.leads());
        assert!(!second.leads());
        drop(first);
        assert_eq!(second.count(), 1);
        assert!(second.leads());
        std::fs::remove_file(&path).expect("still there");
        assert!(second.is_gone());
    }
}
