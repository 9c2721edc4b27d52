//! libc's heap as a resource: what a program would use without us, aligned.

use super::{Block, HealthReport, LAZY_ZERO_BYTES, Ownership, Request, Resource, Statistics};
use crate::error::{Error, Result};
use crate::os;
use crate::resource::statistics::Counters;
use std::ptr::NonNull;

/// Draws every block from libc. libc does not say what it reuses, so every block is a miss.
#[derive(Default)]
pub struct SystemResource {
    counters: Counters,
}

impl SystemResource {
    /// A resource over the process's malloc.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Make `size` bytes read as zero: small blocks by writing, large ones by fresh pages.
fn zero(address: NonNull<u8>, size: usize) {
    let start = address.as_ptr() as usize;
    let first_page = start.next_multiple_of(os::PAGE_BYTES);
    let last_page = (start + size) & !(os::PAGE_BYTES - 1);
    let lazy = size >= LAZY_ZERO_BYTES && {
        let pages = NonNull::new(first_page as *mut u8).expect("inside a live block");
        // SAFETY: whole pages inside a block of ours that nobody has seen yet.
        unsafe { os::decommit(pages, last_page - first_page) }
    };
    if lazy {
        // SAFETY: the part of the block before the decommitted pages.
        unsafe { address.write_bytes(0, first_page - start) };
        // SAFETY: `last_page` is inside the block or one past its end.
        let tail = unsafe { address.add(last_page - start) };
        // SAFETY: the part of the block behind the decommitted pages.
        unsafe { tail.write_bytes(0, start + size - last_page) };
    } else {
        // SAFETY: the block has `size` bytes and nobody has seen it yet.
        unsafe { address.write_bytes(0, size) };
    }
}

// SAFETY: libc's blocks are as large and aligned as asked, disjoint, and live until freed.
unsafe impl Resource for SystemResource {
    fn name(&self) -> &'static str {
        "SystemResource"
    }

    fn allocate(&self, request: Request) -> Result<Block> {
        let address = os::libc_allocate(request.size(), request.alignment())
            .ok_or_else(|| Error::out_of_memory(request.size(), "the system has no more memory"))?;
        if request.zeroed() {
            zero(address, request.size());
        }
        // SAFETY: allocated above.
        let size = unsafe { os::libc_block_bytes(address) };
        self.counters.allocated(size, false);
        Ok(Block {
            address,
            size,
            reused: false,
        })
    }

    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise.
        let size = unsafe { os::libc_block_bytes(address) };
        // SAFETY: the caller's promise.
        unsafe { os::libc_deallocate(address) };
        self.counters.freed(size);
        size
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise.
        unsafe { os::libc_block_bytes(address) }
    }

    fn owns(&self, _address: NonNull<u8>) -> Ownership {
        Ownership::Unknown
    }

    fn statistics(&self) -> Statistics {
        let counts = self.counters.read();
        Statistics {
            resident_bytes: counts.current_bytes,
            ..counts
        }
    }

    fn cached_bytes(&self) -> usize {
        0
    }

    fn trim(&self, _target_bytes: usize) -> usize {
        let before = os::resident_bytes();
        os::libc_trim();
        before.saturating_sub(os::resident_bytes())
    }

    fn check(&self, report: &mut HealthReport) {
        self.counters.check(self.name(), report);
    }
}
