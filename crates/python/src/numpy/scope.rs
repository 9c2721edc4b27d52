//! `use`: NumPy draws from a resource in one context, and the arrays keep it alive.

use super::abi::{self, Allocator, CAPSULE_NAME, Handler};
use super::install;
use crate::errors::InvalidArgument;
use crate::resource::Resource;
use moirai_core::resource as core;
use moirai_core::resource::Request;
use moirai_core::sync::Lock;
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{c_char, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

/// What a capsule of ours points to. `handler` is first, so that a pointer to one is one to both.
#[repr(C)]
struct Drawn {
    handler: Handler,
    core: Arc<dyn core::Resource>,
    resource: Py<Resource>,
}

unsafe extern "C" fn malloc(context: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: NumPy passes the context of a handler whose capsule it holds.
    draw(unsafe { resource_of(context) }, size, false)
}

unsafe extern "C" fn calloc(context: *mut c_void, count: usize, size: usize) -> *mut c_void {
    let Some(bytes) = count.checked_mul(size) else {
        return null_mut();
    };
    // SAFETY: as in `malloc`.
    draw(unsafe { resource_of(context) }, bytes, true)
}

unsafe extern "C" fn realloc(
    context: *mut c_void,
    address: *mut c_void,
    size: usize,
) -> *mut c_void {
    // SAFETY: as in `malloc`.
    let resource = unsafe { resource_of(context) };
    let Some(address) = NonNull::new(address.cast()) else {
        return draw(resource, size, false);
    };
    // SAFETY: NumPy resizes blocks with the handler that made them.
    match unsafe { resource.reallocate(address, size) } {
        Ok(block) => block.address.as_ptr().cast(),
        Err(_) => null_mut(),
    }
}

/// The size NumPy passes is a guess and not looked at: the resource knows its blocks.
unsafe extern "C" fn free(context: *mut c_void, address: *mut c_void, _size: usize) {
    let Some(address) = NonNull::new(address.cast()) else {
        return;
    };
    // SAFETY: as in `malloc`.
    let resource = unsafe { resource_of(context) };
    // SAFETY: NumPy frees blocks with the handler that made them, when nothing uses them.
    unsafe { resource.deallocate(address) };
}

/// # Safety
/// `context` is a `Drawn` whose capsule is alive.
unsafe fn resource_of<'a>(context: *mut c_void) -> &'a dyn core::Resource {
    // SAFETY: the caller's promise.
    let drawn = unsafe { &*context.cast::<Drawn>() };
    &*drawn.core
}

/// A block for NumPy, or null: it raises MemoryError then.
#[inline]
pub(super) fn draw(resource: &dyn core::Resource, size: usize, zeroed: bool) -> *mut c_void {
    let address = if zeroed {
        let block = Request::new(size, 1, true).and_then(|request| resource.allocate(request));
        block.ok().map(|block| block.address)
    } else {
        resource.draw(size)
    };
    address.map_or(null_mut(), |address| address.as_ptr().cast())
}

/// A name field as NumPy wants it.
pub(super) fn handler_name(name: &str) -> [c_char; 127] {
    let mut field = [0; 127];
    for (place, byte) in field.iter_mut().zip(name.bytes().take(126)) {
        *place = byte as c_char;
    }
    field
}

unsafe extern "C" fn drop_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: called by the interpreter for a capsule of `new_capsule`.
    let pointer = unsafe { ffi::PyCapsule_GetPointer(capsule, CAPSULE_NAME.as_ptr()) };
    if !pointer.is_null() {
        // SAFETY: leaked by `new_capsule`; nothing holds the capsule any more.
        drop(unsafe { Box::from_raw(pointer.cast::<Drawn>()) });
    }
}

fn new_capsule(resource: &Bound<'_, Resource>) -> PyResult<Py<PyAny>> {
    let core = Arc::clone(resource.get().core());
    let mut drawn = Box::new(Drawn {
        handler: Handler {
            name: handler_name(core.name()),
            version: 1,
            allocator: Allocator {
                context: null_mut(),
                malloc,
                calloc,
                realloc,
                free,
            },
        },
        core,
        resource: resource.clone().unbind(),
    });
    drawn.handler.allocator.context = (&raw mut *drawn).cast();
    let pointer = Box::into_raw(drawn);
    // SAFETY: the pointer is not null, the name is static, the destructor takes what was leaked.
    let capsule =
        unsafe { ffi::PyCapsule_New(pointer.cast(), CAPSULE_NAME.as_ptr(), Some(drop_capsule)) };
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(resource.py(), capsule) }.map(Bound::unbind)
}

/// Makes NumPy draw from `resource` in the current context between enter and exit.
///
/// May be entered again, also in other threads and tasks, before it is left.
#[pyclass(frozen, subclass, name = "use", module = "moirai.memory")]
pub struct Use {
    /// The resource NumPy draws from inside.
    #[pyo3(get)]
    resource: Py<Resource>,
    capsule: Py<PyAny>,
    variable: &'static Py<PyAny>,
    /// Tokens of the contexts that are inside, oldest first.
    tokens: Lock<Vec<Py<PyAny>>>,
}

#[pymethods]
impl Use {
    #[new]
    fn new(resource: &Bound<'_, Resource>) -> PyResult<Self> {
        Ok(Use {
            variable: &abi::numpy(resource.py())?.current,
            capsule: new_capsule(resource)?,
            resource: resource.clone().unbind(),
            tokens: Lock::new(Vec::new()),
        })
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        let this = slf.get();
        // SAFETY: a context variable and a live object.
        let token = unsafe { ffi::PyContextVar_Set(this.variable.as_ptr(), this.capsule.as_ptr()) };
        // SAFETY: a new reference, or null with an exception set.
        let token = unsafe { Bound::from_owned_ptr_or_err(slf.py(), token) }?;
        this.tokens.lock().push(token.unbind());
        Ok(slf.clone())
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(
        &self,
        py: Python<'_>,
        _exception: &Bound<'_, pyo3::types::PyTuple>,
    ) -> PyResult<()> {
        // Usually the newest token; other threads and tasks may have entered since, and their tokens
        // only serve them. A token leaves the list when it has served.
        let mut foreign: Vec<Py<PyAny>> = Vec::new();
        let untried = |foreign: &[Py<PyAny>]| {
            let tokens = self.tokens.lock();
            let mut newest_first = tokens.iter().rev();
            newest_first
                .find(|token| !foreign.iter().any(|other| other.is(*token)))
                .map(|token| token.clone_ref(py))
        };
        while let Some(token) = untried(&foreign) {
            // SAFETY: the variable and a token of it.
            let status = unsafe { ffi::PyContextVar_Reset(self.variable.as_ptr(), token.as_ptr()) };
            if status == 0 {
                let mut tokens = self.tokens.lock();
                let place = tokens.iter().rposition(|other| other.is(&token));
                let served = place.map(|place| tokens.remove(place));
                drop(tokens);
                drop(served);
                return Ok(());
            }
            drop(PyErr::take(py));
            foreign.push(token);
        }
        Err(PyRuntimeError::new_err(if foreign.is_empty() {
            "use: left more often than entered"
        } else {
            "use: must be left in the context (thread, task) in which it was entered"
        }))
    }
}

/// The resource an array's memory came from, or None if it is NumPy's own or another library's.
#[pyfunction]
pub fn handler_of(array: &Bound<'_, PyAny>) -> PyResult<Option<Py<Resource>>> {
    let py = array.py();
    let numpy = abi::numpy(py)?;
    let owner = numpy.owner(array)?;
    let Some((capsule, data)) = numpy.handler(&owner) else {
        return Ok(None);
    };
    // SAFETY: an object and a static name; the call checks both.
    let pointer = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), CAPSULE_NAME.as_ptr()) };
    if pointer.is_null() {
        return Err(
            PyErr::take(py).unwrap_or_else(|| InvalidArgument::new_err("array: no handler"))
        );
    }
    // SAFETY: every capsule of this name holds a handler.
    let allocator = unsafe { (*pointer.cast::<Handler>()).allocator };
    if std::ptr::fn_addr_eq(allocator.malloc, malloc as unsafe extern "C" fn(_, _) -> _) {
        // SAFETY: a handler with our function is the head of a `Drawn`.
        let drawn = unsafe { &*pointer.cast::<Drawn>() };
        return Ok(Some(drawn.resource.clone_ref(py)));
    }
    Ok(NonNull::new(data).and_then(|data| install::owner_of(py, data)))
}
