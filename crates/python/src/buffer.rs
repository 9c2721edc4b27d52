//! `Buffer`: one block as a Python object that exports the buffer protocol. `Batch`: many at once.
#![allow(unsafe_code)]

use crate::errors::{InvalidArgument, to_py};
use crate::lane;
use crate::numpy::array::{self, Items, Shape};
use crate::resource::{DETACH_BYTES, DETACH_COUNT, Resource};
use moirai_core::resource as core;
use moirai_core::resource::priority::Lane;
use moirai_core::resource::{Request, arena};
use pyo3::exceptions::{PyBufferError, PyIndexError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::ffi::c_int;
use std::ptr::NonNull;

enum Block {
    /// One that the buffer owns: address, bytes asked for, bytes given.
    Whole(NonNull<u8>, usize, usize),
    Part {
        batch: Py<Batch>,
        index: usize,
    },
}

/// One block of a resource; given back when the last view of it is gone.
///
/// Exports the buffer protocol (writable bytes), `numpy()` and DLPack, all without a copy.
#[pyclass(frozen, weakref, module = "moirai.memory")]
pub struct Buffer {
    block: Block,
    resource: Py<Resource>,
}

/// A block on its way out of `detach`.
struct Drawn(core::Block);

// SAFETY: a block that nobody but the drawing thread has seen.
unsafe impl Send for Drawn {}

// SAFETY: the block is plain memory that only this buffer owns; resources may be used anywhere.
unsafe impl Send for Buffer {}
// SAFETY: `&Buffer` gives no access to the contents but through the buffer protocol.
unsafe impl Sync for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Block::Whole(address, ..) = self.block {
            // SAFETY: this buffer owns the block, and views hold the buffer.
            unsafe { self.resource.get().core().deallocate(address) };
        }
    }
}

impl Buffer {
    /// A block of `resource`; the interpreter's lock is left while the kernel may take its time.
    pub(crate) fn draw(
        resource: &Bound<'_, Resource>,
        size: usize,
        alignment: usize,
        zeroed: bool,
        lane: Option<Lane>,
    ) -> PyResult<Self> {
        let request = Request::new(size, alignment, zeroed).map_err(to_py)?;
        let core = resource.get().core();
        let allocate = || lane::within(lane, || core.allocate(request));
        let block = if size > DETACH_BYTES {
            let drawn = resource.py().detach(|| allocate().map(Drawn));
            drawn.map(|Drawn(block)| block)
        } else {
            allocate()
        };
        let block = block.map_err(to_py)?;
        Ok(Buffer {
            block: Block::Whole(block.address, size, block.size),
            resource: resource.clone().unbind(),
        })
    }

    /// A block for each of `sizes`, or none.
    pub(crate) fn draw_group(
        resource: &Bound<'_, Resource>,
        sizes: &[usize],
        alignment: usize,
        zeroed: bool,
        lane: Option<Lane>,
    ) -> PyResult<Vec<Self>> {
        let request = |size: &usize| Request::new(*size, alignment, zeroed).map_err(to_py);
        let requests = sizes.iter().map(request).collect::<PyResult<Vec<_>>>()?;
        let core = resource.get().core();
        let draw = || {
            let blocks = lane::within(lane, || core.allocate_group(&requests))?;
            Ok(blocks.into_iter().map(Drawn).collect::<Vec<_>>())
        };
        let is_long = sizes.len() > DETACH_COUNT || sizes.iter().any(|size| *size > DETACH_BYTES);
        let drawn = if is_long {
            resource.py().detach(draw)
        } else {
            draw()
        };
        let buffer = |(Drawn(block), size): (Drawn, &usize)| Buffer {
            block: Block::Whole(block.address, *size, block.size),
            resource: resource.clone().unbind(),
        };
        let drawn = drawn.map_err(to_py)?;
        Ok(drawn.into_iter().zip(sizes).map(buffer).collect())
    }

    /// The buffer as an object, which the cycle collector need not visit.
    ///
    /// It refers to its resource alone, and not in a way that the collector could clear; walking
    /// many buffers would only cost.
    pub(crate) fn into_object(self, py: Python<'_>) -> PyResult<Bound<'_, Self>> {
        let object = Bound::new(py, self)?;
        // SAFETY: a live object of a type that the collector knows, tracked when it was made.
        unsafe { ffi::PyObject_GC_UnTrack(object.as_ptr().cast()) };
        Ok(object)
    }

    /// Where its block begins, if it has one to itself.
    pub(crate) fn whole(&self) -> Option<NonNull<u8>> {
        match &self.block {
            Block::Whole(address, ..) => Some(*address),
            Block::Part { .. } => None,
        }
    }

    /// The resource it came from.
    pub(crate) fn source(&self) -> &Py<Resource> {
        &self.resource
    }

    fn address(&self) -> NonNull<u8> {
        match &self.block {
            Block::Whole(address, ..) => *address,
            Block::Part { batch, index } => batch.get().address(*index),
        }
    }

    fn size(&self) -> usize {
        match &self.block {
            Block::Whole(_, size, _) => *size,
            Block::Part { batch, .. } => batch.get().size,
        }
    }

    /// All of the block as an array of `shape`, which must take no more than the block has.
    pub(crate) fn into_array<'py>(
        self,
        py: Python<'py>,
        items: Items<'py>,
        shape: &Shape,
    ) -> PyResult<Bound<'py, PyAny>> {
        let needed = shape.bytes(items.item_bytes);
        if needed.is_none_or(|needed| needed > self.size()) {
            return Err(InvalidArgument::new_err("shape: must fit the block"));
        }
        let address = self.address();
        let owner = self.into_object(py)?.into_any();
        // SAFETY: the block is as large, checked above, and the buffer keeps it.
        unsafe { array::over(items, shape, None, address, owner) }
    }
}

#[pymethods]
impl Buffer {
    /// Bytes asked for.
    #[getter]
    fn size_bytes(&self) -> usize {
        self.size()
    }

    /// Bytes of the block: the request rounded up to what the resource hands out.
    #[getter]
    fn block_bytes(&self) -> usize {
        match &self.block {
            Block::Whole(.., block_size) => *block_size,
            Block::Part { batch, .. } => batch.get().batch.stride,
        }
    }

    /// The resource it came from.
    #[getter]
    fn resource(&self, py: Python<'_>) -> Py<Resource> {
        self.resource.clone_ref(py)
    }

    fn __len__(&self) -> usize {
        self.size()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let kind = self.resource.bind(py).get_type().name()?;
        Ok(format!(
            "Buffer(size_bytes={}, resource={kind})",
            self.size()
        ))
    }

    /// The block as an array that keeps it alive; shape defaults to all of it in one dimension.
    #[pyo3(signature = (dtype=None, shape=None))]
    fn numpy<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<Bound<'py, PyAny>>,
        shape: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let numpy = py.import("numpy")?;
        let dtype = match dtype {
            Some(dtype) => numpy.call_method1("dtype", (dtype,))?,
            None => numpy.call_method1("dtype", ("uint8",))?,
        };
        if dtype.getattr("hasobject")?.extract()? {
            return Err(InvalidArgument::new_err(format!(
                "dtype: must hold plain values, got {dtype}: a block holds no references"
            )));
        }
        let size = slf.get().size();
        let item: usize = dtype.getattr("itemsize")?.extract()?;
        let shape = match shape {
            Some(shape) => shape,
            None if item == 0 || size % item != 0 => {
                return Err(InvalidArgument::new_err(format!(
                    "dtype: its items must divide the block of {size} bytes, got {item} bytes each"
                )));
            }
            None => PyTuple::new(py, [size / item])?.into_any(),
        };
        let options = PyDict::new(py);
        options.set_item("shape", &shape)?;
        options.set_item("dtype", &dtype)?;
        options.set_item("buffer", slf)?;
        numpy
            .getattr("ndarray")?
            .call((), Some(&options))
            .map_err(|error| {
                let wrong = InvalidArgument::new_err(format!(
                    "shape: must fit {size} bytes of {dtype}, got {shape}: {}",
                    error.value(py)
                ));
                if error.is_instance_of::<pyo3::exceptions::PyTypeError>(py)
                    || error.is_instance_of::<pyo3::exceptions::PyValueError>(py)
                {
                    wrong
                } else {
                    error
                }
            })
    }

    /// DLPack export of the block as bytes; the keyword arguments are NumPy's.
    #[pyo3(signature = (**options))]
    fn __dlpack__<'py>(
        slf: &Bound<'py, Self>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::numpy(slf, None, None)?.call_method("__dlpack__", (), options)
    }

    /// (1, 0): main memory.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (1, 0)
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
        let buffer = slf.get();
        let address = buffer.address().as_ptr().cast();
        let size = buffer.size() as ffi::Py_ssize_t;
        // SAFETY: the view is valid, the block has `size` bytes and lives as long as this object,
        // to which the call takes a reference.
        let status = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), address, size, 0, flags) };
        if status == -1 {
            Err(PyErr::fetch(slf.py()))
        } else {
            Ok(())
        }
    }
}

/// Equal blocks of an arena, cut in one step and given back together.
///
/// A sequence of buffers, made when they are asked for; each keeps the whole batch.
#[pyclass(frozen, weakref, module = "moirai.memory")]
pub struct Batch {
    batch: arena::Batch,
    count: usize,
    size: usize,
    resource: Py<Resource>,
}

impl Batch {
    pub(crate) fn new(
        batch: arena::Batch,
        count: usize,
        size: usize,
        resource: Py<Resource>,
    ) -> Self {
        Batch {
            batch,
            count,
            size,
            resource,
        }
    }

    fn address(&self, index: usize) -> NonNull<u8> {
        debug_assert!(index < self.count);
        // SAFETY: the batch's block has `count` strides, and `index` was checked to be below.
        unsafe { self.batch.buffer.address().add(index * self.batch.stride) }
    }
}

#[pymethods]
impl Batch {
    /// Bytes of each block, as asked.
    #[getter]
    fn size_bytes(&self) -> usize {
        self.size
    }

    /// Bytes from the start of one block to the next.
    #[getter]
    fn stride_bytes(&self) -> usize {
        self.batch.stride
    }

    /// The arena it came from.
    #[getter]
    fn resource(&self, py: Python<'_>) -> Py<Resource> {
        self.resource.clone_ref(py)
    }

    fn __len__(&self) -> usize {
        self.count
    }

    fn __getitem__<'py>(slf: &Bound<'py, Self>, index: isize) -> PyResult<Bound<'py, Buffer>> {
        let batch = slf.get();
        let from_start = if index < 0 {
            index.checked_add_unsigned(batch.count)
        } else {
            Some(index)
        };
        let place = from_start.and_then(|index| usize::try_from(index).ok());
        let Some(index) = place.filter(|index| *index < batch.count) else {
            return Err(PyIndexError::new_err(format!(
                "index: must be from {} to {}, got {index}",
                -(batch.count as isize),
                batch.count as isize - 1
            )));
        };
        let buffer = Buffer {
            block: Block::Part {
                batch: slf.clone().unbind(),
                index,
            },
            resource: batch.resource.clone_ref(slf.py()),
        };
        buffer.into_object(slf.py())
    }

    /// All blocks as one array of shape (count, items of a block); rows may lie apart.
    #[pyo3(signature = (dtype=None))]
    fn numpy<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let batch = slf.get();
        let bytes = pyo3::types::PyString::new(slf.py(), "uint8").into_any();
        let items = array::items(slf.py(), Some(dtype.unwrap_or(&bytes)))?;
        let item = items.item_bytes;
        if batch.size % item != 0 {
            return Err(InvalidArgument::new_err(format!(
                "dtype: its items must divide the blocks of {} bytes, got {item} bytes each",
                batch.size
            )));
        }
        let shape = Shape::rows(batch.count, batch.size / item);
        let strides = [
            batch.batch.stride as ffi::Py_ssize_t,
            item as ffi::Py_ssize_t,
        ];
        let address = batch.batch.buffer.address();
        // SAFETY: `count` rows of `size` bytes lie a stride apart in the batch's block.
        unsafe {
            array::over(
                items,
                &shape,
                Some(&strides),
                address,
                slf.clone().into_any(),
            )
        }
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let kind = self.resource.bind(py).get_type().name()?;
        Ok(format!(
            "Batch(count={}, size_bytes={}, resource={kind})",
            self.count, self.size
        ))
    }
}
