//! One owned block: given back to its resource when dropped, in whichever thread that is.

use crate::error::Result;
use crate::resource::{Request, Resource};
use std::ptr::NonNull;
use std::sync::Arc;

/// Owns a block and keeps its resource alive.
pub struct Buffer {
    resource: Arc<dyn Resource>,
    address: NonNull<u8>,
    size: usize,
    block_size: usize,
}

// SAFETY: the block is plain memory that only this buffer owns; `Resource` is `Send + Sync`.
unsafe impl Send for Buffer {}
// SAFETY: `&Buffer` gives no access to the contents but through raw pointers.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Draw a block of `size` bytes from `resource`.
    pub fn new(
        resource: Arc<dyn Resource>,
        size: usize,
        alignment: usize,
        zeroed: bool,
    ) -> Result<Self> {
        let block = resource.allocate(Request::new(size, alignment, zeroed)?)?;
        Ok(Buffer {
            resource,
            address: block.address,
            size,
            block_size: block.size,
        })
    }

    /// Draw a buffer for each of `sizes`, or none at all.
    ///
    /// Every size is looked at before anything is taken.
    pub fn group(
        resource: &Arc<dyn Resource>,
        sizes: &[usize],
        alignment: usize,
        zeroed: bool,
    ) -> Result<Vec<Self>> {
        let requests = sizes
            .iter()
            .map(|size| Request::new(*size, alignment, zeroed))
            .collect::<Result<Vec<_>>>()?;
        let blocks = resource.allocate_group(&requests)?;
        debug_assert_eq!(blocks.len(), sizes.len());
        let buffers = blocks.into_iter().zip(sizes).map(|(block, size)| Buffer {
            resource: Arc::clone(resource),
            address: block.address,
            size: *size,
            block_size: block.size,
        });
        Ok(buffers.collect())
    }

    /// First byte of the block.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Bytes asked for.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Bytes of the block, at least [`Buffer::size`].
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Where the block came from.
    pub fn resource(&self) -> &Arc<dyn Resource> {
        &self.resource
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: this buffer owns the block, and views hold the buffer.
        unsafe { self.resource.deallocate(self.address) };
    }
}
