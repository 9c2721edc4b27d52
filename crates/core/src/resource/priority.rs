//! Lanes for work of different urgency behind one resource; the calling thread's lane is chosen.
//!
//! The lane stands in the thread while a call runs ([`within`]). Whoever calls on behalf of a program
//! sets it for each call: what decides it (an argument, a context variable) changes without a hook
//! when tasks take turns on a thread, so nothing that outlives a call can be kept in step with it.

use super::Resource;
use super::composite::{Choose, Composite, distinct};
use crate::error::Result;
use std::cell::Cell;
use std::sync::Arc;

/// A lane, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Memory that is there; see [`super::realtime`].
    Realtime,
    /// Served first from what is kept.
    High,
    /// Everything that says nothing.
    Normal,
    /// What may wait.
    Background,
}

impl Lane {
    /// All lanes, by index.
    pub const ALL: [Lane; 4] = [Lane::Realtime, Lane::High, Lane::Normal, Lane::Background];
}

thread_local! {
    static CURRENT: Cell<Lane> = const { Cell::new(Lane::Normal) };
}

/// Run `body` with requests of this thread going to `lane`.
#[inline]
pub fn within<R>(lane: Lane, body: impl FnOnce() -> R) -> R {
    /// Restores the lane, also when `body` panics.
    struct Restore(Lane);
    impl Drop for Restore {
        #[inline]
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }
    let _restore = Restore(CURRENT.replace(lane));
    body()
}

/// A resource for each lane; a block goes back to the lane it came from.
pub type PriorityResource = Composite<ByLane>;

/// Chooses the calling thread's lane.
pub struct ByLane;

impl Choose for ByLane {
    const NAME: &'static str = "PriorityResource";
    const HAS_LANES: bool = true;

    #[inline]
    fn choose(&self, _size: usize) -> usize {
        CURRENT.get() as usize
    }
}

impl PriorityResource {
    /// One resource for each of [`Lane::ALL`]; no two may draw from the same one.
    pub fn of_lanes(lanes: [Arc<dyn Resource>; 4]) -> Result<Self> {
        distinct(&lanes, &["realtime", "high", "normal", "background"])?;
        Ok(Composite::new(ByLane, lanes.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::limit::LimitAdaptor;
    use super::super::system::SystemResource;
    use super::super::{Ownership, Request};
    use super::*;
    use std::ptr::NonNull;

    fn system() -> Arc<dyn Resource> {
        Arc::new(SystemResource::new())
    }

    fn in_use(resource: &PriorityResource) -> [u64; 4] {
        let counts = resource
            .parts()
            .iter()
            .map(|part| part.statistics().current_count);
        counts.collect::<Vec<_>>().try_into().unwrap()
    }

    #[test]
    fn a_request_goes_to_the_lane_of_the_call_and_back_from_any() {
        // libc cannot tell its blocks by address, so all but one of these lanes need a ledger.
        let resource = PriorityResource::of_lanes([system(), system(), system(), system()]);
        let resource = resource.unwrap();
        let request = Request::bytes(1000).unwrap();
        let mut blocks = Vec::new();
        for lane in Lane::ALL {
            blocks.push(within(lane, || resource.allocate(request)).unwrap());
        }
        blocks.push(resource.allocate(request).unwrap());
        assert_eq!(in_use(&resource), [1, 1, 2, 1]);
        // SAFETY: a live block.
        let moved = unsafe { resource.reallocate(blocks[0].address, 9000) }.unwrap();
        assert_eq!(
            in_use(&resource),
            [1, 1, 2, 1],
            "a resized block stays in its lane"
        );
        blocks[0] = moved;
        for (index, block) in blocks.iter().enumerate() {
            // SAFETY: a live block.
            let size = within(Lane::ALL[index % 4], || unsafe {
                resource.deallocate(block.address)
            });
            assert!(size >= 1000);
        }
        assert_eq!(in_use(&resource), [0; 4]);
        assert_eq!(resource.owns(NonNull::dangling()), Ownership::Unknown);
    }

    #[test]
    fn lanes_end_with_the_call_that_set_them_also_when_it_panics() {
        let _ = std::panic::catch_unwind(|| within(Lane::High, || panic!("in the lane")));
        assert_eq!(CURRENT.get(), Lane::Normal);
        within(Lane::High, || {
            within(Lane::Realtime, || assert_eq!(CURRENT.get(), Lane::Realtime));
            assert_eq!(CURRENT.get(), Lane::High);
        });
    }

    #[test]
    fn lanes_that_share_a_resource_are_refused_by_name() {
        let shared = system();
        let limit = |upstream: &Arc<dyn Resource>| -> Arc<dyn Resource> {
            Arc::new(LimitAdaptor::new(
                Arc::clone(upstream),
                1 << 20,
                Box::new(|| ()),
            ))
        };
        let lanes = [system(), limit(&shared), system(), limit(&shared)];
        let error = PriorityResource::of_lanes(lanes).err().unwrap().to_string();
        assert_eq!(
            error,
            "background: must draw from a resource of its own, got one that high draws from too"
        );
        assert!(PriorityResource::of_lanes([system(), system(), system(), limit(&shared)]).is_ok());
    }

    #[test]
    fn a_stack_has_lanes_if_one_of_its_layers_has() {
        let lanes = PriorityResource::of_lanes([system(), system(), system(), system()]);
        let lanes: Arc<dyn Resource> = Arc::new(lanes.unwrap());
        let stack = LimitAdaptor::new(lanes, 1 << 20, Box::new(|| ()));
        assert!(stack.has_lanes());
        assert!(!system().has_lanes());
        let block = within(Lane::High, || stack.allocate(Request::bytes(64).unwrap())).unwrap();
        // SAFETY: a live block.
        unsafe { stack.deallocate(block.address) };
    }
}
