//! Arrays as messages: what says their dtype and shape, and the arrays over a message's bytes.
#![allow(unsafe_code)]

use super::block::SharedBlock;
use super::wait::Patience;
use crate::errors::{Corrupted, InvalidArgument};
use crate::numpy::abi;
use crate::numpy::array::{self, Items, Shape};
use moirai_core::channel::shared::endpoint::Endpoint;
use moirai_core::channel::shared::message::ARRAY;
use moirai_core::sync::Lock;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

/// A dtype and how it is written.
type Written = (Py<PyAny>, Arc<[u8]>);

/// The dtype that was met last, as most channels carry one.
#[derive(Default)]
pub(super) struct Types(Lock<Option<Written>>);

impl Types {
    /// How a dtype is written.
    pub(super) fn text_of(&self, dtype: &Bound<'_, PyAny>) -> PyResult<Arc<[u8]>> {
        if let Some((known, text)) = &*self.0.lock()
            && known.is(dtype)
        {
            return Ok(Arc::clone(text));
        }
        let module = dtype.py().import("moirai._dtypes")?;
        let text = module.call_method1("text_of", (dtype,))?;
        let text: Arc<[u8]> = text.cast::<PyBytes>()?.as_bytes().into();
        self.remember(dtype, &text);
        Ok(text)
    }

    /// The dtype that is written so.
    pub(super) fn dtype_of<'py>(
        &self,
        py: Python<'py>,
        text: &[u8],
    ) -> PyResult<Bound<'py, PyAny>> {
        if let Some((dtype, known)) = &*self.0.lock()
            && **known == *text
        {
            return Ok(dtype.bind(py).clone());
        }
        let module = py.import("moirai._dtypes")?;
        let dtype = module.call_method1("dtype_of", (PyBytes::new(py, text),))?;
        self.remember(&dtype, &text.into());
        Ok(dtype)
    }

    fn remember(&self, dtype: &Bound<'_, PyAny>, text: &Arc<[u8]>) {
        let entry = Some((dtype.clone().unbind(), Arc::clone(text)));
        // The one before is dropped with the lock released.
        let before = std::mem::replace(&mut *self.0.lock(), entry);
        drop(before);
    }

    /// The header of an array.
    pub(super) fn header(&self, items: &Items<'_>, shape: &Shape) -> PyResult<Vec<u8>> {
        let text = self.text_of(items.descr())?;
        let lengths = shape.lengths();
        let mut header = Vec::with_capacity(1 + 8 * lengths.len() + text.len());
        header.push(lengths.len() as u8);
        for length in lengths {
            header.extend((*length as i64).to_le_bytes());
        }
        header.extend(&*text);
        Ok(header)
    }

    /// An array of the `size` bytes at `address`, which are aligned for any item.
    ///
    /// # Safety
    /// `owner` keeps them valid, and nobody else writes them.
    pub(super) unsafe fn array<'py>(
        &self,
        header: &[u8],
        address: NonNull<u8>,
        size: usize,
        owner: Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let broken = || {
            Corrupted::new_err(
                "segment: the header of an array is none that any sender writes: a process has \
                 overwritten it",
            )
        };
        let (count, rest) = header.split_first().ok_or_else(broken)?;
        let (lengths, text) = rest
            .split_at_checked(8 * usize::from(*count))
            .ok_or_else(broken)?;
        let length = |bytes: &[u8]| i64::from_le_bytes(bytes.try_into().unwrap_or_default());
        let lengths: Vec<i64> = lengths.chunks_exact(8).map(length).collect();
        let shape = Shape::from_lengths(&lengths).ok_or_else(broken)?;
        let dtype = self.dtype_of(owner.py(), text)?;
        let items = array::items(owner.py(), Some(&dtype))?;
        if shape
            .bytes(items.item_bytes)
            .is_none_or(|bytes| bytes > size)
        {
            return Err(broken());
        }
        // SAFETY: as many bytes are there, as found above; the rest is the caller's promise.
        unsafe { array::over(items, &shape, None, address, owner) }
    }
}

/// An array in shared memory that is sent when its `with` block ends.
#[pyclass(frozen, weakref, module = "moirai.channels")]
pub struct ReservedArray {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) block: Py<SharedBlock>,
    pub(super) array: Py<PyAny>,
    pub(super) timeout: Option<Duration>,
}

#[pymethods]
impl ReservedArray {
    fn __enter__(&self, py: Python<'_>) -> Py<PyAny> {
        self.array.clone_ref(py)
    }

    #[pyo3(signature = (kind, exception, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        exception: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let _ = (exception, traceback);
        // SAFETY: made by `reserve`; its flags are its user's, who is at the end of the block.
        unsafe { abi::refuse_writes(self.array.bind(py)) };
        if !kind.is_none() {
            self.block.get().discard();
            return Ok(());
        }
        let mut patience = Patience::new("reserve", self.timeout);
        let (block, length) = self.block.get().take()?;
        super::sender::commit(py, &self.endpoint, ARRAY, block, length, &mut patience)
    }
}

/// An array that was received without a copy; borrowed from the channel while it lives.
#[pyclass(frozen, weakref, module = "moirai.channels")]
pub struct ReceivedView(Lock<Option<Py<PyAny>>>);

impl ReceivedView {
    pub(super) fn new(array: Bound<'_, PyAny>) -> Self {
        ReceivedView(Lock::new(Some(array.unbind())))
    }
}

#[pymethods]
impl ReceivedView {
    fn __enter__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let array = self.0.lock().as_ref().map(|array| array.clone_ref(py));
        array.ok_or_else(|| {
            InvalidArgument::new_err("view: must be entered once, got one that was left already")
        })
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyTuple>) {
        let array = self.0.lock().take();
        drop(array);
    }
}
