//! `Buffer`: one block as a Python object that exports the buffer protocol.
#![allow(unsafe_code)]

use crate::errors::InvalidArgument;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::ffi::c_int;

/// One block of a resource; given back when the last view of it is gone.
///
/// Exports the buffer protocol (writable bytes), `numpy()` and DLPack, all without a copy.
#[pyclass(frozen, weakref, module = "moirai.memory")]
pub struct Buffer {
    block: moirai_core::buffer::Buffer,
    resource: Py<PyAny>,
}

impl Buffer {
    pub(crate) fn new(block: moirai_core::buffer::Buffer, resource: Py<PyAny>) -> Self {
        Buffer { block, resource }
    }
}

#[pymethods]
impl Buffer {
    /// Bytes asked for.
    #[getter]
    fn size_bytes(&self) -> usize {
        self.block.size()
    }

    /// Bytes of the block: the request rounded up to what the resource hands out.
    #[getter]
    fn block_bytes(&self) -> usize {
        self.block.block_size()
    }

    /// The resource it came from.
    #[getter]
    fn resource(&self, py: Python<'_>) -> Py<PyAny> {
        self.resource.clone_ref(py)
    }

    fn __len__(&self) -> usize {
        self.block.size()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let kind = self.resource.bind(py).get_type().name()?;
        Ok(format!(
            "Buffer(size_bytes={}, resource={kind})",
            self.block.size()
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
        let size = slf.get().block.size();
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
        let address = buffer.block.address().as_ptr().cast();
        let size = buffer.block.size() as ffi::Py_ssize_t;
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
