//! `VectorPool`: typed vectors that grow, drawn from a resource.
#![allow(unsafe_code)]

use super::blocks::{Begun, BlockPool, Bounds, Loan};
use super::records::{Acquisition, PoolStatistics};
use super::ticket::{Queue, Ticket};
use super::view;
use crate::argument::{count, milliseconds, timeout};
use crate::errors::{Closed, InvalidArgument};
use crate::resource::Resource;
use moirai_core::pools::vector::Viewed;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyOverflowError, PyTypeError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyMemoryView, PyTuple};
use std::ffi::{CString, c_int};
use std::sync::Arc;
use std::time::Duration;

/// How a single value becomes the bytes of an item.
#[derive(Clone, Copy)]
enum Scalar {
    Signed,
    Unsigned,
    Float,
    Bool,
    /// By NumPy.
    Other,
}

/// What all vectors of a pool have in common.
struct Type {
    dtype: Py<PyAny>,
    item_bytes: usize,
    scalar: Scalar,
    /// As in the `struct` module; `None` if items are shown as bytes.
    format: Option<CString>,
    /// Makes an array of bytes from a sequence of values.
    convert: Py<PyAny>,
    growth: f64,
}

/// A vector of a pool, until it is released.
#[pyclass(frozen, weakref, module = "moirai.pools")]
pub struct Vector {
    loan: Loan,
    pool: Py<VectorPool>,
}

/// Bytes to read; whoever made it keeps them alive and in place.
struct Source(*const u8);
// SAFETY: it is only read, while its maker waits.
unsafe impl Send for Source {}
// SAFETY: as above.
unsafe impl Sync for Source {}

impl Source {
    /// # Safety
    /// The source is readable for `bytes` bytes, which lie in no unused part of the vector's block.
    unsafe fn append(
        &self,
        vector: &mut moirai_core::pools::vector::Vector,
        bytes: usize,
    ) -> Result<bool, Viewed> {
        // SAFETY: the caller's promise.
        unsafe { vector.append(self.0, bytes) }
    }
}

/// An integer's little-endian bytes, if it fits.
fn integer(scalar: Scalar, item_bytes: usize, value: &Bound<'_, PyAny>) -> PyResult<[u8; 8]> {
    let bits = 8 * item_bytes as u32;
    let (low, high, found) = match scalar {
        Scalar::Unsigned => {
            let high = u64::MAX >> (64 - bits);
            (0, i128::from(high), value.extract::<u64>().map(i128::from))
        }
        _ => {
            let high = i64::MAX >> (64 - bits);
            (
                -i128::from(high) - 1,
                i128::from(high),
                value.extract::<i64>().map(i128::from),
            )
        }
    };
    let refused =
        || InvalidArgument::new_err(format!("value: must be from {low} to {high}, got {value}"));
    match found {
        Ok(found) if (low..=high).contains(&found) => Ok((found as i64).to_le_bytes()),
        Ok(_) => Err(refused()),
        Err(error) if error.is_instance_of::<PyOverflowError>(value.py()) => Err(refused()),
        Err(_) => Err(wrong_type("an int", value)),
    }
}

fn wrong_type(expected: &str, value: &Bound<'_, PyAny>) -> PyErr {
    match value.get_type().name() {
        Ok(kind) => PyTypeError::new_err(format!("value: must be {expected}, got {kind}")),
        Err(error) => error,
    }
}

/// A number beyond the largest float of a type.
fn too_large(kind: &Type, value: &Bound<'_, PyAny>) -> PyErr {
    let dtype = kind.dtype.bind(value.py());
    InvalidArgument::new_err(format!("value: must fit {dtype}, got {value}"))
}

impl Vector {
    fn kind(&self) -> &Type {
        &self.pool.get().kind
    }

    /// Append the bytes of whole items.
    ///
    /// # Safety
    /// `source` is readable for `bytes` bytes until this returns.
    unsafe fn push(&self, py: Python<'_>, source: *const u8, bytes: usize) -> PyResult<()> {
        let source = Source(source);
        let append = |vector: &mut moirai_core::pools::vector::Vector| {
            // SAFETY: readable, as the caller promises; not in the unused part of the block, to
            // which nobody has a view.
            unsafe { source.append(vector, bytes) }
        };
        self.loan.append(py, bytes, self.kind().growth, append)
    }

    /// Append values through NumPy.
    fn push_all(&self, py: Python<'_>, values: &Bound<'_, PyAny>) -> PyResult<()> {
        let array = self.kind().convert.bind(py).call1((values,))?;
        let bytes = PyBuffer::<u8>::get(&array)?;
        // SAFETY: the buffer keeps its bytes alive and in place until it is dropped.
        unsafe { self.push(py, bytes.buf_ptr().cast::<u8>(), bytes.len_bytes()) }
    }
}

#[pymethods]
impl Vector {
    /// Append one value.
    fn append(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let kind = self.kind();
        let float = || {
            value.extract::<f64>().map_err(|error| {
                if error.is_instance_of::<PyOverflowError>(py) {
                    too_large(kind, value)
                } else {
                    wrong_type("a number", value)
                }
            })
        };
        let truth = || {
            value
                .extract::<bool>()
                .map_err(|_| wrong_type("a bool", value))
        };
        let bytes = match (kind.scalar, kind.item_bytes) {
            (Scalar::Float, 8) => float()?.to_le_bytes(),
            (Scalar::Float, _) => {
                let wide = float()?;
                let narrow = wide as f32;
                if narrow.is_infinite() && wide.is_finite() {
                    return Err(too_large(kind, value));
                }
                let mut bytes = [0; 8];
                bytes[..4].copy_from_slice(&narrow.to_le_bytes());
                bytes
            }
            (Scalar::Bool, _) => u64::from(truth()?).to_le_bytes(),
            (Scalar::Other, _) => {
                let values = pyo3::types::PyList::new(py, [value])?;
                return self.push_all(py, &values);
            }
            (scalar, item_bytes) => integer(scalar, item_bytes, value)?,
        };
        // SAFETY: items of these kinds have at most 8 bytes.
        unsafe { self.push(py, bytes.as_ptr(), kind.item_bytes) }
    }

    /// Append each value of an array or another iterable.
    fn extend(&self, py: Python<'_>, values: &Bound<'_, PyAny>) -> PyResult<()> {
        self.push_all(py, values)
    }

    /// Forget all values; the memory stays.
    fn clear(&self) -> PyResult<()> {
        self.loan.clear()
    }

    /// The values as an array, without a copy; the array is a view.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let view = PyMemoryView::from(slf.as_any())?;
        let array = py.import("numpy")?.call_method1("asarray", (view,))?;
        let dtype = slf.get().kind().dtype.bind(py);
        if array.getattr("dtype")?.eq(dtype)? {
            Ok(array)
        } else {
            array.call_method1("view", (dtype,))
        }
    }

    /// The type of its values.
    #[getter]
    fn dtype(&self, py: Python<'_>) -> Py<PyAny> {
        self.kind().dtype.clone_ref(py)
    }

    /// Values it may have before it moves to a larger block.
    #[getter]
    fn capacity(&self) -> PyResult<usize> {
        Ok(self.loan.capacity()? / self.kind().item_bytes)
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.loan.size()? / self.kind().item_bytes)
    }

    /// Give it back before the block is left.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        self.loan.release(py)
    }

    /// Take it out of the pool for good; its permit goes back.
    fn detach(slf: &Bound<'_, Self>) -> PyResult<Py<Self>> {
        slf.get().loan.detach(slf.py())?;
        Ok(slf.clone().unbind())
    }

    fn __enter__(slf: &Bound<'_, Self>) -> PyResult<Py<Self>> {
        slf.get().loan.size()?;
        Ok(slf.clone().unbind())
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.loan.leave(py)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let dtype = self.kind().dtype.bind(py);
        match self.__len__() {
            Ok(length) => format!(
                "Vector(dtype={dtype}, length={length}, {})",
                self.loan.word()
            ),
            Err(_) => format!("Vector(dtype={dtype}, {})", self.loan.word()),
        }
    }

    /// # Safety
    /// Called by the interpreter with a valid view and the flags of the buffer protocol.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("the view is null"));
        }
        let (address, size) = slf.get().loan.view()?;
        let kind = slf.get().kind();
        let (item_bytes, format) = match &kind.format {
            Some(format) => (kind.item_bytes, format.as_c_str()),
            None => (1, c"B"),
        };
        // The format lives as long as the pool, to which the vector refers.
        let items = view::Items {
            address,
            size,
            item_bytes,
            format,
        };
        // SAFETY: the view is valid, and `__releasebuffer__` frees what is filled in.
        unsafe { view::fill(view, slf.clone().into_any(), items, flags) };
        Ok(())
    }

    /// # Safety
    /// Called by the interpreter with a view that `__getbuffer__` filled, once.
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: as the interpreter promises.
        unsafe { view::free(view) };
        self.loan.end_view();
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.pool)
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        self.loan.abandon();
    }
}

/// Typed vectors that grow.
#[pyclass(frozen, subclass, weakref, module = "moirai.pools")]
pub struct VectorPool {
    blocks: Arc<BlockPool>,
    kind: Type,
    /// The resource the blocks are drawn from.
    #[pyo3(get)]
    resource: Py<Resource>,
}

fn vector(py: Python<'_>, pool: Py<VectorPool>, begun: Begun) -> Vector {
    Vector {
        loan: Loan::new(py, &pool.get().blocks, begun, "vector", 0, false),
        pool,
    }
}

#[pymethods]
impl VectorPool {
    #[new]
    #[pyo3(signature = (
        resource, dtype, *, format, convert, capacity, cap_bytes, growth, max_count, overflow,
        idle_seconds, track_sites
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        resource: &Bound<'_, Resource>,
        dtype: &Bound<'_, PyAny>,
        format: Option<CString>,
        convert: Py<PyAny>,
        capacity: &Bound<'_, PyAny>,
        cap_bytes: usize,
        growth: f64,
        max_count: &Bound<'_, PyAny>,
        overflow: &str,
        idle_seconds: Option<f64>,
        track_sites: bool,
    ) -> PyResult<Self> {
        let bounds = Bounds::new(max_count, overflow, idle_seconds, track_sites)?;
        if !(1.5..=2.0).contains(&growth) {
            return Err(InvalidArgument::new_err(format!(
                "growth: must be from 1.5 to 2.0, got {growth}"
            )));
        }
        let item_bytes: usize = dtype.getattr("itemsize")?.extract()?;
        let most = cap_bytes / item_bytes.max(1);
        if most == 0 {
            return Err(InvalidArgument::new_err(format!(
                "cap_bytes: must be at least one item of {item_bytes} bytes, got {cap_bytes}"
            )));
        }
        let block_bytes = count("capacity", capacity, 1..=most)? * item_bytes;
        let native: bool = dtype.getattr("isnative")?.extract()?;
        let letter: char = dtype.getattr("kind")?.extract()?;
        let scalar = match (letter, item_bytes) {
            _ if !native => Scalar::Other,
            ('i', _) => Scalar::Signed,
            ('u', _) => Scalar::Unsigned,
            ('f', 4 | 8) => Scalar::Float,
            ('b', _) => Scalar::Bool,
            _ => Scalar::Other,
        };
        let core = Arc::clone(resource.get().core());
        Ok(VectorPool {
            blocks: BlockPool::new(core, block_bytes, cap_bytes, &bounds),
            kind: Type {
                dtype: dtype.clone().unbind(),
                item_bytes,
                scalar,
                format,
                convert: convert.clone_ref(py),
                growth,
            },
            resource: resource.clone().unbind(),
        })
    }

    /// An empty vector, until it is released.
    #[pyo3(signature = (timeout_seconds=None))]
    fn acquire(slf: &Bound<'_, Self>, timeout_seconds: Option<f64>) -> PyResult<Vector> {
        let py = slf.py();
        let timeout = timeout("timeout_seconds", timeout_seconds)?;
        let begun = slf.get().blocks.begin(py, timeout, false)?;
        Ok(vector(py, slf.clone().unbind(), begun))
    }

    /// (vector, None), or (None, Ticket) with `wake` to be called once something was granted.
    #[pyo3(signature = (wake, timeout_seconds))]
    fn _acquire_or_queue(
        slf: &Bound<'_, Self>,
        wake: Py<PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<(Option<Vector>, Option<Ticket>)> {
        let (py, this) = (slf.py(), slf.get());
        let timeout = timeout("timeout_seconds", timeout_seconds)?;
        let pool = slf.clone().unbind();
        Ok(
            match this.blocks.begin_or_queue(py, timeout, false, wake)? {
                Ok(begun) => (Some(vector(py, pool, begun)), None),
                Err(ticket) => (None, Some(Ticket::new(ticket, Box::new(pool)))),
            },
        )
    }

    /// Give back what `acquire` gave.
    fn release(&self, py: Python<'_>, vector: &Bound<'_, PyAny>) -> PyResult<()> {
        if let Ok(found) = vector.cast::<Vector>()
            && found.get().loan.is_from(&self.blocks)
        {
            return found.get().loan.release(py);
        }
        let kind = vector.get_type().name()?;
        Err(InvalidArgument::new_err(format!(
            "vector: must come from this pool, got a {kind} that it does not have"
        )))
    }

    /// Draw blocks until `count` are idle; returns how many.
    fn prefill(&self, py: Python<'_>, count: &Bound<'_, PyAny>) -> PyResult<usize> {
        let idle_count = crate::argument::count("count", count, 0..=self.blocks.max_count())?;
        self.blocks.prefill(py, idle_count)
    }

    /// Give every idle block back to the resource; returns how many.
    fn clear(&self, py: Python<'_>) -> PyResult<usize> {
        self.blocks.trim(py, Some(0))
    }

    /// Give back what was idle for at least `idle_seconds`; returns how many.
    #[pyo3(signature = (idle_seconds=None))]
    fn trim(&self, py: Python<'_>, idle_seconds: Option<f64>) -> PyResult<usize> {
        self.blocks
            .trim(py, milliseconds("idle_seconds", idle_seconds)?)
    }

    /// Give back what is idle, wake those who wait, hand nothing out any more.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.blocks.close(py)
    }

    /// Whether the pool was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.blocks.is_closed()
    }

    /// The type of the values.
    #[getter]
    fn dtype(&self, py: Python<'_>) -> Py<PyAny> {
        self.kind.dtype.clone_ref(py)
    }

    /// As `acquire`, but wait without blocking the event loop.
    #[pyo3(signature = (timeout_seconds=None))]
    fn acquire_async<'py>(
        slf: &Bound<'py, Self>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let waiting = slf.py().import("moirai._waiting")?;
        let queue = slf.getattr("_acquire_or_queue")?;
        waiting.call_method1("acquire_async", (queue, timeout_seconds))
    }

    /// What happened so far.
    fn statistics(&self) -> PoolStatistics {
        PoolStatistics(self.blocks.statistics())
    }

    /// Every vector that is out, the longest held first.
    fn leaks(&self) -> Vec<Acquisition> {
        self.blocks.outstanding("Vector")
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        if slf.get().closed() {
            return Err(Closed::new_err("this pool is closed"));
        }
        Ok(slf.clone())
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let this = slf.get();
        let found = this.blocks.statistics();
        Ok(format!(
            "{}(dtype={}, in_use={}, idle={}{})",
            slf.get_type().name()?,
            this.kind.dtype.bind(slf.py()),
            found.in_use,
            found.idle,
            if this.closed() { ", closed" } else { "" }
        ))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.resource)?;
        visit.call(&self.kind.dtype)?;
        visit.call(&self.kind.convert)?;
        self.blocks.visit(&visit)
    }

    fn __clear__(&self) {
        self.blocks.sever();
    }
}

impl Queue for Py<VectorPool> {
    fn take(&self, py: Python<'_>, ticket: u64) -> PyResult<Py<PyAny>> {
        let begun = self.get().blocks.take(py, ticket, false)?;
        Ok(Py::new(py, vector(py, self.clone_ref(py), begun))?.into_any())
    }

    fn time_out(&self, py: Python<'_>, ticket: u64, waited: Duration) -> PyResult<Py<PyAny>> {
        let begun = self.get().blocks.time_out(py, ticket, waited, false)?;
        Ok(Py::new(py, vector(py, self.clone_ref(py), begun))?.into_any())
    }

    fn cancel(&self, py: Python<'_>, ticket: u64) -> PyResult<()> {
        self.get().blocks.cancel(py, ticket)
    }

    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(self)
    }
}
