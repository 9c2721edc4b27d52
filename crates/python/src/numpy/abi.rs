//! The parts of NumPy's C API used here, as NumPy >= 1.22 lays them out (checked at run time).

use crate::errors::Unsupported;
use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyCapsule;
use std::ffi::{CStr, c_char, c_int, c_void};

/// `PyDataMemAllocator`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Allocator {
    pub context: *mut c_void,
    pub malloc: unsafe extern "C" fn(*mut c_void, usize) -> *mut c_void,
    pub calloc: unsafe extern "C" fn(*mut c_void, usize, usize) -> *mut c_void,
    pub realloc: unsafe extern "C" fn(*mut c_void, *mut c_void, usize) -> *mut c_void,
    pub free: unsafe extern "C" fn(*mut c_void, *mut c_void, usize),
}

/// `PyDataMem_Handler`.
#[repr(C)]
pub(super) struct Handler {
    pub name: [c_char; 127],
    pub version: u8,
    pub allocator: Allocator,
}

/// The name NumPy gives the capsules of its handlers.
pub(super) const CAPSULE_NAME: &CStr = c"mem_handler";

/// `PyArrayObject_fields`, up to the handler.
#[repr(C)]
struct ArrayFields {
    head: ffi::PyObject,
    data: *mut c_char,
    nd: c_int,
    dimensions: *mut ffi::Py_ssize_t,
    strides: *mut ffi::Py_ssize_t,
    base: *mut ffi::PyObject,
    descr: *mut ffi::PyObject,
    flags: c_int,
    weakreflist: *mut ffi::PyObject,
    buffer_info: *mut c_void,
    handler: *mut ffi::PyObject,
}

const NEW_FROM_DESCR: usize = 94;
const DESCR_CONVERTER: usize = 174;
const SET_BASE_OBJECT: usize = 282;
const SET_HANDLER: usize = 304;
const DEFAULT_HANDLER: usize = 306;
const FEATURE_VERSION: usize = 211;
/// The feature version of NumPy 1.22, which brought handlers.
const MINIMUM_FEATURE: u32 = 0x0f;
/// The feature version of NumPy 2.0.
const NUMPY_TWO_FEATURE: u32 = 0x12;

/// Where a `PyArray_Descr` has the bytes of an item and its flags; NumPy 2 moved them.
#[derive(Clone, Copy)]
pub(super) enum DescrLayout {
    One,
    Two,
    /// Neither: its attributes are asked.
    Unknown,
}

/// The head of `PyArray_Descr`, the same in NumPy 1 and 2.
#[repr(C)]
struct DescrHead {
    head: ffi::PyObject,
    typeobj: *mut c_void,
    letters: [u8; 3],
    flags: u8,
    type_num: c_int,
}

/// NumPy 1 has the size right behind the head.
#[repr(C)]
struct DescrOne {
    head: DescrHead,
    elsize: c_int,
}

/// NumPy 2 has wider flags and a wider size.
#[repr(C)]
struct DescrTwo {
    head: DescrHead,
    flags: u64,
    elsize: ffi::Py_ssize_t,
}

/// `NPY_ITEM_HASOBJECT`.
const HAS_OBJECT: u64 = 1;

impl DescrLayout {
    /// Bytes of an item, and whether items refer to objects; `None` if only the attributes say it.
    ///
    /// # Safety
    /// `descr` is a `numpy.dtype`.
    pub(super) unsafe fn read(self, descr: *mut ffi::PyObject) -> Option<(usize, bool)> {
        match self {
            DescrLayout::One => {
                // SAFETY: the caller's promise, and the layout was found to be this one.
                let descr = unsafe { &*descr.cast::<DescrOne>() };
                let has_object = u64::from(descr.head.flags) & HAS_OBJECT != 0;
                Some((descr.elsize as usize, has_object))
            }
            DescrLayout::Two => {
                // SAFETY: as above.
                let descr = unsafe { &*descr.cast::<DescrTwo>() };
                Some((descr.elsize as usize, descr.flags & HAS_OBJECT != 0))
            }
            DescrLayout::Unknown => None,
        }
    }

    /// The layout of the NumPy that is running, tried on dtypes of known size.
    fn find(module: &Bound<'_, PyModule>, feature: u32) -> PyResult<Self> {
        let layout = if feature < NUMPY_TWO_FEATURE {
            DescrLayout::One
        } else {
            DescrLayout::Two
        };
        for name in ["float64", "O", "V12345"] {
            let descr = module.call_method1("dtype", (name,))?;
            let told: (usize, bool) = (
                descr.getattr("itemsize")?.extract()?,
                descr.getattr("hasobject")?.extract()?,
            );
            // SAFETY: a dtype; its struct is larger than what either layout reads.
            if unsafe { layout.read(descr.as_ptr()) } != Some(told) {
                return Ok(DescrLayout::Unknown);
            }
        }
        Ok(layout)
    }
}

/// `PyArray_NewFromDescr`.
pub(super) type NewFromDescr = unsafe extern "C" fn(
    subtype: *mut ffi::PyTypeObject,
    descr: *mut ffi::PyObject,
    nd: c_int,
    dims: *const ffi::Py_ssize_t,
    strides: *const ffi::Py_ssize_t,
    data: *mut c_void,
    flags: c_int,
    object: *mut ffi::PyObject,
) -> *mut ffi::PyObject;
/// `PyArray_DescrConverter`.
pub(super) type DescrConverter =
    unsafe extern "C" fn(object: *mut ffi::PyObject, descr: *mut *mut ffi::PyObject) -> c_int;
/// `PyArray_SetBaseObject`.
pub(super) type SetBaseObject =
    unsafe extern "C" fn(array: *mut ffi::PyObject, base: *mut ffi::PyObject) -> c_int;

/// NumPy as this process has it.
pub(super) struct NumPy {
    pub ndarray: Py<PyAny>,
    pub new_from_descr: NewFromDescr,
    pub descr_converter: DescrConverter,
    pub set_base_object: SetBaseObject,
    pub descr_layout: DescrLayout,
    default_capsule: Py<PyAny>,
    /// The context variable that holds the handler of each context.
    pub current: Py<PyAny>,
}

static NUMPY: PyOnceLock<NumPy> = PyOnceLock::new();

/// Import NumPy and find its handlers.
pub(super) fn numpy(py: Python<'_>) -> PyResult<&'static NumPy> {
    if let Some(numpy) = NUMPY.get(py) {
        return Ok(numpy);
    }
    // Not within the initialisation: what the import runs may come back here (under `moirai run` it
    // installs a resource), and another thread that is importing NumPy may wait for it.
    let module = py.import("numpy")?;
    NUMPY.get_or_try_init(py, || NumPy::load(&module))
}

/// NumPy, if its handlers were looked for before.
pub(super) fn loaded(py: Python<'_>) -> Option<&'static NumPy> {
    NUMPY.get(py)
}

impl NumPy {
    /// The handler of the current context, if it has one of its own.
    pub(super) fn current_capsule<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut value = std::ptr::null_mut();
        // SAFETY: a context variable, no default, and a valid place for the answer.
        let status = unsafe {
            ffi::PyContextVar_Get(self.current.as_ptr(), std::ptr::null_mut(), &mut value)
        };
        if status == -1 {
            return Err(PyErr::fetch(py));
        }
        // SAFETY: a new reference, or null if the variable is not set.
        Ok(unsafe { Bound::from_owned_ptr_or_opt(py, value) })
    }

    fn load(module: &Bound<'_, PyModule>) -> PyResult<Self> {
        let py = module.py();
        let multiarray = py
            .import("numpy._core.multiarray")
            .or_else(|_| py.import("numpy.core.multiarray"))?;
        let api = multiarray.getattr("_ARRAY_API")?.cast_into::<PyCapsule>()?;
        let table = api.pointer_checked(None)?.as_ptr() as *const *const c_void;
        let entry = |index: usize| {
            // SAFETY: the capsule holds NumPy's table, which has these entries since NumPy 1.22;
            // `FEATURE_VERSION` is far older and is looked at first.
            let place = unsafe { table.add(index) };
            // SAFETY: as above.
            unsafe { place.read() }
        };
        // SAFETY: `PyArray_GetNDArrayCFeatureVersion`, of this type in every NumPy.
        let feature: unsafe extern "C" fn() -> u32 =
            unsafe { std::mem::transmute(entry(FEATURE_VERSION)) };
        // SAFETY: a function without preconditions.
        let feature = unsafe { feature() };
        if feature < MINIMUM_FEATURE {
            let version = module.getattr("__version__")?;
            return Err(Unsupported::new_err(format!(
                "numpy: must be at least 1.22 to have memory handlers, got {version}"
            )));
        }
        let default_slot = entry(DEFAULT_HANDLER) as *const *mut ffi::PyObject;
        // SAFETY: the entry is the address of NumPy's global of this type.
        let default = unsafe { default_slot.read() };
        // SAFETY: NumPy owns a reference to its default capsule for good.
        let default = unsafe { Bound::from_borrowed_ptr(py, default) };
        // SAFETY: `PyDataMem_SetHandler`, of this type since NumPy 1.22.
        let set: unsafe extern "C" fn(*mut ffi::PyObject) -> *mut ffi::PyObject =
            unsafe { std::mem::transmute(entry(SET_HANDLER)) };
        // SAFETY: `PyArray_NewFromDescr`, of this type in every NumPy.
        let new_from_descr: NewFromDescr = unsafe { std::mem::transmute(entry(NEW_FROM_DESCR)) };
        // SAFETY: `PyArray_DescrConverter`, of this type in every NumPy.
        let descr_converter: DescrConverter =
            unsafe { std::mem::transmute(entry(DESCR_CONVERTER)) };
        // SAFETY: `PyArray_SetBaseObject`, of this type since NumPy 1.7.
        let set_base_object: SetBaseObject = unsafe { std::mem::transmute(entry(SET_BASE_OBJECT)) };
        Ok(NumPy {
            new_from_descr,
            descr_converter,
            set_base_object,
            descr_layout: DescrLayout::find(module, feature)?,
            ndarray: module.getattr("ndarray")?.unbind(),
            current: find_variable(py, set, &default)?.unbind(),
            default_capsule: default.unbind(),
        })
    }

    /// The capsule behind which NumPy's default handler stands.
    pub(super) fn default_capsule(&self) -> &Py<PyAny> {
        &self.default_capsule
    }

    /// The array that owns the memory `array` shows, following views; an error if none is given.
    pub(super) fn owner<'py>(&self, array: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let ndarray = self.ndarray.bind(array.py());
        if !array.is_instance(ndarray)? {
            let kind = array.get_type().name()?;
            return Err(pyo3::exceptions::PyTypeError::new_err(format!(
                "array: must be a numpy.ndarray, got {kind}"
            )));
        }
        let mut owner = array.clone();
        loop {
            let base = owner.getattr("base")?;
            if !base.is_instance(ndarray)? {
                return Ok(owner);
            }
            owner = base;
        }
    }

    /// The handler capsule and the data of an array that [`NumPy::owner`] returned.
    pub(super) fn handler<'py>(
        &self,
        owner: &Bound<'py, PyAny>,
    ) -> Option<(Bound<'py, PyAny>, *mut u8)> {
        let fields = owner.as_ptr().cast::<ArrayFields>();
        // SAFETY: `owner` was checked to be an ndarray, whose fields are laid out so.
        let fields = unsafe { &*fields };
        let (handler, data) = (fields.handler, fields.data);
        // SAFETY: the array holds a reference to its handler, or null.
        let handler = unsafe { Bound::from_borrowed_ptr_or_opt(owner.py(), handler) }?;
        Some((handler, data.cast()))
    }
}

/// What an array shows.
pub(crate) struct Shown<'a> {
    pub data: *mut u8,
    pub lengths: &'a [ffi::Py_ssize_t],
    pub strides: &'a [ffi::Py_ssize_t],
    pub descr: Bound<'a, PyAny>,
}

/// What an array shows.
///
/// # Safety
/// `array` is a `numpy.ndarray`, of which nobody changes the shape meanwhile.
pub(crate) unsafe fn shown<'a>(array: &'a Bound<'_, PyAny>) -> Shown<'a> {
    let fields = array.as_ptr().cast::<ArrayFields>();
    // SAFETY: the caller's promise.
    let fields = unsafe { &*fields };
    let count = fields.nd as usize;
    let slice = |first: *mut ffi::Py_ssize_t| {
        if count == 0 {
            return &[][..];
        }
        // SAFETY: an array has so many lengths and strides.
        unsafe { std::slice::from_raw_parts(first, count) }
    };
    Shown {
        data: fields.data.cast(),
        lengths: slice(fields.dimensions),
        strides: slice(fields.strides),
        // SAFETY: the array holds a reference to its dtype.
        descr: unsafe { Bound::from_borrowed_ptr(array.py(), fields.descr) },
    }
}

/// `NPY_ARRAY_WRITEABLE`.
const WRITEABLE: c_int = 0x0400;

/// Have an array refuse to be written to, as its `setflags(write=False)` does.
///
/// # Safety
/// `array` is a `numpy.ndarray`, and nobody else changes its flags meanwhile.
pub(crate) unsafe fn refuse_writes(array: &Bound<'_, PyAny>) {
    let fields = array.as_ptr().cast::<ArrayFields>();
    // SAFETY: the caller's promise.
    let flags = unsafe { &raw mut (*fields).flags };
    // SAFETY: as above.
    unsafe { *flags &= !WRITEABLE };
}

/// Find NumPy's context variable by setting it in an empty context and looking what is there.
fn find_variable<'py>(
    py: Python<'py>,
    set: unsafe extern "C" fn(*mut ffi::PyObject) -> *mut ffi::PyObject,
    default: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let context = py.import("contextvars")?.getattr("Context")?.call0()?;
    // SAFETY: a context object that no thread has entered.
    if unsafe { ffi::PyContext_Enter(context.as_ptr()) } != 0 {
        return Err(PyErr::fetch(py));
    }
    // SAFETY: the default capsule is a valid handler capsule.
    let old = unsafe { set(default.as_ptr()) };
    // SAFETY: entered above, by this thread.
    let left = unsafe { ffi::PyContext_Exit(context.as_ptr()) };
    // SAFETY: `PyDataMem_SetHandler` returns a new reference, or null with an exception set.
    let old = unsafe { Bound::from_owned_ptr_or_err(py, old) }?;
    drop(old);
    if left != 0 {
        return Err(PyErr::fetch(py));
    }
    match context.try_iter()?.next() {
        Some(variable) => variable,
        None => Err(PyImportError::new_err(
            "numpy sets no context variable for its handler",
        )),
    }
}
