//! Fitting a slab to the sizes that are asked of it: extra classes, and room in magazines.
//!
//! Everything here may be called at any time from any thread. Blocks that are out stay what they are,
//! and go back by the run that they lie in.

use super::super::Resource;
use super::SlabResource;
use super::classes::{
    EXTRA_CLASSES, MAX_BLOCK_BYTES, MIN_ROUNDS, STANDARD_COUNT, max_rounds, may_be_extra,
};
use crate::error::{Error, Result};

/// One class of a slab, as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassInfo {
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Whether every slab has it.
    pub is_standard: bool,
    /// Smallest and largest request in bytes that go to it by their size, if any do.
    pub requests: Option<(usize, usize)>,
    /// Blocks that a new magazine holds.
    pub magazine_rounds: usize,
    /// Runs of 64 KiB that it has.
    pub run_count: usize,
    /// Blocks handed out so far, and now.
    pub total_count: u64,
    /// Blocks that are out now.
    pub current_count: u64,
}

/// A resource with a slab in it that may be tuned.
pub trait HasSlab: Resource {
    /// The slab.
    fn slab(&self) -> &SlabResource;
}

impl HasSlab for SlabResource {
    fn slab(&self) -> &SlabResource {
        self
    }
}

impl SlabResource {
    /// Every class that has a size, the smallest first.
    pub fn classes(&self) -> Vec<ClassInfo> {
        let shared = &*self.shared;
        let counts = shared.class_counts();
        let info = |class: usize| {
            let (allocated, freed, _) = counts[class];
            ClassInfo {
                block_bytes: shared.sizes.block_bytes(class),
                is_standard: class < STANDARD_COUNT,
                requests: shared.sizes.requests(class),
                magazine_rounds: shared.sizes.rounds(class),
                run_count: shared.classes[class].lock().runs.len(),
                total_count: allocated,
                current_count: allocated.saturating_sub(freed),
            }
        };
        let mut classes: Vec<_> = shared.sizes.sized().map(info).collect();
        classes.sort_unstable_by_key(|class| class.block_bytes);
        classes
    }

    /// Have classes of exactly these sizes, and no other extra ones, serve requests from now on.
    ///
    /// A slab has at most [`EXTRA_CLASSES`] over its life, those included that no longer serve.
    pub fn set_extra_classes(&self, sizes: &[usize]) -> Result<()> {
        if let Some(bytes) = sizes.iter().find(|bytes| !may_be_extra(**bytes)) {
            return Err(Error::invalid(
                "sizes",
                format!(
                    "must be multiples of 64 between 1024 and {MAX_BLOCK_BYTES} that are no standard \
                     class, got {bytes}"
                ),
            ));
        }
        let _tuning = self.shared.tuning.lock();
        self.shared.sizes.set_extra(sizes).map_err(|left| {
            Error::invalid(
                "sizes",
                format!(
                    "must need at most {left} new classes (a slab has {EXTRA_CLASSES} over its \
                     life), got {sizes:?}"
                ),
            )
        })
    }

    /// Have the magazines of a class hold `rounds` blocks; each thread follows at its next exchange.
    pub fn set_magazine(&self, block_bytes: usize, rounds: usize) -> Result<()> {
        let class = self.class_with(block_bytes)?;
        let most = max_rounds(block_bytes);
        if !(MIN_ROUNDS..=most).contains(&rounds) {
            return Err(Error::invalid(
                "rounds",
                format!(
                    "must be from {MIN_ROUNDS} to {most} for blocks of {block_bytes} bytes, got \
                     {rounds}"
                ),
            ));
        }
        let _tuning = self.shared.tuning.lock();
        self.shared.sizes.set_rounds(class, rounds);
        Ok(())
    }

    /// Draw a run of a class before it is needed, with all its pages in memory.
    ///
    /// It stays, also when none of its blocks is out, until the slab is trimmed. One for a class: a
    /// second call finds it.
    pub fn draw_ahead(&self, block_bytes: usize) -> Result<()> {
        self.shared.draw_ahead(self.class_with(block_bytes)?)
    }

    fn class_with(&self, block_bytes: usize) -> Result<usize> {
        let sizes = &self.shared.sizes;
        let found = (block_bytes > 0).then(|| sizes.with_bytes(block_bytes));
        found.flatten().ok_or_else(|| {
            Error::invalid(
                "block_bytes",
                format!("must be the size of one of the slab's classes, got {block_bytes}"),
            )
        })
    }
}
