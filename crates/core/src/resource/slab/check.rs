//! A walk over a class's structures.

use super::super::HealthReport;
use super::caches::own;
use super::class::Class;
use super::magazine::ThreadCache;
use super::run::Run;
use super::shared::Shared;
use std::ptr::NonNull;

impl Shared {
    /// Look at a class whose lock is held; returns how many blocks are out of runs and depot.
    ///
    /// Blocks in the depot and in the calling thread's magazines must each be on one list, and used
    /// as their run sees it. `own` is the calling thread's cache.
    pub(super) fn check_class(
        &self,
        class: &Class,
        own_cache: Option<NonNull<ThreadCache>>,
        report: &mut HealthReport,
    ) -> usize {
        let mut used = 0;
        let mut purged = 0;
        for (index, &run) in class.runs.iter().enumerate() {
            // SAFETY: a live run of this class, whose lock is held.
            let run = unsafe { &*run };
            used += run.used_count();
            purged += run.purged_bytes();
            let sound = run.index == index
                && run.class() == class.index
                && run.counts_agree()
                && run.partial_index.is_some() == (run.free_count > 0);
            report.expect(sound, || {
                format!("slab: run {index} of class {} is inconsistent", class.index)
            });
        }
        report.expect(purged == class.purged_bytes, || {
            format!("slab: purged bytes of class {} disagree", class.index)
        });
        let mut resting: Vec<*mut u8> = class.depot.blocks().collect();
        let racked = resting.len();
        if let Some(cache) = own_cache {
            // SAFETY: the calling thread's own cache, which nothing else borrows now.
            let (pair, _) = unsafe { own(cache.as_ptr(), class.index) };
            resting.extend(pair.loaded.blocks().chain(pair.previous.blocks()));
        }
        let resting_count = resting.len();
        let strays = resting.iter().filter(|address| {
            let word = self.units.get(**address as usize);
            let run = (word >> 8) as *const Run;
            // SAFETY: the map holds live runs; those of this class are guarded by its lock.
            (word & 0xff) as usize != class.index + 1
                || !unsafe { &*run }.is_used(**address as usize)
        });
        let stray_count = strays.count();
        resting.sort_unstable();
        resting.dedup();
        report.expect(stray_count == 0, || {
            format!(
                "slab: {stray_count} resting blocks of class {} are none, or free in their run too",
                class.index
            )
        });
        report.expect(resting.len() == resting_count, || {
            format!(
                "slab: {} blocks of class {} are on two lists",
                resting_count - resting.len(),
                class.index
            )
        });
        report.expect(used >= racked, || {
            format!(
                "slab: class {} has more in its depot than its runs gave",
                class.index
            )
        });
        used - racked.min(used)
    }
}
