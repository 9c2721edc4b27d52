//! What was queued from outside the workers: a queue for each priority, and the ageing of each.
//!
//! The highest lane goes first. A lane that has had something in it for long without being served
//! gets one turn, so that the lowest never starves: its share under pressure is one task in that
//! time, and nobody above it waits for more than that one.

use crate::sync::{AtomicU64, Ordering};
use crossbeam_deque::{Injector, Steal};

/// How many priorities there are.
pub const PRIORITY_COUNT: usize = 4;

/// How urgent a task is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Before everything else.
    Realtime,
    /// Before what is normal.
    High,
    /// Unless told.
    #[default]
    Normal,
    /// When nothing else is to be done.
    Background,
}

/// After how long without a turn a lane gets one.
const AGE_MILLISECONDS: [u64; PRIORITY_COUNT] = [50, 50, 50, 100];

struct Lane<T> {
    queue: Injector<T>,
    /// When it was served last, or got its first task since. A hint, so `Relaxed` suffices.
    served: AtomicU64,
}

/// The lanes of one node.
pub(super) struct Lanes<T> {
    /// Milliseconds since some moment.
    now: fn() -> u64,
    lanes: [Lane<T>; PRIORITY_COUNT],
}

impl<T> Lanes<T> {
    pub(super) fn new(now: fn() -> u64) -> Self {
        Lanes {
            now,
            lanes: std::array::from_fn(|_| Lane {
                queue: Injector::new(),
                served: AtomicU64::new(0),
            }),
        }
    }

    #[inline]
    pub(super) fn push(&self, priority: Priority, task: T) {
        let lane = &self.lanes[priority as usize];
        if priority != Priority::Realtime && lane.queue.is_empty() {
            lane.served.store((self.now)(), Ordering::Relaxed);
        }
        lane.queue.push(task);
    }

    #[inline]
    pub(super) fn take(&self, priority: Priority) -> Option<T> {
        let lane = &self.lanes[priority as usize];
        if lane.queue.is_empty() {
            return None;
        }
        let task = steal(&lane.queue)?;
        if priority != Priority::Realtime && !lane.queue.is_empty() {
            lane.served.store((self.now)(), Ordering::Relaxed);
        }
        Some(task)
    }

    /// What has waited for a turn for too long, if anything; the lowest lane first.
    #[inline]
    pub(super) fn take_overdue(&self) -> Option<T> {
        const BELOW_REALTIME: [Priority; 3] =
            [Priority::Background, Priority::Normal, Priority::High];
        let mut now = 0;
        for priority in BELOW_REALTIME {
            let lane = &self.lanes[priority as usize];
            if lane.queue.is_empty() {
                continue;
            }
            if now == 0 {
                now = (self.now)();
            }
            let age = now.saturating_sub(lane.served.load(Ordering::Relaxed));
            if age > AGE_MILLISECONDS[priority as usize] {
                return self.take(priority);
            }
        }
        None
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.lanes.iter().all(|lane| lane.queue.is_empty())
    }

    /// How many wait in each lane, those that are over included.
    pub(super) fn counts(&self) -> [usize; PRIORITY_COUNT] {
        std::array::from_fn(|index| self.lanes[index].queue.len())
    }

    /// Take out what is over, and keep the order of the rest. Gives back what was taken out.
    pub(super) fn sweep(&self, is_over: impl Fn(&T) -> bool) -> Vec<T> {
        let mut over = Vec::new();
        for lane in &self.lanes {
            for _ in 0..lane.queue.len() {
                let Some(task) = steal(&lane.queue) else {
                    break;
                };
                if is_over(&task) {
                    over.push(task);
                } else {
                    lane.queue.push(task);
                }
            }
        }
        over
    }
}

/// The oldest task of a queue, if there is one.
#[inline]
pub(super) fn steal<T>(queue: &Injector<T>) -> Option<T> {
    loop {
        match queue.steal() {
            Steal::Success(task) => return Some(task),
            Steal::Empty => return None,
            Steal::Retry => std::hint::spin_loop(),
        }
    }
}
