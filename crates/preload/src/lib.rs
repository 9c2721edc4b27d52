//! A process's malloc with Moirai's large-object heap: blocks from [`LARGE`] bytes on come from it,
//! smaller ones from glibc, whose bins and caches are at home there.
//!
//! For `LD_PRELOAD`. Nothing here runs Python. What the heap allocates for its own tables goes
//! straight to glibc ([`Direct`]), so that no call comes back in while the heap's lock is held.

#![cfg(all(target_os = "linux", target_env = "gnu"))]

use moirai_core::os;
use moirai_core::resource::large_object::{LargeObjectResource, Options};
use moirai_core::resource::{Ownership, Request, Resource, libc_heap};
use std::alloc::{GlobalAlloc, Layout};
use std::ffi::{c_int, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::OnceLock;

/// Blocks of at least so many bytes are the heap's. glibc serves smaller ones without the kernel.
const LARGE: usize = 64 * 1024;
/// What glibc may keep at the top of its own heap, and for how long it lies there unused.
const KEEP_BYTES: usize = 64 * 1024 * 1024;
const DECAY_MILLISECONDS: u64 = 500;

unsafe extern "C" {
    fn __libc_malloc(size: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
    fn __libc_realloc(address: *mut c_void, size: usize) -> *mut c_void;
    fn __libc_memalign(alignment: usize, size: usize) -> *mut c_void;
    fn __libc_free(address: *mut c_void);
}

/// glibc's malloc under its own names: the allocator of the code in this library.
struct Direct;

#[global_allocator]
static DIRECT: Direct = Direct;

// SAFETY: glibc's blocks are disjoint, as large as asked, aligned as asked by memalign, or to 16.
unsafe impl GlobalAlloc for Direct {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() <= 16 {
            // SAFETY: any size may be asked for.
            unsafe { __libc_malloc(layout.size()) }.cast()
        } else {
            // SAFETY: the alignment is a power of two.
            unsafe { __libc_memalign(layout.align(), layout.size()) }.cast()
        }
    }

    unsafe fn dealloc(&self, address: *mut u8, _layout: Layout) {
        // SAFETY: `alloc` got it from glibc.
        unsafe { __libc_free(address.cast()) }
    }
}

static HEAP: OnceLock<Option<LargeObjectResource>> = OnceLock::new();

/// The heap; made by the first large request. None if it cannot be: then glibc serves all.
fn heap() -> Option<&'static LargeObjectResource> {
    HEAP.get_or_init(|| {
        libc_heap::keep_warm(KEEP_BYTES, DECAY_MILLISECONDS);
        LargeObjectResource::new(Options::default()).ok()
    })
    .as_ref()
}

/// The heap and the address as it wants it, if the block is the heap's. Never reads the block.
fn owner(address: *mut c_void) -> Option<(&'static LargeObjectResource, NonNull<u8>)> {
    // Not made by a large request yet: then nothing is the heap's.
    let heap = HEAP.get()?.as_ref()?;
    let address = NonNull::new(address.cast::<u8>())?;
    (heap.owns(address) == Ownership::Yes).then_some((heap, address))
}

fn set_errno(error: c_int) {
    // SAFETY: glibc's errno of this thread is always there.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { place.write(error) };
}

fn no_memory() -> *mut c_void {
    set_errno(libc::ENOMEM);
    null_mut()
}

/// A large block; null with ENOMEM if there is none to be had.
fn draw(size: usize, alignment: usize, zeroed: bool) -> *mut c_void {
    let Some(heap) = heap() else {
        return no_memory();
    };
    let block = Request::new(size, alignment, zeroed).and_then(|request| heap.allocate(request));
    block.map_or_else(|_| no_memory(), |block| block.address.as_ptr().cast())
}

fn is_large(size: usize) -> bool {
    size >= LARGE && heap().is_some()
}

/// As in C.
#[unsafe(no_mangle)]
pub extern "C" fn malloc(size: usize) -> *mut c_void {
    if is_large(size) {
        return draw(size, 64, false);
    }
    // SAFETY: any size may be asked for.
    unsafe { __libc_malloc(size) }
}

/// As in C.
#[unsafe(no_mangle)]
pub extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    match count.checked_mul(size) {
        Some(bytes) if is_large(bytes) => draw(bytes, 64, true),
        // SAFETY: any count and size may be asked for; glibc checks the product.
        _ => unsafe { __libc_calloc(count, size) },
    }
}

/// As in C.
///
/// # Safety
/// `address` is null or a live block, and nothing uses the block any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(address: *mut c_void) {
    if let (Some(Some(heap)), Some(block)) = (HEAP.get(), NonNull::new(address.cast::<u8>())) {
        // free() keeps errno; giving memory back may set it.
        // SAFETY: glibc's errno of this thread is always there.
        let place = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        let kept = unsafe { place.read() };
        // SAFETY: the caller's promise, if the block is the heap's.
        let taken = unsafe { heap.take_back(block) };
        // SAFETY: as above.
        unsafe { place.write(kept) };
        if taken.is_some() {
            return;
        }
    }
    // SAFETY: the caller's promise; the block, if any, is glibc's.
    unsafe { __libc_free(address) }
}

/// As in C; a size of 0 frees, as glibc has it.
///
/// # Safety
/// `address` is null or a live block; unless null is returned for lack of memory, it is dead then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(address: *mut c_void, size: usize) -> *mut c_void {
    let Some((heap, block)) = owner(address) else {
        if address.is_null() || !is_large(size) {
            // SAFETY: the caller's promise; the block, if any, is glibc's.
            return unsafe { __libc_realloc(address, size) };
        }
        let old = glibc_usable_size(address);
        // SAFETY: the caller's promise.
        return unsafe { moved(address, old, draw(size, 64, false)) };
    };
    if size == 0 {
        // SAFETY: the caller's promise.
        unsafe { free(address) };
        return null_mut();
    }
    if size < LARGE {
        // SAFETY: a live block of the heap's.
        let old = unsafe { heap.block_bytes(block) };
        // SAFETY: any size may be asked for.
        let small = unsafe { __libc_malloc(size) };
        // SAFETY: the caller's promise.
        return unsafe { moved(address, old.min(size), small) };
    }
    // SAFETY: the caller's promise.
    match unsafe { heap.reallocate(block, size) } {
        Ok(block) => block.address.as_ptr().cast(),
        Err(_) => no_memory(),
    }
}

/// Copy `bytes` into `new` and free `old`; null, and nothing done, if `new` is null.
///
/// # Safety
/// `old` is a live block of at least `bytes`, and `new` is null or another one.
unsafe fn moved(old: *mut c_void, bytes: usize, new: *mut c_void) -> *mut c_void {
    if !new.is_null() {
        // SAFETY: the caller's promise; live blocks do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(old.cast::<u8>(), new.cast::<u8>(), bytes) };
        // SAFETY: the caller gave it up.
        unsafe { free(old) };
    }
    new
}

fn aligned(alignment: usize, size: usize) -> *mut c_void {
    if is_large(size) && alignment <= moirai_core::resource::MAX_ALIGNMENT {
        return draw(size, alignment, false);
    }
    // SAFETY: glibc rounds the alignment up to a power of two itself.
    unsafe { __libc_memalign(alignment, size) }
}

/// As in POSIX.
///
/// # Safety
/// `place` is a valid place for the answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(
    place: *mut *mut c_void,
    alignment: usize,
    size: usize,
) -> c_int {
    if !alignment.is_power_of_two() || alignment % size_of::<usize>() != 0 {
        return libc::EINVAL;
    }
    let block = aligned(alignment, size);
    if block.is_null() {
        return libc::ENOMEM;
    }
    // SAFETY: the caller's promise.
    unsafe { place.write(block) };
    0
}

/// As in C11.
#[unsafe(no_mangle)]
pub extern "C" fn aligned_alloc(alignment: usize, size: usize) -> *mut c_void {
    memalign(alignment, size)
}

/// As in glibc.
#[unsafe(no_mangle)]
pub extern "C" fn memalign(alignment: usize, size: usize) -> *mut c_void {
    if !alignment.is_power_of_two() {
        // SAFETY: glibc refuses or rounds what is no power of two.
        return unsafe { __libc_memalign(alignment, size) };
    }
    aligned(alignment, size)
}

/// As in glibc: aligned to a page.
#[unsafe(no_mangle)]
pub extern "C" fn valloc(size: usize) -> *mut c_void {
    aligned(os::PAGE_BYTES, size)
}

/// As in glibc: whole pages, aligned to one.
#[unsafe(no_mangle)]
pub extern "C" fn pvalloc(size: usize) -> *mut c_void {
    match size.checked_next_multiple_of(os::PAGE_BYTES) {
        Some(bytes) => aligned(os::PAGE_BYTES, bytes),
        None => no_memory(),
    }
}

/// glibc's `malloc_usable_size`, which has no second name to call it by.
fn glibc_usable_size(address: *mut c_void) -> usize {
    static NEXT: OnceLock<Option<unsafe extern "C" fn(*mut c_void) -> usize>> = OnceLock::new();
    let next = NEXT.get_or_init(|| {
        // SAFETY: a name with its terminator, looked up behind this library.
        let symbol = unsafe { libc::dlsym(libc::RTLD_NEXT, c"malloc_usable_size".as_ptr()) };
        // SAFETY: null, or the function of this signature; an Option of one is null or it.
        unsafe { std::mem::transmute(symbol) }
    });
    // SAFETY: the block, if any, is glibc's. 0 is what glibc says of no block.
    next.map_or(0, |next| unsafe { next(address) })
}

/// As in glibc.
///
/// # Safety
/// `address` is null or a live block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(address: *mut c_void) -> usize {
    match owner(address) {
        // SAFETY: a live block of the heap's.
        Some((heap, block)) => unsafe { heap.block_bytes(block) },
        None => glibc_usable_size(address),
    }
}
