//! From an address to what stands there: a two-level table over the 48-bit address space.
//!
//! Reading takes no lock and never touches the address itself, so that a foreign pointer is
//! recognised as such. Writers hold the lock of whoever owns the map. Tables are fresh pages, so
//! only what is used takes memory.

use crate::os;
use crate::sync::{AtomicU64, Lock, Ordering, Published};
use std::ptr::NonNull;

const ADDRESS_BITS: u32 = 48;

/// Maps each granule of `1 << SHIFT` bytes to a word; 0 means nothing.
pub(crate) struct AddressMap<const SHIFT: u32> {
    /// `1 << root_bits` entries; each leaf has `1 << leaf_bits` words and lives as long as the map.
    root: NonNull<Published<AtomicU64>>,
    /// Every leaf, so that dropping the map need not read the root's untouched pages.
    leaves: Lock<Vec<NonNull<u8>>>,
}

// SAFETY: all access is through atomics; the tables are freed only in `drop`.
unsafe impl<const SHIFT: u32> Send for AddressMap<SHIFT> {}
// SAFETY: as above.
unsafe impl<const SHIFT: u32> Sync for AddressMap<SHIFT> {}

impl<const SHIFT: u32> AddressMap<SHIFT> {
    const LEAF_BITS: u32 = (ADDRESS_BITS - SHIFT) / 2;
    const ROOT_BITS: u32 = ADDRESS_BITS - SHIFT - Self::LEAF_BITS;
    const ROOT_BYTES: usize = size_of::<Published<AtomicU64>>() << Self::ROOT_BITS;
    const LEAF_BYTES: usize = size_of::<AtomicU64>() << Self::LEAF_BITS;

    /// An empty map, or `None` if there is no address space for its root.
    pub(crate) fn new() -> Option<Self> {
        Some(AddressMap {
            root: os::map_zeroed(Self::ROOT_BYTES)?.cast(),
            leaves: Lock::new(Vec::new()),
        })
    }

    #[inline]
    fn slot(&self, address: usize) -> Option<(&Published<AtomicU64>, usize)> {
        let granule = address >> SHIFT;
        let root_index = granule >> Self::LEAF_BITS;
        if root_index >> Self::ROOT_BITS != 0 {
            return None;
        }
        // SAFETY: `root_index < 1 << ROOT_BITS`, the length of the root.
        let entry = unsafe { self.root.add(root_index) };
        // SAFETY: all-zero bytes are a valid `Published`, and the root lives as long as `self`.
        let entry = unsafe { entry.as_ref() };
        Some((entry, granule & ((1 << Self::LEAF_BITS) - 1)))
    }

    /// The word of the granule that holds `address`.
    #[inline]
    pub(crate) fn get(&self, address: usize) -> u64 {
        let Some((entry, index)) = self.slot(address) else {
            return 0;
        };
        let leaf = entry.get();
        if leaf.is_null() {
            return 0;
        }
        // SAFETY: `index` is masked to the leaf's length.
        let word = unsafe { leaf.add(index) };
        // SAFETY: leaves live as long as the map, and zero bytes are a valid atomic.
        unsafe { &*word }.load(Ordering::Acquire)
    }

    /// Set the word of one granule; false if there is no memory for its table.
    pub(crate) fn set(&self, address: usize, value: u64) -> bool {
        let Some((entry, index)) = self.slot(address) else {
            return false;
        };
        let mut leaf = entry.get();
        if leaf.is_null() {
            let Some(fresh) = os::map_zeroed(Self::LEAF_BYTES) else {
                return false;
            };
            leaf = match entry.publish(fresh.as_ptr().cast()) {
                Ok(()) => {
                    self.leaves.lock().push(fresh);
                    fresh.as_ptr().cast()
                }
                Err(first) => {
                    // SAFETY: the mapping made above was not published.
                    unsafe { os::release(fresh, Self::LEAF_BYTES) };
                    first
                }
            };
        }
        // SAFETY: `index` is masked to the leaf's length.
        let word = unsafe { leaf.add(index) };
        // SAFETY: leaves live as long as the map.
        unsafe { &*word }.store(value, Ordering::Release);
        true
    }
}

impl<const SHIFT: u32> Drop for AddressMap<SHIFT> {
    fn drop(&mut self) {
        for leaf in std::mem::take(self.leaves.get_mut()) {
            // SAFETY: the leaf was mapped by `set`, and `&mut self` excludes readers.
            unsafe { os::release(leaf, Self::LEAF_BYTES) };
        }
        // SAFETY: mapped by `new`; nothing reads it any more.
        unsafe { os::release(self.root.cast(), Self::ROOT_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_address_maps_to_nothing() {
        let map = AddressMap::<12>::new().unwrap();
        let local = 0u8;
        assert_eq!(map.get(&raw const local as usize), 0);
        assert_eq!(map.get(usize::MAX), 0);
        assert!(!map.set(usize::MAX, 1));
    }

    #[test]
    fn each_granule_keeps_its_own_word() {
        let map = AddressMap::<16>::new().unwrap();
        for index in 0..100u64 {
            assert!(map.set(
                0x7000_0000_0000 + (index as usize) * 65536 * 1000,
                index + 1
            ));
        }
        for index in 0..100u64 {
            let address = 0x7000_0000_0000 + (index as usize) * 65536 * 1000;
            assert_eq!(map.get(address + 65535), index + 1);
            assert_eq!(map.get(address + 65536), 0);
        }
    }
}
