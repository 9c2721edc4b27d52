//! `BufferPool`: writable bytes by size class, drawn from a resource.
#![allow(unsafe_code)]

use super::blocks::{Begun, BlockPool, Bounds, Loan};
use super::records::{Acquisition, PoolStatistics};
use super::ticket::{Queue, Ticket};
use super::view;
use crate::argument::{bytes, count, milliseconds, timeout};
use crate::errors::{Closed, InvalidArgument};
use crate::resource::Resource;
use moirai_core::pools::Statistics;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMemoryView, PyTuple};
use std::ffi::c_int;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a pool, writable, until they are released.
#[pyclass(frozen, weakref, module = "moirai.pools")]
pub struct PooledBuffer(Loan);

#[pymethods]
impl PooledBuffer {
    /// Bytes asked for.
    #[getter]
    fn size_bytes(&self) -> PyResult<usize> {
        self.0.size()
    }

    /// Bytes of the block: at least the size class.
    #[getter]
    fn block_bytes(&self) -> PyResult<usize> {
        self.0.capacity()
    }

    fn __len__(&self) -> PyResult<usize> {
        self.0.size()
    }

    fn __getitem__<'py>(
        slf: &Bound<'py, Self>,
        index: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let found = PyMemoryView::from(slf.as_any())?.get_item(index)?;
        if found.is_instance_of::<PyMemoryView>() {
            found.call_method0("tobytes")
        } else {
            Ok(found)
        }
    }

    fn __setitem__(
        slf: &Bound<'_, Self>,
        index: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        PyMemoryView::from(slf.as_any())?.set_item(index, value)
    }

    fn __delitem__(&self, _index: &Bound<'_, PyAny>) -> PyResult<()> {
        Err(PyTypeError::new_err(
            "buffer: has a fixed length; nothing can be deleted",
        ))
    }

    /// The bytes as an array of this dtype, without a copy; the array is a view.
    #[pyo3(signature = (dtype=None))]
    fn numpy<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let numpy = py.import("numpy")?;
        let view = PyMemoryView::from(slf.as_any())?;
        let array = numpy.call_method1("asarray", (view,))?;
        let Some(dtype) = dtype else { return Ok(array) };
        let dtype = numpy.call_method1("dtype", (dtype,))?;
        if dtype.getattr("hasobject")?.extract()? {
            return Err(InvalidArgument::new_err(format!(
                "dtype: must hold plain values, got {dtype}: a buffer holds no references"
            )));
        }
        let (size, item): (usize, usize) =
            (slf.get().0.size()?, dtype.getattr("itemsize")?.extract()?);
        if item == 0 || size % item != 0 {
            return Err(InvalidArgument::new_err(format!(
                "dtype: its items must divide the buffer of {size} bytes, got {item} bytes each"
            )));
        }
        array.call_method1("view", (dtype,))
    }

    /// Give it back before the block is left.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        self.0.release(py)
    }

    /// Take it out of the pool for good; its permit goes back.
    fn detach(slf: &Bound<'_, Self>) -> PyResult<Py<Self>> {
        slf.get().0.detach(slf.py())?;
        Ok(slf.clone().unbind())
    }

    fn __enter__(slf: &Bound<'_, Self>) -> PyResult<Py<Self>> {
        slf.get().0.size()?;
        Ok(slf.clone().unbind())
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.0.leave(py)
    }

    fn __repr__(&self) -> String {
        match self.0.size() {
            Ok(size) => format!("PooledBuffer(size_bytes={size}, {})", self.0.word()),
            Err(_) => format!("PooledBuffer({})", self.0.word()),
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
        let (address, size) = slf.get().0.view()?;
        let items = view::Items {
            address,
            size,
            item_bytes: 1,
            format: c"B",
        };
        // SAFETY: the view is valid, and `__releasebuffer__` frees what is filled in.
        unsafe { view::fill(view, slf.into_any(), items, flags) };
        Ok(())
    }

    /// # Safety
    /// Called by the interpreter with a view that `__getbuffer__` filled, once.
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: as the interpreter promises.
        unsafe { view::free(view) };
        self.0.end_view();
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// Writable bytes by size class.
#[pyclass(frozen, subclass, weakref, module = "moirai.pools")]
pub struct BufferPool {
    /// Smallest first; never empty.
    classes: Vec<Arc<BlockPool>>,
    /// The resource the blocks are drawn from.
    #[pyo3(get)]
    resource: Py<Resource>,
}

impl BufferPool {
    fn class_of(&self, size: usize) -> PyResult<&Arc<BlockPool>> {
        let class = self.classes.iter().find(|it| size <= it.block_bytes());
        class.ok_or_else(|| {
            let largest = self.classes.last().map_or(0, |it| it.block_bytes());
            InvalidArgument::new_err(format!(
                "size_bytes: must be at most {largest} (the largest size class), got {size}"
            ))
        })
    }
}

fn buffer(
    py: Python<'_>,
    blocks: &Arc<BlockPool>,
    begun: Begun,
    size: usize,
    zeroed: bool,
) -> PooledBuffer {
    PooledBuffer(Loan::new(py, blocks, begun, "buffer", size, zeroed))
}

#[pymethods]
impl BufferPool {
    #[new]
    #[pyo3(signature = (resource, *, size_classes, max_count, overflow, idle_seconds, track_sites))]
    fn new(
        resource: &Bound<'_, Resource>,
        size_classes: Vec<Bound<'_, PyAny>>,
        max_count: &Bound<'_, PyAny>,
        overflow: &str,
        idle_seconds: Option<f64>,
        track_sites: bool,
    ) -> PyResult<Self> {
        let bounds = Bounds::new(max_count, overflow, idle_seconds, track_sites)?;
        let mut sizes = Vec::new();
        for size in &size_classes {
            sizes.push(count("size_classes", size, 1..=isize::MAX as usize)?);
        }
        sizes.sort_unstable();
        sizes.dedup();
        if sizes.is_empty() {
            return Err(InvalidArgument::new_err(
                "size_classes: must have at least one size, got none",
            ));
        }
        let core = resource.get().core();
        let classes = sizes
            .into_iter()
            .map(|size| BlockPool::new(Arc::clone(core), size, usize::MAX, &bounds));
        Ok(BufferPool {
            classes: classes.collect(),
            resource: resource.clone().unbind(),
        })
    }

    /// A buffer of `size_bytes` from the smallest class that has them, until it is released.
    #[pyo3(signature = (size_bytes, *, zeroed=false, timeout_seconds=None))]
    fn acquire(
        &self,
        py: Python<'_>,
        size_bytes: &Bound<'_, PyAny>,
        zeroed: bool,
        timeout_seconds: Option<f64>,
    ) -> PyResult<PooledBuffer> {
        let size = bytes("size_bytes", size_bytes)?;
        let timeout = timeout("timeout_seconds", timeout_seconds)?;
        let blocks = self.class_of(size)?;
        let begun = blocks.begin(py, timeout, zeroed)?;
        Ok(buffer(py, blocks, begun, size, zeroed))
    }

    /// (buffer, None), or (None, Ticket) with `wake` to be called once something was granted.
    #[pyo3(signature = (wake, timeout_seconds, size_bytes, zeroed))]
    fn _acquire_or_queue(
        slf: &Bound<'_, Self>,
        wake: Py<PyAny>,
        timeout_seconds: Option<f64>,
        size_bytes: &Bound<'_, PyAny>,
        zeroed: bool,
    ) -> PyResult<(Option<PooledBuffer>, Option<Ticket>)> {
        let (py, this) = (slf.py(), slf.get());
        let size = bytes("size_bytes", size_bytes)?;
        let timeout = timeout("timeout_seconds", timeout_seconds)?;
        let blocks = this.class_of(size)?;
        Ok(match blocks.begin_or_queue(py, timeout, zeroed, wake)? {
            Ok(begun) => (Some(buffer(py, blocks, begun, size, zeroed)), None),
            Err(ticket) => {
                let queue = BufferQueue {
                    pool: slf.clone().unbind(),
                    blocks: Arc::clone(blocks),
                    size,
                    zeroed,
                };
                (None, Some(Ticket::new(ticket, Box::new(queue))))
            }
        })
    }

    /// Give back what `acquire` gave.
    fn release(&self, py: Python<'_>, buffer: &Bound<'_, PyAny>) -> PyResult<()> {
        if let Ok(found) = buffer.cast::<PooledBuffer>() {
            let loan = &found.get().0;
            if self.classes.iter().any(|blocks| loan.is_from(blocks)) {
                return loan.release(py);
            }
        }
        let kind = buffer.get_type().name()?;
        Err(InvalidArgument::new_err(format!(
            "buffer: must come from this pool, got a {kind} that it does not have"
        )))
    }

    /// Draw blocks until `count` of the class for `size_bytes` are idle; returns how many.
    fn prefill(
        &self,
        py: Python<'_>,
        size_bytes: &Bound<'_, PyAny>,
        count: &Bound<'_, PyAny>,
    ) -> PyResult<usize> {
        let blocks = self.class_of(bytes("size_bytes", size_bytes)?)?;
        let idle_count = crate::argument::count("count", count, 0..=blocks.max_count())?;
        blocks.prefill(py, idle_count)
    }

    /// Give every idle block back to the resource; returns how many.
    fn clear(&self, py: Python<'_>) -> PyResult<usize> {
        self.classes.iter().map(|it| it.trim(py, Some(0))).sum()
    }

    /// Give back what was idle for at least `idle_seconds`; returns how many.
    #[pyo3(signature = (idle_seconds=None))]
    fn trim(&self, py: Python<'_>, idle_seconds: Option<f64>) -> PyResult<usize> {
        let age = milliseconds("idle_seconds", idle_seconds)?;
        self.classes.iter().map(|it| it.trim(py, age)).sum()
    }

    /// Give back what is idle, wake those who wait, hand nothing out any more.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let mut outcome = Ok(());
        for blocks in &self.classes {
            outcome = outcome.and(blocks.close(py));
        }
        outcome
    }

    /// Whether the pool was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.classes.iter().all(|it| it.is_closed())
    }

    /// The size classes in bytes, smallest first.
    #[getter]
    fn size_classes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.classes.iter().map(|it| it.block_bytes()))
    }

    /// As `acquire`, but wait without blocking the event loop.
    #[pyo3(signature = (size_bytes, *, zeroed=false, timeout_seconds=None))]
    fn acquire_async<'py>(
        slf: &Bound<'py, Self>,
        size_bytes: &Bound<'py, PyAny>,
        zeroed: bool,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let waiting = slf.py().import("moirai._waiting")?;
        let queue = slf.getattr("_acquire_or_queue")?;
        let arguments = (queue, timeout_seconds, size_bytes, zeroed);
        waiting.call_method1("acquire_async", arguments)
    }

    /// What happened so far, in all classes.
    fn statistics(&self) -> PoolStatistics {
        let each = self.classes.iter().map(|it| it.statistics());
        PoolStatistics(each.fold(Statistics::default(), Statistics::plus))
    }

    /// What happened so far, by size class.
    fn class_statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for blocks in &self.classes {
            dict.set_item(blocks.block_bytes(), PoolStatistics(blocks.statistics()))?;
        }
        Ok(dict)
    }

    /// Every buffer that is out; in each class the longest held first.
    fn leaks(&self) -> Vec<Acquisition> {
        let each = self.classes.iter();
        each.flat_map(|it| it.outstanding(&format!("{}-byte buffer", it.block_bytes())))
            .collect()
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
        let found: Vec<_> = this.classes.iter().map(|it| it.statistics()).collect();
        Ok(format!(
            "{}(in_use={}, idle={}, size_classes={:?}{})",
            slf.get_type().name()?,
            found.iter().map(|it| it.in_use).sum::<u64>(),
            found.iter().map(|it| it.idle).sum::<u64>(),
            this.classes
                .iter()
                .map(|it| it.block_bytes())
                .collect::<Vec<_>>(),
            if this.closed() { ", closed" } else { "" }
        ))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.resource)?;
        self.classes.iter().try_for_each(|it| it.visit(&visit))
    }

    fn __clear__(&self) {
        self.classes.iter().for_each(|it| it.sever());
    }
}

/// A place in the queue of a size class, for a buffer of a certain size.
struct BufferQueue {
    pool: Py<BufferPool>,
    blocks: Arc<BlockPool>,
    size: usize,
    zeroed: bool,
}

impl BufferQueue {
    fn buffer(&self, py: Python<'_>, begun: Begun) -> PyResult<Py<PyAny>> {
        let buffer = buffer(py, &self.blocks, begun, self.size, self.zeroed);
        Ok(Py::new(py, buffer)?.into_any())
    }
}

impl Queue for BufferQueue {
    fn take(&self, py: Python<'_>, ticket: u64) -> PyResult<Py<PyAny>> {
        self.buffer(py, self.blocks.take(py, ticket, self.zeroed)?)
    }

    fn time_out(&self, py: Python<'_>, ticket: u64, waited: Duration) -> PyResult<Py<PyAny>> {
        let begun = self.blocks.time_out(py, ticket, waited, self.zeroed)?;
        self.buffer(py, begun)
    }

    fn cancel(&self, py: Python<'_>, ticket: u64) -> PyResult<()> {
        self.blocks.cancel(py, ticket)
    }

    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.pool)
    }
}
