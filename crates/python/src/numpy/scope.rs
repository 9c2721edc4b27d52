//! `use`: NumPy draws from a resource in one context, and the arrays keep it alive.

use super::abi::{self, Allocator, CAPSULE_NAME, Handler};
use super::entered::Entered;
use super::install;
use crate::lane;
use crate::resource::Resource;
use moirai_core::resource as core;
use moirai_core::resource::Request;
use moirai_core::resource::priority::Lane;
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::ffi::{c_char, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

/// What a capsule of ours points to. `handler` is first, so that a pointer to one is one to both.
#[repr(C)]
struct Drawn {
    handler: Handler,
    core: Arc<dyn core::Resource>,
    /// Where its arrays come from, if the resource has lanes.
    lane: Option<Lane>,
    resource: Py<Resource>,
}

unsafe extern "C" fn malloc(context: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: NumPy passes the context of a handler whose capsule it holds.
    let drawn = unsafe { drawn_of(context) };
    lane::within(drawn.lane, || draw(&*drawn.core, size, false))
}

unsafe extern "C" fn calloc(context: *mut c_void, count: usize, size: usize) -> *mut c_void {
    let Some(bytes) = count.checked_mul(size) else {
        return null_mut();
    };
    // SAFETY: as in `malloc`.
    let drawn = unsafe { drawn_of(context) };
    lane::within(drawn.lane, || draw(&*drawn.core, bytes, true))
}

unsafe extern "C" fn realloc(
    context: *mut c_void,
    address: *mut c_void,
    size: usize,
) -> *mut c_void {
    // SAFETY: as in `malloc`.
    let drawn = unsafe { drawn_of(context) };
    let Some(address) = NonNull::new(address.cast()) else {
        return lane::within(drawn.lane, || draw(&*drawn.core, size, false));
    };
    // SAFETY: NumPy resizes blocks with the handler that made them.
    let resize = || unsafe { drawn.core.reallocate(address, size) };
    match lane::within(drawn.lane, resize) {
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
    let drawn = unsafe { drawn_of(context) };
    // SAFETY: NumPy frees blocks with the handler that made them, when nothing uses them.
    unsafe { drawn.core.deallocate(address) };
}

/// # Safety
/// `context` is a `Drawn` whose capsule is alive.
unsafe fn drawn_of<'a>(context: *mut c_void) -> &'a Drawn {
    // SAFETY: the caller's promise.
    unsafe { &*context.cast::<Drawn>() }
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
        let drawn = unsafe { Box::from_raw(pointer.cast::<Drawn>()) };
        // The caller is attached, but PyO3 does not know: it would keep the resource, with all that
        // it has, until this package is called the next time.
        Python::try_attach(|_| drop(drawn));
    }
}

fn new_capsule(resource: &Bound<'_, Resource>, lane: Option<Lane>) -> PyResult<Py<PyAny>> {
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
        lane,
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
    /// Made when first needed: one for each lane, or one alone for a resource without lanes.
    capsules: [PyOnceLock<Py<PyAny>>; Lane::ALL.len()],
    variable: &'static Py<PyAny>,
    entered: Entered,
}

impl Use {
    /// Set the resource in the current context for good, which nobody else is in; and the lane, for
    /// a resource with lanes.
    pub(crate) fn settle(slf: &Bound<'_, Self>, lane: Option<Lane>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let set = |variable: &Py<PyAny>, value: &Bound<'_, PyAny>| {
            variable.call_method1(py, intern!(py, "set"), (value,))
        };
        if let Some(lane) = lane.filter(|_| this.resource.get().has_lanes()) {
            set(
                lane::variable(py)?,
                (lane as u8).into_pyobject(py)?.as_any(),
            )?;
        }
        set(this.variable, this.capsule(py)?.bind(py))?;
        Ok(())
    }

    /// The handler for the lane of the current context.
    fn capsule(&self, py: Python<'_>) -> PyResult<&Py<PyAny>> {
        let resource = self.resource.bind(py);
        let lane = resource.get().has_lanes().then(|| lane::current(py));
        let lane = lane.transpose()?;
        let place = &self.capsules[lane.map_or(0, |lane| lane as usize)];
        place.get_or_try_init(py, || new_capsule(resource, lane))
    }
}

#[pymethods]
impl Use {
    #[new]
    fn new(resource: &Bound<'_, Resource>) -> PyResult<Self> {
        Ok(Use {
            variable: &abi::numpy(resource.py())?.current,
            capsules: std::array::from_fn(|_| PyOnceLock::new()),
            resource: resource.clone().unbind(),
            entered: Entered::default(),
        })
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        let (py, this) = (slf.py(), slf.get());
        let capsule = this.capsule(py)?;
        this.entered.set(py, (this.variable, capsule), None)?;
        Ok(slf.clone())
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(
        &self,
        py: Python<'_>,
        _exception: &Bound<'_, pyo3::types::PyTuple>,
    ) -> PyResult<()> {
        self.entered.leave(py, "use")
    }
}

/// NumPy's context variable, and a handler that draws from `lane` of the resource that serves NumPy
/// here and now; None if that has no lanes, or is not ours.
pub(super) fn steered(
    py: Python<'_>,
    lane: Lane,
) -> PyResult<Option<(&'static Py<PyAny>, Py<PyAny>)>> {
    // Before NumPy's handlers were looked for, none of them can be ours.
    let Some(numpy) = abi::loaded(py) else {
        return Ok(None);
    };
    let serving = match numpy.current_capsule(py)? {
        Some(capsule) if !capsule.is(numpy.default_capsule()) => resource_behind(&capsule),
        _ => install::installed(py),
    };
    let Some(resource) = serving.filter(|resource| resource.get().has_lanes()) else {
        return Ok(None);
    };
    let capsule = new_capsule(resource.bind(py), Some(lane))?;
    Ok(Some((&numpy.current, capsule)))
}

/// The resource of a handler of ours.
fn resource_behind(capsule: &Bound<'_, PyAny>) -> Option<Py<Resource>> {
    // SAFETY: an object and a static name; the call checks both.
    let pointer = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), CAPSULE_NAME.as_ptr()) };
    if pointer.is_null() {
        drop(PyErr::take(capsule.py()));
        return None;
    }
    // SAFETY: every capsule of this name holds a handler.
    let allocator = unsafe { (*pointer.cast::<Handler>()).allocator };
    if !std::ptr::fn_addr_eq(allocator.malloc, malloc as unsafe extern "C" fn(_, _) -> _) {
        return None;
    }
    // SAFETY: a handler with our function is the head of a `Drawn`.
    let drawn = unsafe { &*pointer.cast::<Drawn>() };
    Some(drawn.resource.clone_ref(capsule.py()))
}

/// The resource that NumPy drew an array's memory from, or None if there is none.
#[pyfunction]
pub fn handler_of(array: &Bound<'_, PyAny>) -> PyResult<Option<Py<Resource>>> {
    let numpy = abi::numpy(array.py())?;
    let owner = numpy.owner(array)?;
    Ok(source_of(numpy, &owner).map(|(resource, _)| resource))
}

/// The resource that an array which owns its memory has it from, and where the block is.
fn source_of(numpy: &abi::NumPy, owner: &Bound<'_, PyAny>) -> Option<(Py<Resource>, *mut u8)> {
    let py = owner.py();
    let (capsule, data) = numpy.handler(owner)?;
    let resource = resource_behind(&capsule)
        .or_else(|| NonNull::new(data).and_then(|data| install::owner_of(py, data)));
    resource.map(|resource| (resource, data))
}

/// What an array's memory belongs to.
pub(crate) enum Source<'py> {
    /// A block of a resource.
    Block(Py<Resource>, NonNull<u8>),
    /// Another object, which is no array.
    Object(Bound<'py, PyAny>),
}

/// What an array's memory belongs to; None if it is NumPy's own or not an array.
pub(crate) fn source<'py>(array: &Bound<'py, PyAny>) -> PyResult<Option<Source<'py>>> {
    let numpy = abi::numpy(array.py())?;
    if !array.is_instance(numpy.ndarray.bind(array.py()))? {
        return Ok(None);
    }
    let owner = numpy.owner(array)?;
    let base = owner.getattr(pyo3::intern!(array.py(), "base"))?;
    if !base.is_none() {
        return Ok(Some(Source::Object(base)));
    }
    let source = source_of(numpy, &owner);
    Ok(source
        .and_then(|(resource, data)| NonNull::new(data).map(|data| Source::Block(resource, data))))
}
