//! What a pool counts. Plain numbers under the pool's lock, so that a snapshot always adds up.

use super::Loss;

/// Invariants: `hits + misses` is the number of items handed out; what was `created` and is neither
/// `destroyed`, `leaked` nor `detached` is in the pool or out.
#[derive(Default)]
pub(super) struct Counts {
    pub hits: u64,
    pub misses: u64,
    pub created: u64,
    pub destroyed: u64,
    pub factory_failures: u64,
    pub reset_failures: u64,
    pub validation_failures: u64,
    pub destroy_failures: u64,
    pub leaked: u64,
    pub detached: u64,
    pub exported: u64,
    pub oversize: u64,
    pub waits: u64,
    pub timeouts: u64,
    pub peak_in_use: usize,
}

impl Counts {
    pub(super) fn lose(&mut self, loss: Loss) {
        match loss {
            Loss::Leaked => self.leaked += 1,
            Loss::Detached => self.detached += 1,
            Loss::Destroyed => self.destroyed += 1,
            Loss::ResetFailed => {
                self.destroyed += 1;
                self.reset_failures += 1;
            }
            Loss::Exported => {
                self.destroyed += 1;
                self.exported += 1;
            }
            Loss::Oversize => {
                self.destroyed += 1;
                self.oversize += 1;
            }
        }
    }

    pub(super) fn statistics(&self, census: Census, permits: usize) -> Statistics {
        Statistics {
            acquires: self.hits + self.misses,
            hits: self.hits,
            misses: self.misses,
            created: self.created,
            destroyed: self.destroyed,
            factory_failures: self.factory_failures,
            reset_failures: self.reset_failures,
            validation_failures: self.validation_failures,
            destroy_failures: self.destroy_failures,
            leaked: self.leaked,
            detached: self.detached,
            exported: self.exported,
            oversize: self.oversize,
            waits: self.waits,
            timeouts: self.timeouts,
            idle: census.idle as u64,
            in_use: census.in_use as u64,
            peak_in_use: self.peak_in_use as u64,
            waiting: census.waiting as u64,
            permits: permits as u64,
        }
    }
}

/// How things stand, for the message of one who found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    /// Items that are out.
    pub in_use: usize,
    /// Items at rest.
    pub idle: usize,
    /// Those who wait.
    pub waiting: usize,
    /// Permits in all.
    pub max_count: usize,
}

/// A snapshot of a pool's counters.
///
/// `acquires == hits + misses`. When nothing is being made, reset or handed over at the moment:
/// `created - destroyed - leaked - detached == idle + in_use == permits`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Items handed out.
    pub acquires: u64,
    /// Of those, items that were idle.
    pub hits: u64,
    /// Of those, items that were made for it.
    pub misses: u64,
    /// Items made, those ahead of use included.
    pub created: u64,
    /// Items the pool gave up, for whatever of the reasons below or none.
    pub destroyed: u64,
    /// Items that could not be made.
    pub factory_failures: u64,
    /// Items given up because they could not be reset.
    pub reset_failures: u64,
    /// Items given up because they were found unfit when they were to be handed out.
    pub validation_failures: u64,
    /// Items given up whose destruction failed; they are gone all the same.
    pub destroy_failures: u64,
    /// Items that were collected, not released; their permits came back.
    pub leaked: u64,
    /// Items taken out for good.
    pub detached: u64,
    /// Items given up because they came back with views of them alive.
    pub exported: u64,
    /// Items given up because they came back too large.
    pub oversize: u64,
    /// Acquires that had to wait.
    pub waits: u64,
    /// Acquires that gave up, after waiting or at once.
    pub timeouts: u64,
    /// Items at rest now.
    pub idle: u64,
    /// Items out now.
    pub in_use: u64,
    /// Most items out at once.
    pub peak_in_use: u64,
    /// Those who wait now.
    pub waiting: u64,
    /// Permits taken now.
    pub permits: u64,
}

impl Statistics {
    /// The sum of both in every count, peaks included.
    pub fn plus(self, other: Self) -> Self {
        Statistics {
            acquires: self.acquires + other.acquires,
            hits: self.hits + other.hits,
            misses: self.misses + other.misses,
            created: self.created + other.created,
            destroyed: self.destroyed + other.destroyed,
            factory_failures: self.factory_failures + other.factory_failures,
            reset_failures: self.reset_failures + other.reset_failures,
            validation_failures: self.validation_failures + other.validation_failures,
            destroy_failures: self.destroy_failures + other.destroy_failures,
            leaked: self.leaked + other.leaked,
            detached: self.detached + other.detached,
            exported: self.exported + other.exported,
            oversize: self.oversize + other.oversize,
            waits: self.waits + other.waits,
            timeouts: self.timeouts + other.timeouts,
            idle: self.idle + other.idle,
            in_use: self.in_use + other.in_use,
            peak_in_use: self.peak_in_use + other.peak_in_use,
            waiting: self.waiting + other.waiting,
            permits: self.permits + other.permits,
        }
    }
}
