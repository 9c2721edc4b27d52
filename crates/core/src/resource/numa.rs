//! Memory of chosen nodes: pools whose pages come from where they are told, on machines with more
//! than one node.
//!
//! The policy is set once on the address space that a pool reserves, before any page of it exists,
//! so that an allocation costs nothing more, and memory that was given back comes from the same
//! place when it is touched again. Setting it on blocks of an upstream instead would cost two calls
//! a block, split the kernel's mappings at each, and miss what shares a page with a neighbour.

use super::Resource;
use super::composite::{Choose, Composite};
use super::large_object::{LargeObjectResource, Options};
use super::slab::SlabResource;
use crate::error::{Error, Result};
use crate::os::numa::{self, Placement};
use std::sync::Arc;

/// One pool for each placement; a thread draws from the one of the CPU that it runs on.
pub type NumaResource = Composite<ByCpu>;

/// Chooses the pool of the calling thread's CPU.
pub struct ByCpu {
    /// By number of the CPU; one that is not in it (it came online later) uses the first pool.
    pool_of_cpu: Box<[u16]>,
    heaps: Vec<Arc<LargeObjectResource>>,
    /// Why a placement was left out, if one was.
    refusal: Option<String>,
}

impl Choose for ByCpu {
    const NAME: &'static str = "NumaResource";

    #[inline]
    fn choose(&self, _size: usize) -> usize {
        if self.heaps.len() == 1 {
            return 0;
        }
        let pool = numa::current_cpu().and_then(|cpu| self.pool_of_cpu.get(cpu));
        pool.map_or(0, |pool| usize::from(*pool))
    }
}

impl NumaResource {
    /// A pool for each of `placements`, made as `options` say otherwise; `None` leaves the kernel to
    /// choose, and so does one that the kernel refuses. CPU number `i` draws from pool
    /// `pool_of_cpu[i]`.
    pub fn placed(
        placements: &[Option<Placement>],
        pool_of_cpu: &[u16],
        options: Options,
    ) -> Result<Self> {
        let wrong = |pool: &&u16| usize::from(**pool) >= placements.len();
        if let Some(pool) = pool_of_cpu.iter().find(wrong) {
            return Err(Error::invalid(
                "pool_of_cpu",
                format!("must be below {}, got {pool}", placements.len()),
            ));
        }
        let mut refusal = None;
        let mut heaps = Vec::with_capacity(placements.len());
        for placement in placements {
            let refused = placement.and_then(|placement| refused(&placement));
            let options = Options {
                placement: placement.filter(|_| refused.is_none()),
                ..options
            };
            heaps.push(Arc::new(LargeObjectResource::new(options)?));
            refusal = refusal.or(refused);
        }
        let pool = |heap: &Arc<LargeObjectResource>| {
            let slab = SlabResource::new(Arc::clone(heap) as Arc<dyn Resource>)?;
            Ok(Arc::new(slab) as Arc<dyn Resource>)
        };
        let pools = heaps.iter().map(pool).collect::<Result<Vec<_>>>()?;
        let choice = ByCpu {
            pool_of_cpu: pool_of_cpu.into(),
            heaps,
            refusal,
        };
        Ok(Composite::new(choice, pools))
    }

    /// What the kernel refused to place, and why; `None` if all of it lies as it should.
    pub fn refusal(&self) -> Option<String> {
        let ByCpu { heaps, refusal, .. } = self.choice();
        let unplaced: usize = heaps.iter().map(|heap| heap.unplaced_regions()).sum();
        let later = || format!("the kernel refused to place {unplaced} reservations");
        refusal.clone().or_else(|| (unplaced > 0).then(later))
    }
}

/// Why the kernel would not place pages so, if it would not.
fn refused(placement: &Placement) -> Option<String> {
    let error = numa::can_place(placement).err()?;
    let nodes: Vec<_> = placement.nodes.ids().iter().map(usize::to_string).collect();
    Some(format!(
        "the kernel refuses to place pages on node {}: {error}",
        nodes.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::super::Request;
    use super::*;
    use crate::os::numa::{NodeSet, Policy, can_place, nodes_of_pages, placed_on};

    fn on_node(node: usize) -> Placement {
        Placement {
            policy: Policy::Bind,
            nodes: NodeSet::new(&[node]).unwrap(),
        }
    }

    #[test]
    fn every_page_of_a_block_comes_from_its_node() {
        let placement = on_node(0);
        if can_place(&placement).is_err() {
            return; // refused here: a container's filter, or a kernel without nodes
        }
        let resource = NumaResource::placed(&[Some(placement)], &[], Options::default()).unwrap();
        for size in [100, 5000, 100_000, 5 << 20] {
            let block = resource.allocate(Request::bytes(size).unwrap()).unwrap();
            // SAFETY: a live block of `size` bytes.
            unsafe { block.address.write_bytes(1, size) };
            assert_eq!(placed_on(block.address).unwrap(), Some(placement.nodes));
            let nodes = nodes_of_pages(block.address.as_ptr(), size).unwrap();
            assert!(
                nodes.iter().all(|node| *node == Some(0)),
                "{size}: {nodes:?}"
            );
            // SAFETY: a live block.
            unsafe { resource.deallocate(block.address) };
        }
        resource.trim(0);
        let block = resource.allocate(Request::bytes(5 << 20).unwrap()).unwrap();
        assert_eq!(placed_on(block.address).unwrap(), Some(placement.nodes));
        // SAFETY: a live block.
        unsafe { resource.deallocate(block.address) };
        assert_eq!(resource.refusal(), None);
    }

    #[test]
    fn a_refused_placement_is_said_and_the_memory_is_good() {
        let resource =
            NumaResource::placed(&[Some(on_node(1023))], &[], Options::default()).unwrap();
        let block = resource.allocate(Request::bytes(100_000).unwrap()).unwrap();
        // SAFETY: a live block.
        unsafe { block.address.write_bytes(1, 100_000) };
        // SAFETY: a live block.
        unsafe { resource.deallocate(block.address) };
        let refusal = resource.refusal().unwrap();
        assert!(refusal.contains("node 1023: "), "{refusal}");
    }

    #[test]
    fn a_thread_draws_from_the_pool_of_its_cpu_and_frees_into_the_block_s() {
        let cpu = numa::current_cpu().unwrap();
        // This CPU's pool is the second; another CPU, if this thread is moved, has it too.
        let pool_of_cpu = vec![1; cpu.max(4096) + 1];
        let resource = NumaResource::placed(&[None, None], &pool_of_cpu, Options::default());
        let resource = resource.unwrap();
        let block = resource.allocate(Request::bytes(1000).unwrap()).unwrap();
        let in_use = |part: usize| resource.parts()[part].statistics().current_count;
        assert_eq!((in_use(0), in_use(1)), (0, 1));
        // SAFETY: a live block.
        assert!(unsafe { resource.deallocate(block.address) } >= 1000);
        assert_eq!((in_use(0), in_use(1)), (0, 0));
        assert_eq!(resource.statistics().invalid_frees, 0);
        let other = NumaResource::placed(&[None, None], &[], Options::default()).unwrap();
        let block = other.allocate(Request::bytes(1000).unwrap()).unwrap();
        assert_eq!(
            other.parts()[0].statistics().current_count,
            1,
            "no CPU is in the table"
        );
        // SAFETY: a live block.
        unsafe { other.deallocate(block.address) };
    }

    #[test]
    fn a_table_that_names_no_pool_is_refused() {
        let refused = NumaResource::placed(&[None], &[0, 1], Options::default());
        let message = refused.err().unwrap().to_string();
        assert_eq!(message, "pool_of_cpu: must be below 1, got 1");
    }
}
