//! `install`: every thread's default handler draws from a resource.
//!
//! NumPy's default handler is a capsule that every context without a handler of its own uses.
//! Installing makes the capsule point to a handler of ours, which keeps NumPy's functions for what
//! it does not own: arrays made before are freed by NumPy, arrays made under ours by us, whenever
//! and in whatever order. Uninstalling makes new arrays NumPy's again; our handler stays in place
//! to free what is ours. The same works on NumPy 2.5, where array data otherwise goes through
//! `PyMem_RawMalloc`.

use super::abi::{self, Allocator, CAPSULE_NAME, Handler};
use super::scope::draw;
use crate::errors::InvalidArgument;
use crate::lane;
use crate::resource::Resource;
use moirai_core::resource as core;
use moirai_core::resource::composite::share;
use moirai_core::resource::ledger::LedgerAdaptor;
use moirai_core::resource::priority::Lane;
use moirai_core::sync::Lock;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// One resource that is or was installed. Leaked: a few words for each `install`.
struct Installed {
    core: Arc<dyn core::Resource>,
    /// The lane of contexts that chose none, if the resource has lanes.
    lane: Option<Lane>,
    resource: Py<Resource>,
    /// Whether it tells its own blocks from those that others drew from the same memory.
    is_exact: bool,
    /// Whether one that does was installed over its memory: that one is to be asked first. Set before
    /// that one is `ACTIVE`, so whoever has a block of it sees this: `Relaxed` suffices.
    is_overlaid: AtomicBool,
}

impl Installed {
    fn new(resource: &Bound<'_, Resource>, ever: &[&'static Installed]) -> Self {
        let core = resource.get().core();
        let overlaid = ever.iter().filter(|other| share(&other.core, core));
        let is_shared = overlaid
            .map(|other| other.is_overlaid.store(true, Ordering::Relaxed))
            .count()
            > 0;
        let core = if is_shared {
            Arc::new(LedgerAdaptor::new(Arc::clone(core)))
        } else {
            LedgerAdaptor::where_needed(Arc::clone(core))
        };
        Installed {
            is_exact: !Arc::ptr_eq(&core, resource.get().core()),
            core,
            lane: resource.get().has_lanes().then_some(Lane::Normal),
            resource: resource.clone().unbind(),
            is_overlaid: AtomicBool::new(false),
        }
    }
}

/// NumPy's own functions, as they were before the first `install`.
static ORIGINAL: OnceLock<OriginalAllocator> = OnceLock::new();
/// The resource new arrays draw from, or null: NumPy's own functions.
static ACTIVE: AtomicPtr<Installed> = AtomicPtr::new(null_mut());
/// All that were ever installed, those last that are to be asked first: the exact ones, of which each
/// knows its own blocks, and among both kinds the newest. Any may still have live arrays.
static EVER: Lock<Vec<&'static Installed>> = Lock::new(Vec::new());
/// Serialises `install` and `uninstall`.
static CHANGING: Lock<()> = Lock::new(());

struct OriginalAllocator(Allocator);

// SAFETY: the functions are NumPy's and may be called from any thread; the context is not read.
unsafe impl Send for OriginalAllocator {}
// SAFETY: as above.
unsafe impl Sync for OriginalAllocator {}

fn original() -> &'static Allocator {
    &ORIGINAL
        .get()
        .expect("our functions stand in NumPy's handler only after ORIGINAL is set")
        .0
}

#[inline]
fn active() -> Option<&'static Installed> {
    let active = ACTIVE.load(Ordering::Acquire);
    // SAFETY: entries are leaked, so the pointer is null or valid for good.
    unsafe { active.as_ref() }
}

unsafe extern "C" fn malloc(_context: *mut c_void, size: usize) -> *mut c_void {
    let Some(installed) = active() else {
        let numpy = original();
        // SAFETY: NumPy's function with NumPy's context.
        return unsafe { (numpy.malloc)(numpy.context, size) };
    };
    let data = lane::within(installed.lane, || draw(&*installed.core, size, false));
    if size >= LARGE_BYTES && !data.is_null() {
        largest::note(size);
    }
    data
}

unsafe extern "C" fn calloc(_context: *mut c_void, count: usize, size: usize) -> *mut c_void {
    let Some(installed) = active() else {
        let numpy = original();
        // SAFETY: NumPy's function with NumPy's context.
        return unsafe { (numpy.calloc)(numpy.context, count, size) };
    };
    let Some(bytes) = count.checked_mul(size) else {
        return null_mut();
    };
    let data = lane::within(installed.lane, || draw(&*installed.core, bytes, true));
    if bytes >= LARGE_BYTES && !data.is_null() {
        largest::note(bytes);
    }
    data
}

unsafe extern "C" fn free(_context: *mut c_void, address: *mut c_void, size: usize) {
    let Some(block) = NonNull::new(address.cast()) else {
        return;
    };
    let is_first = |installed: &&Installed| {
        installed.is_exact || !installed.is_overlaid.load(Ordering::Relaxed)
    };
    if let Some(installed) = active().filter(is_first) {
        // SAFETY: NumPy gives the block up; if it is not ours, nothing is done.
        if unsafe { installed.core.take_back(block) }.is_some() {
            return;
        }
    }
    // SAFETY: as above.
    if !unsafe { free_retired(block) } {
        let numpy = original();
        // SAFETY: not ours, so it was made by NumPy's functions.
        unsafe { (numpy.free)(numpy.context, address, size) };
    }
}

/// Free a block of a resource that is not active any more, or over whose memory others were installed.
///
/// # Safety
/// If the block is one of ours, nothing uses it any more.
unsafe fn free_retired(block: NonNull<u8>) -> bool {
    EVER.lock().iter().rev().any(|installed| {
        // SAFETY: the caller's promise.
        unsafe { installed.core.take_back(block) }.is_some()
    })
}

unsafe extern "C" fn realloc(
    context: *mut c_void,
    address: *mut c_void,
    size: usize,
) -> *mut c_void {
    let Some(block) = NonNull::new(address.cast::<u8>()) else {
        // SAFETY: as NumPy's own call would be.
        return unsafe { malloc(context, size) };
    };
    let owner = EVER
        .lock()
        .iter()
        .rev()
        .copied()
        .find(|installed| installed.core.owns(block) == core::Ownership::Yes);
    let Some(installed) = owner else {
        let numpy = original();
        // SAFETY: not ours, so it was made by NumPy's functions.
        return unsafe { (numpy.realloc)(numpy.context, address, size) };
    };
    // SAFETY: a live block of this resource, which NumPy resizes.
    let resize = || unsafe { installed.core.reallocate(block, size) };
    match lane::within(installed.lane, resize) {
        Ok(block) => block.address.as_ptr().cast(),
        Err(_) => null_mut(),
    }
}

/// Put our functions behind NumPy's default capsule, once.
fn take_over(py: Python<'_>) -> PyResult<()> {
    if ORIGINAL.get().is_some() {
        return Ok(());
    }
    let capsule = abi::numpy(py)?.default_capsule().as_ptr();
    // SAFETY: NumPy's default capsule and the name all handlers have; the call checks both.
    let pointer = unsafe { ffi::PyCapsule_GetPointer(capsule, CAPSULE_NAME.as_ptr()) };
    if pointer.is_null() {
        return Err(PyErr::fetch(py));
    }
    let numpy = pointer.cast::<Handler>();
    // SAFETY: NumPy's handler is static and nothing but `take_over` replaces it.
    let handler = unsafe { numpy.read() };
    let _ = ORIGINAL.set(OriginalAllocator(handler.allocator));
    // The name stays NumPy's: programs (and its own tests) ask for it.
    let ours = Box::leak(Box::new(Handler {
        allocator: Allocator {
            context: null_mut(),
            malloc,
            calloc,
            realloc,
            free,
        },
        ..handler
    }));
    // SAFETY: a live capsule and a pointer that is never freed; one word is stored, so a thread
    // that reads meanwhile sees the old handler or the new one, and each frees the other's arrays.
    if unsafe { ffi::PyCapsule_SetPointer(capsule, (&raw mut *ours).cast()) } != 0 {
        return Err(PyErr::fetch(py));
    }
    Ok(())
}

/// Draw every array of the process from `resource`, in new threads too.
#[pyfunction]
#[pyo3(signature = (resource, *, replace=false))]
pub fn install(resource: &Bound<'_, Resource>, replace: bool) -> PyResult<()> {
    let py = resource.py();
    abi::numpy(py)?;
    let _changing = CHANGING.lock();
    if let Some(installed) = active() {
        if !replace {
            return Err(InvalidArgument::new_err(format!(
                "resource: {} is installed already; uninstall() it first or pass replace=True",
                installed.core.name()
            )));
        }
    }
    let mut ever = EVER.lock();
    let known = ever
        .iter()
        .copied()
        .find(|entry| entry.resource.is(resource));
    let entry = known.unwrap_or_else(|| {
        let entry: &'static Installed = Box::leak(Box::new(Installed::new(resource, &ever)));
        let place = if entry.is_exact {
            ever.len()
        } else {
            ever.partition_point(|other| !other.is_exact)
        };
        ever.insert(place, entry);
        entry
    });
    drop(ever);
    take_over(py)?;
    ACTIVE.store(std::ptr::from_ref(entry).cast_mut(), Ordering::Release);
    Ok(())
}

/// Let NumPy serve new arrays itself again; arrays made meanwhile stay valid.
#[pyfunction]
pub fn uninstall() {
    let _changing = CHANGING.lock();
    ACTIVE.store(null_mut(), Ordering::Release);
}

/// The resource that is installed, or None.
#[pyfunction]
pub fn installed(py: Python<'_>) -> Option<Py<Resource>> {
    active().map(|installed| installed.resource.clone_ref(py))
}

/// The resource that owns an array's data under the default handler.
pub(super) fn owner_of(py: Python<'_>, data: NonNull<u8>) -> Option<Py<Resource>> {
    let ever = EVER.lock();
    let owner = ever
        .iter()
        .rev()
        .find(|entry| entry.core.owns(data) == core::Ownership::Yes);
    owner.map(|entry| entry.resource.clone_ref(py))
}

/// (bytes, times seen, "file:line" or None) of the largest arrays made while installed.
#[pyfunction]
pub fn largest_arrays() -> Vec<(usize, u64, Option<String>)> {
    largest::all()
}

/// Arrays below this size are not considered for the largest.
const LARGE_BYTES: usize = 1024 * 1024;

/// The few largest sizes, each with the place in the program that first asked for it.
mod largest {
    use super::{AtomicUsize, LARGE_BYTES, Lock, Ordering};
    use crate::site;
    use pyo3::ffi;
    use pyo3::prelude::*;

    const KEPT: usize = 5;

    static RECORDS: Lock<Vec<(usize, u64, Option<String>)>> = Lock::new(Vec::new());
    /// Sizes at most this need not be looked at. Only ever grows, so a stale value costs a lookup.
    static FLOOR: AtomicUsize = AtomicUsize::new(LARGE_BYTES - 1);

    pub(super) fn note(size: usize) {
        if size <= FLOOR.load(Ordering::Relaxed) {
            return;
        }
        if let Some(record) = RECORDS.lock().iter_mut().find(|record| record.0 == size) {
            record.1 += 1;
            return;
        }
        // SAFETY: no preconditions. Without the interpreter no frame can be looked at.
        let attached = unsafe { ffi::PyGILState_Check() } == 1;
        // While the interpreter ends, finalisers still make arrays, but it is not to be attached to.
        let site = if attached {
            Python::try_attach(site::current).flatten()
        } else {
            None
        };
        let mut records = RECORDS.lock();
        if let Some(record) = records.iter_mut().find(|record| record.0 == size) {
            record.1 += 1; // by another thread meanwhile
            return;
        }
        records.push((size, 1, site));
        records.sort_by_key(|record| std::cmp::Reverse(record.0));
        records.truncate(KEPT);
        if records.len() == KEPT {
            FLOOR.store(records[KEPT - 1].0 - 1, Ordering::Relaxed);
        }
    }

    pub(super) fn all() -> Vec<(usize, u64, Option<String>)> {
        RECORDS.lock().clone()
    }
}
