//! Several resources as one: each request goes to the part that is chosen for it.
//!
//! A block goes back to the part it came from, which is found by its address. So no two parts may
//! draw from the same resource; and of parts that cannot tell their blocks by address (libc's heap)
//! all but one get a ledger.

use super::ledger::LedgerAdaptor;
use super::{Block, Group, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::{Error, Result};
use std::ptr::NonNull;
use std::sync::Arc;

/// Which part serves a request, and what users call the whole.
pub trait Choose: Send + Sync {
    /// The name users know the whole by.
    const NAME: &'static str;
    /// Whether the choice goes by the call's lane; see [`super::priority`].
    const HAS_LANES: bool = false;

    /// Index of the part that serves the calling thread's next request, of `size` bytes.
    fn choose(&self, size: usize) -> usize;
}

/// Parts, and what chooses among them. Any thread may use it; it has no state of its own.
pub struct Composite<C> {
    choice: C,
    parts: Vec<Arc<dyn Resource>>,
    /// The part that gets back what no other part knows; its blocks cannot be told by address.
    rest: Option<usize>,
}

impl<C: Choose> Composite<C> {
    /// One resource of `parts`, at least one, of which no two draw from the same (see [`distinct`]).
    pub fn new(choice: C, parts: Vec<Arc<dyn Resource>>) -> Self {
        let rest = parts
            .iter()
            .rposition(|part| part.owns(NonNull::dangling()) == Ownership::Unknown);
        let known = |(index, part)| {
            if Some(index) == rest {
                part
            } else {
                LedgerAdaptor::where_needed(part)
            }
        };
        let parts = parts.into_iter().enumerate().map(known).collect();
        Composite {
            choice,
            parts,
            rest,
        }
    }

    /// What chooses among the parts.
    pub fn choice(&self) -> &C {
        &self.choice
    }

    /// The parts, in the order they were given.
    pub fn parts(&self) -> &[Arc<dyn Resource>] {
        &self.parts
    }

    #[inline]
    fn chosen(&self, size: usize) -> &dyn Resource {
        &*self.parts[self.choice.choose(size)]
    }

    /// The part that `address` is a live block of, if any can tell.
    fn owner(&self, address: NonNull<u8>) -> Option<&dyn Resource> {
        let owner = self
            .parts
            .iter()
            .find(|part| part.owns(address) == Ownership::Yes);
        let rest = self.rest.map(|index| &self.parts[index]);
        owner.or(rest).map(|part| &**part)
    }
}

/// Refuse parts that draw from the same resource; `names` are what the error calls them.
pub fn distinct(parts: &[Arc<dyn Resource>], names: &[&'static str]) -> Result<()> {
    for (index, (part, name)) in parts.iter().zip(names).enumerate() {
        let mut before = parts[..index].iter().zip(names);
        if let Some((_, other)) = before.find(|(other, _)| share(other, part)) {
            return Err(Error::invalid(
                name,
                format!(
                    "must draw from a resource of its own, got one that {other} draws from too"
                ),
            ));
        }
    }
    Ok(())
}

/// Whether two resources draw from the same one, or are the same.
pub fn share(one: &Arc<dyn Resource>, other: &Arc<dyn Resource>) -> bool {
    fn collect(resource: &Arc<dyn Resource>, into: &mut Vec<*const ()>) {
        into.push(Arc::as_ptr(resource).cast());
        for source in resource.sources() {
            collect(source, into);
        }
    }
    let (mut ones, mut others) = (Vec::new(), Vec::new());
    collect(one, &mut ones);
    collect(other, &mut others);
    ones.iter().any(|place| others.contains(place))
}

// SAFETY: blocks are those of the parts, which promise the same and share no memory.
unsafe impl<C: Choose> Resource for Composite<C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn allocate(&self, request: Request) -> Result<Block> {
        self.chosen(request.size()).allocate(request)
    }

    /// Each part serves its requests as a group.
    fn allocate_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        let chosen: Vec<usize> = requests
            .iter()
            .map(|request| self.choice.choose(request.size()))
            .collect();
        let mut groups = Vec::with_capacity(self.parts.len());
        for (index, part) in self.parts.iter().enumerate() {
            let asked = requests.iter().zip(&chosen);
            let asked = asked.filter(|(_, chosen)| **chosen == index);
            let asked: Vec<Request> = asked.map(|(request, _)| *request).collect();
            let mut group = Group::with_capacity(&**part, asked.len());
            if !asked.is_empty() {
                part.allocate_group(&asked)?
                    .into_iter()
                    .for_each(|block| group.add(block));
            }
            groups.push(group);
        }
        let kept = groups.into_iter().map(|group| group.keep().into_iter());
        let mut kept: Vec<_> = kept.collect();
        let next = |part: usize| kept[part].next().expect("a block for each request");
        Ok(chosen.into_iter().map(next).collect())
    }

    #[inline]
    fn draw(&self, size: usize) -> Option<NonNull<u8>> {
        self.chosen(size).draw(size)
    }

    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise.
        if let Some(size) = unsafe { self.take_back(address) } {
            return size;
        }
        // What nobody knows is counted by whoever would have to.
        let rest = &self.parts[self.rest.unwrap_or(0)];
        // SAFETY: the caller's promise; no other part has it.
        unsafe { rest.deallocate(address) }
    }

    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        self.parts.iter().find_map(|part| {
            // SAFETY: the caller's promise. A part that cannot tell does nothing.
            unsafe { part.take_back(address) }
        })
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        self.owner(address).map_or(0, |part| {
            // SAFETY: the caller's promise; it is a live block of this part.
            unsafe { part.block_bytes(address) }
        })
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        let mut answers = self.parts.iter().map(|part| part.owns(address));
        let first = answers.find(|answer| *answer != Ownership::No);
        match first {
            Some(Ownership::Unknown) if answers.any(|answer| answer == Ownership::Yes) => {
                Ownership::Yes
            }
            first => first.unwrap_or(Ownership::No),
        }
    }

    /// The parts' counts added up. Peaks that parts reached at different times add up too, to more
    /// than was ever in use at once.
    fn statistics(&self) -> Statistics {
        self.parts
            .iter()
            .map(|part| part.statistics())
            .fold(Statistics::default(), Statistics::plus)
    }

    fn cached_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.cached_bytes()).sum()
    }

    /// The first parts keep most.
    fn trim(&self, target_bytes: usize) -> usize {
        let mut keep = target_bytes;
        let mut given = 0;
        for part in &self.parts {
            given += part.trim(keep);
            keep = keep.saturating_sub(part.cached_bytes());
        }
        given
    }

    fn check(&self, report: &mut HealthReport) {
        for part in &self.parts {
            part.check(report);
        }
    }

    fn sources(&self) -> Vec<&Arc<dyn Resource>> {
        self.parts.iter().collect()
    }

    fn has_lanes(&self) -> bool {
        C::HAS_LANES || self.parts.iter().any(|part| part.has_lanes())
    }

    /// The block stays in its part.
    unsafe fn reallocate(&self, address: NonNull<u8>, size: usize) -> Result<Block> {
        let part = self.owner(address).unwrap_or_else(|| self.chosen(size));
        // SAFETY: the caller's promise; it is a live block of this part.
        unsafe { part.reallocate(address, size) }
    }
}
