//! Every resource that a user holds, so that a health check can walk them all; and what was lost.
//!
//! A user's hold is a [`Member`]. Blocks keep the resource they came from alive through it, so when
//! it goes, no block may be out. A resource of which some are out is kept: either another part of
//! the core still gives them back (a slab its runs), or nobody can, and they are a [`Loss`].
//!
//! Any thread may call anything here. A forked child inherits the list.

use super::fork::{self, ForkLocks};
use super::{HealthReport, Resource, Statistics};
use crate::sync::{AtomicU64, Lock, Ordering::Relaxed};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock, Weak};

/// A user's hold on a resource. Derefs to the resource.
pub struct Member {
    id: u64,
    resource: Arc<dyn Resource>,
}

/// A resource that nobody holds any more, though blocks of it are out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Number of the resource, as in [`Walked`].
    pub id: u64,
    /// Its name.
    pub name: &'static str,
    /// Blocks that were out.
    pub block_count: u64,
    /// Their bytes.
    pub block_bytes: u64,
}

/// What a walk found at one resource.
pub struct Walked {
    /// Number of the resource, given in order of construction.
    pub id: u64,
    /// Its name.
    pub name: &'static str,
    /// Numbers of what it draws from, as far as users hold that too.
    pub sources: Vec<u64>,
    /// Its counts before its structures were looked at.
    pub before: Statistics,
    /// What `check` reported.
    pub report: HealthReport,
    /// (bytes, blocks) it holds from its upstream, if it knows.
    pub held_upstream: Option<(u64, u64)>,
    /// Its counts after.
    pub after: Statistics,
}

/// A resource that its user let go of. Behind an `Arc`, so that it can be looked at without the
/// list's lock and without another reference to the resource itself.
struct Left {
    id: u64,
    resource: Arc<dyn Resource>,
}

#[derive(Default)]
struct Registry {
    members: Lock<BTreeMap<u64, Weak<dyn Resource>>>,
    /// Resources that their users let go of while blocks were out.
    left: Lock<Vec<Arc<Left>>>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);
static REGISTRY: LazyLock<Arc<Registry>> = LazyLock::new(|| fork::shared(Registry::default()));

impl ForkLocks for Registry {
    fn lock_all(&self) {
        self.members.hold();
        self.left.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: `lock_all` on this thread called `hold`.
        unsafe { self.left.release() };
        // SAFETY: as above.
        unsafe { self.members.release() };
    }
}

impl Member {
    /// Enter a resource into the list for as long as the result lives.
    pub fn new(resource: Arc<dyn Resource>) -> Self {
        let id = NEXT_ID.fetch_add(1, Relaxed);
        let entry = Arc::downgrade(&resource);
        REGISTRY.members.lock().insert(id, entry);
        Member { id, resource }
    }

    /// The resource.
    pub fn resource(&self) -> &Arc<dyn Resource> {
        &self.resource
    }

    /// Number of the resource.
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        REGISTRY.members.lock().remove(&self.id);
        if self.resource.statistics().current_count > 0 {
            let (id, resource) = (self.id, Arc::clone(&self.resource));
            REGISTRY.left.lock().push(Arc::new(Left { id, resource }));
        }
        unsettled();
    }
}

/// Resources that were let go of and miss blocks. Lets go of those that have them all back.
///
/// Resources are asked without our lock: a fork takes theirs first.
fn unsettled() -> Vec<Arc<Left>> {
    let left = REGISTRY.left.lock().clone();
    let misses_blocks = |left: &Arc<Left>| left.resource.statistics().current_count > 0;
    let (unsettled, settled): (Vec<_>, Vec<_>) = left.into_iter().partition(misses_blocks);
    if !settled.is_empty() {
        let is_settled = |left: &Arc<Left>| settled.iter().any(|other| other.id == left.id);
        REGISTRY.left.lock().retain(|left| !is_settled(left));
    }
    unsettled
}

/// Have every live resource give kept memory back, down to `target_bytes` each; returns bytes given
/// back. Resources are asked without our lock, the newest first: an adaptor asks what it draws from.
pub fn trim_all(target_bytes: usize) -> usize {
    let members = REGISTRY.members.lock();
    let live: Vec<_> = members.values().rev().filter_map(Weak::upgrade).collect();
    drop(members);
    live.iter()
        .map(|resource| resource.trim(target_bytes))
        .sum()
}

/// What was lost so far, oldest first.
pub fn losses() -> Vec<Loss> {
    let loss = |left: &Arc<Left>| {
        let counts = left.resource.statistics();
        Loss {
            id: left.id,
            name: left.resource.name(),
            block_count: counts.current_count,
            block_bytes: counts.current_bytes,
        }
    };
    // Where we alone hold the resource, nobody is left who could give its blocks back.
    let alone = |left: &&Arc<Left>| Arc::strong_count(&left.resource) == 1;
    unsettled().iter().filter(alone).map(loss).collect()
}

/// Look at every resource that a user holds, oldest first. Takes one resource's locks at a time.
pub fn walk() -> Vec<Walked> {
    let members: Vec<(u64, Arc<dyn Resource>)> = {
        let members = REGISTRY.members.lock();
        let live = |(id, entry): (&u64, &Weak<dyn Resource>)| Some((*id, entry.upgrade()?));
        members.iter().filter_map(live).collect()
    };
    let place = |resource: &Arc<dyn Resource>| Arc::as_ptr(resource).cast::<()>();
    let numbers: HashMap<*const (), u64> = members
        .iter()
        .map(|(id, resource)| (place(resource), *id))
        .collect();
    let sources = |resource: &Arc<dyn Resource>| {
        let mut found = Vec::new();
        let mut unseen = resource.sources();
        while let Some(source) = unseen.pop() {
            match numbers.get(&place(source)) {
                Some(id) => found.push(*id),
                // A part of the resource, such as a ledger: what that draws from.
                None => unseen.extend(source.sources()),
            }
        }
        found.sort_unstable();
        found
    };
    let look = |(id, resource): &(u64, Arc<dyn Resource>)| {
        let before = resource.statistics();
        let mut report = HealthReport::default();
        resource.check(&mut report);
        Walked {
            id: *id,
            name: resource.name(),
            sources: sources(resource),
            before,
            report,
            held_upstream: resource.held_upstream(),
            after: resource.statistics(),
        }
    };
    members.iter().map(look).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{
        Request, large_object::Options, pool::PoolResource, statistics::StatisticsAdaptor,
        system::SystemResource,
    };
    use super::*;

    fn system() -> Member {
        Member::new(Arc::new(SystemResource::new()))
    }

    #[test]
    fn a_resource_is_walked_while_it_is_held() {
        let member = system();
        let id = member.id();
        assert!(walk().iter().any(|walked| walked.id == id));
        drop(member);
        assert!(walk().iter().all(|walked| walked.id != id));
        assert!(losses().iter().all(|loss| loss.id != id));
    }

    #[test]
    fn all_live_resources_are_trimmed() {
        let pool = PoolResource::new(Options::default()).expect("address space");
        let member = Member::new(Arc::new(pool));
        let request = Request::bytes(1 << 20).expect("a plain size");
        let block = member.resource().allocate(request).expect("a mebibyte");
        // SAFETY: the live block from above.
        unsafe { member.resource().deallocate(block.address) };
        assert!(member.resource().cached_bytes() > 0);
        trim_all(0);
        assert_eq!(member.resource().cached_bytes(), 0);
    }

    #[test]
    fn a_walk_knows_who_draws_from_whom() {
        let upstream = system();
        let adaptor = StatisticsAdaptor::new(Arc::clone(upstream.resource()));
        let adaptor = Member::new(Arc::new(adaptor));
        let block = adaptor.resource().allocate(Request::bytes(100).unwrap());
        let walked = walk();
        let of = |id: u64| walked.iter().find(|walked| walked.id == id).unwrap();
        assert_eq!(of(adaptor.id()).sources, [upstream.id()]);
        assert!(of(upstream.id()).sources.is_empty());
        let held = of(adaptor.id()).held_upstream.unwrap();
        assert_eq!(held, (of(upstream.id()).after.current_bytes, 1));
        // SAFETY: the live block from above.
        unsafe { adaptor.resource().deallocate(block.unwrap().address) };
    }

    #[test]
    fn blocks_that_nobody_can_give_back_are_a_loss() {
        let member = system();
        let (id, resource) = (member.id(), Arc::clone(member.resource()));
        let lost = |id| losses().into_iter().find(|loss| loss.id == id);
        let block = resource.allocate(Request::bytes(100).unwrap()).unwrap();
        drop(member);
        assert_eq!(
            lost(id),
            None,
            "it is still held, so the block may come back"
        );
        let gone = Arc::downgrade(&resource);
        drop(resource);
        let loss = lost(id).unwrap();
        assert_eq!((loss.name, loss.block_count), ("SystemResource", 1));
        assert!(loss.block_bytes >= 100);
        let resource = gone.upgrade().unwrap();
        // SAFETY: the live block from above.
        unsafe { resource.deallocate(block.address) };
        drop(resource);
        assert_eq!(lost(id), None);
        // Another test's walk may be looking at it; then it goes a moment later.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while gone.strong_count() > 0 {
            assert!(std::time::Instant::now() < deadline, "it is never let go");
            std::thread::yield_now();
        }
    }
}
