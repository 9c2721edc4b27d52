//! `Lease`: an object of a pool for the length of a `with` block.

use super::object::{ObjectPool, generic_alias};
use crate::errors::Closed;
use moirai_core::pools::{Hold, Loss, Turn};
use moirai_core::sync::{AtomicU32, AtomicU64, Ordering};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyType;

/// An object of a pool for the length of a block; it goes back when the block is left.
#[pyclass(frozen, module = "moirai.pools")]
pub struct Lease {
    pool: Py<ObjectPool>,
    timeout_seconds: Option<f64>,
    /// Number of the turn, or one of the states below. `Acquire` and `Release`, for `slot`; changed
    /// by swaps only, so that one thread begins and one ends it.
    number: AtomicU64,
    /// Slot of the turn; valid while `number` is one.
    slot: AtomicU32,
}

const NEW: u64 = 0;
const DETACHED: u64 = u64::MAX - 2;
const RELEASED: u64 = u64::MAX - 1;
const ENTERING: u64 = u64::MAX;

impl Lease {
    pub(super) fn new(pool: Py<ObjectPool>, timeout_seconds: Option<f64>) -> Self {
        Lease {
            pool,
            timeout_seconds,
            number: AtomicU64::new(NEW),
            slot: AtomicU32::new(0),
        }
    }

    fn turn(&self, number: u64) -> Option<Turn> {
        let running = (NEW + 1..DETACHED).contains(&number);
        running.then(|| Turn {
            slot: self.slot.load(Ordering::Relaxed),
            number,
        })
    }

    /// End the lease in a certain state; the turn, if it was running.
    #[inline]
    fn finish(&self, state: u64) -> Result<Turn, u64> {
        let mut number = self.number.load(Ordering::Acquire);
        loop {
            let Some(turn) = self.turn(number) else {
                return Err(number);
            };
            match self.number.compare_exchange_weak(
                number,
                state,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Ok(turn),
                Err(seen) => number = seen,
            }
        }
    }

    fn dead(state: u64) -> PyErr {
        Closed::new_err(match state {
            NEW => "lease: must be entered first: with pool.lease() as item",
            RELEASED => "lease: was released; what it held belongs to the pool again",
            DETACHED => "lease: was detached; what it held is no business of the pool any more",
            _ => "lease: is being entered by another thread",
        })
    }
}

#[pymethods]
impl Lease {
    /// For annotations: Lease[Connection].
    #[classmethod]
    fn __class_getitem__<'py>(
        class: &Bound<'py, PyType>,
        item: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        generic_alias(class, item)
    }

    fn __enter__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        if let Err(state) =
            self.number
                .compare_exchange(NEW, ENTERING, Ordering::AcqRel, Ordering::Acquire)
        {
            return Err(match self.turn(state) {
                Some(_) => Closed::new_err("lease: was entered before; make a new one"),
                None => Lease::dead(state),
            });
        }
        match self.pool.get().begin(py, Hold::Lease, self.timeout_seconds) {
            Ok((turn, item)) => {
                self.slot.store(turn.slot, Ordering::Relaxed);
                self.number.store(turn.number, Ordering::Release);
                Ok(item)
            }
            Err(error) => {
                self.number.store(NEW, Ordering::Release);
                Err(error)
            }
        }
    }

    #[pyo3(signature = (_kind, _exception, _traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _exception: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        match self.finish(RELEASED) {
            Ok(turn) => self.pool.get().end(py, turn),
            Err(_) => Ok(()),
        }
    }

    /// The object, while the lease runs.
    #[getter]
    fn value(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let state = self.number.load(Ordering::Acquire);
        let item = self
            .turn(state)
            .and_then(|turn| self.pool.get().peek(py, turn));
        item.ok_or_else(|| Lease::dead(state))
    }

    /// Give the object back before the block is left.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        let turn = self.finish(RELEASED).map_err(Lease::dead)?;
        self.pool.get().end(py, turn)
    }

    /// Take the object out of the pool for good; its permit goes back.
    fn detach(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let turn = self.finish(DETACHED).map_err(Lease::dead)?;
        let item = self.pool.get().lose(py, turn, Loss::Detached)?;
        item.ok_or_else(|| Lease::dead(RELEASED))
    }

    fn __repr__(&self) -> &'static str {
        match self.number.load(Ordering::Relaxed) {
            NEW | ENTERING => "<Lease, not entered>",
            RELEASED => "<Lease, released>",
            DETACHED => "<Lease, detached>",
            _ => "<Lease, running>",
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.pool)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Ok(turn) = self.finish(RELEASED) else {
            return;
        };
        // Never left: who knows who still has the object, so it does not come back.
        Python::try_attach(|py| {
            if let Err(error) = self.pool.get().lose(py, turn, Loss::Leaked) {
                error.write_unraisable(py, None);
            }
        });
    }
}
