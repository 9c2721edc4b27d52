//! Which node of a machine pages come from: asking for it, and seeing where they lie.

use super::PAGE_BYTES;
use std::io;
use std::ptr::NonNull;

/// Most nodes a kernel can have (`MAX_NUMNODES`).
pub const MAX_NODES: usize = 1024;

/// A set of node ids below [`MAX_NODES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeSet([u64; MAX_NODES / 64]);

impl NodeSet {
    /// The nodes in `ids`; `None` if one of them is no possible id.
    pub fn new(ids: &[usize]) -> Option<Self> {
        let mut words = [0; MAX_NODES / 64];
        for id in ids {
            *words.get_mut(id / 64)? |= 1 << (id % 64);
        }
        Some(NodeSet(words))
    }

    /// The ids, ascending.
    pub fn ids(&self) -> Vec<usize> {
        let has = |id: &usize| self.0[id / 64] & (1 << (id % 64)) != 0;
        (0..MAX_NODES).filter(has).collect()
    }
}

/// How pages are spread over the nodes of a [`Placement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// From the first node while it has free memory, then from others.
    Prefer,
    /// From these nodes, whatever happens: when they are full the kernel ends the process.
    Bind,
    /// From each node in turn.
    Interleave,
}

/// Where the pages of a range shall come from when they are first touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// How.
    pub policy: Policy,
    /// From where.
    pub nodes: NodeSet,
}

/// Have the pages of a range come as `placement` says. Pages that are there already stay.
///
/// # Safety
/// The range is page-aligned and lies in a live mapping of the caller.
pub unsafe fn place(address: NonNull<u8>, bytes: usize, placement: &Placement) -> io::Result<()> {
    let mode = mode(placement.policy);
    // The kernel reads one bit less than it is told.
    // SAFETY: a policy changes where pages come from, not what they hold; the mask has the bits.
    let status = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            address.as_ptr(),
            bytes,
            mode,
            placement.nodes.0.as_ptr(),
            MAX_NODES + 1,
            0,
        )
    };
    answer(status)
}

/// Have pages without a placement of their own come as `placement` says when this thread, or one
/// that it starts from now on, first touches them.
pub fn place_thread(placement: &Placement) -> io::Result<()> {
    let mode = mode(placement.policy);
    // SAFETY: a policy changes where pages come from, not what they hold; the mask has the bits.
    let status = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            mode,
            placement.nodes.0.as_ptr(),
            MAX_NODES + 1,
        )
    };
    answer(status)
}

/// Whether the kernel would place pages so: asks for it on a page of its own.
pub fn can_place(placement: &Placement) -> io::Result<()> {
    let page = super::map_zeroed(PAGE_BYTES).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the page mapped above.
    let placed = unsafe { place(page, PAGE_BYTES, placement) };
    // SAFETY: as above, and nothing points into it.
    unsafe { super::release(page, PAGE_BYTES) };
    placed
}

/// The nodes that the policy at an address names; `None` if it has none of its own.
pub fn placed_on(address: NonNull<u8>) -> io::Result<Option<NodeSet>> {
    const OF_ADDRESS: usize = 2; // MPOL_F_ADDR
    let mut mode = libc::MPOL_DEFAULT;
    let mut nodes = NodeSet([0; MAX_NODES / 64]);
    // SAFETY: both places hold what is written to them; the address is not dereferenced.
    let status = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            nodes.0.as_mut_ptr(),
            MAX_NODES + 1,
            address.as_ptr(),
            OF_ADDRESS,
        )
    };
    answer(status)?;
    Ok((mode != libc::MPOL_DEFAULT).then_some(nodes))
}

/// The node of each page that a range touches, first to last; `None`: not in memory.
///
/// Only looks into the page table: addresses that are not mapped are not in memory.
pub fn nodes_of_pages(address: *const u8, bytes: usize) -> io::Result<Vec<Option<usize>>> {
    const CHUNK: usize = 4096;
    if bytes == 0 {
        return Ok(Vec::new());
    }
    let first = address as usize & !(PAGE_BYTES - 1);
    let count = (address as usize + bytes - first).div_ceil(PAGE_BYTES);
    let mut nodes = Vec::with_capacity(count);
    while nodes.len() < count {
        let start = first + nodes.len() * PAGE_BYTES;
        let pages: Vec<usize> = (0..CHUNK.min(count - nodes.len()))
            .map(|page| start + page * PAGE_BYTES)
            .collect();
        let mut found: Vec<libc::c_int> = vec![-1; pages.len()];
        // SAFETY: without target nodes the call moves nothing; both arrays have `pages.len()`.
        let status = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                pages.len(),
                pages.as_ptr(),
                std::ptr::null::<libc::c_int>(),
                found.as_mut_ptr(),
                0,
            )
        };
        answer(status)?;
        nodes.extend(found.into_iter().map(|node| usize::try_from(node).ok()));
    }
    Ok(nodes)
}

/// Number of the CPU this thread runs on; it may run on another a moment later.
#[inline]
pub fn current_cpu() -> Option<usize> {
    // SAFETY: no preconditions.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

fn mode(policy: Policy) -> libc::c_int {
    match policy {
        Policy::Prefer => libc::MPOL_PREFERRED,
        Policy::Bind => libc::MPOL_BIND,
        Policy::Interleave => libc::MPOL_INTERLEAVE,
    }
}

fn answer(status: libc::c_long) -> io::Result<()> {
    if status == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// None where the kernel or a container refuses to place memory.
    fn on_node_0() -> Option<Placement> {
        let nodes = NodeSet::new(&[0]).unwrap();
        let placement = Placement {
            policy: Policy::Bind,
            nodes,
        };
        can_place(&placement).is_ok().then_some(placement)
    }

    #[test]
    fn a_set_holds_the_ids_it_was_made_of() {
        let set = NodeSet::new(&[0, 3, 63, 64, 255, 1023]).unwrap();
        assert_eq!(set.ids(), [0, 3, 63, 64, 255, 1023]);
        assert_eq!(NodeSet::new(&[1024]), None);
        assert_eq!(NodeSet::new(&[]).unwrap().ids(), [0usize; 0]);
    }

    #[test]
    fn pages_lie_on_the_node_they_were_placed_on() {
        let Some(placement) = on_node_0() else { return };
        let bytes = 8 * PAGE_BYTES;
        let pages = super::super::map_zeroed(bytes).unwrap();
        assert_eq!(placed_on(pages).unwrap(), None);
        // SAFETY: mapped above.
        unsafe { place(pages, bytes, &placement) }.unwrap();
        assert_eq!(placed_on(pages).unwrap(), Some(placement.nodes));
        // SAFETY: the second of eight pages mapped above.
        let second = unsafe { pages.add(PAGE_BYTES) };
        // SAFETY: as above.
        unsafe { second.write(1) };
        let nodes = nodes_of_pages(pages.as_ptr(), bytes).unwrap();
        assert_eq!(nodes[..3], [None, Some(0), None]);
        assert_eq!(nodes.len(), 8);
        // SAFETY: mapped above.
        unsafe { super::super::release(pages, bytes) };
    }

    #[test]
    fn a_thread_is_placed_alone() {
        let Some(placement) = on_node_0() else { return };
        let mode_here = || {
            let mut mode = -1;
            // SAFETY: the place holds the mode; no mask and no address is given.
            let status = unsafe {
                libc::syscall(
                    libc::SYS_get_mempolicy,
                    &raw mut mode,
                    0_usize,
                    0,
                    0_usize,
                    0,
                )
            };
            assert_eq!(status, 0);
            mode
        };
        let before = mode_here();
        let inside = std::thread::spawn(move || {
            place_thread(&placement).unwrap();
            mode_here()
        });
        assert_eq!(inside.join().unwrap(), libc::MPOL_BIND);
        assert_eq!(mode_here(), before);
    }

    #[test]
    fn a_node_that_is_not_there_is_refused() {
        let placement = Placement {
            policy: Policy::Prefer,
            nodes: NodeSet::new(&[MAX_NODES - 1]).unwrap(),
        };
        assert!(can_place(&placement).is_err());
    }

    #[test]
    fn this_thread_runs_somewhere() {
        assert!(current_cpu().is_some());
    }
}
