//! `Rehearsal`: the core's workers without threads, for simulations.

use super::pool::counts_by_worker;
use crate::errors::InvalidArgument;
use moirai_core::executor::idle::Outlook;
use moirai_core::executor::{self, PATIENCE};
use moirai_core::sync::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::MutexGuard;

/// An executor's workers without threads, step by step; tasks are numbers.
#[pyclass(frozen, module = "moirai.executor")]
pub struct Rehearsal {
    /// Locked for one step; no Python code runs in it.
    steps: Mutex<executor::Rehearsal<u64>>,
    node_of_worker: Vec<usize>,
    node_count: usize,
}

impl Rehearsal {
    fn steps(&self) -> MutexGuard<'_, executor::Rehearsal<u64>> {
        let steps = self.steps.lock();
        steps.unwrap_or_else(|poison| poison.into_inner())
    }
}

fn not_started(worker: usize) -> PyErr {
    InvalidArgument::new_err(format!(
        "worker: must be one that was started, got {worker}"
    ))
}

#[pymethods]
impl Rehearsal {
    #[new]
    #[pyo3(signature = (*, node_of_worker, order))]
    fn new(node_of_worker: Vec<usize>, order: Vec<Vec<usize>>) -> PyResult<Self> {
        let node_count = order.len();
        let mut nodes = node_of_worker.iter().chain(order.iter().flatten());
        if node_of_worker.is_empty() || nodes.any(|node| *node >= node_count) {
            return Err(InvalidArgument::new_err(format!(
                "node_of_worker, order: must be places among {node_count} nodes, \
                 got {node_of_worker:?}, {order:?}"
            )));
        }
        Ok(Rehearsal {
            steps: Mutex::new(executor::Rehearsal::new(&node_of_worker, &order)),
            node_of_worker,
            node_count,
        })
    }

    /// Queue a task from outside at a node; the workers that were started or woken for it.
    fn queue(&self, node: usize, task: u64) -> PyResult<Vec<usize>> {
        if node >= self.node_count {
            let count = self.node_count;
            return Err(InvalidArgument::new_err(format!(
                "node: must be below {count}, got {node}"
            )));
        }
        Ok(self.steps().queue(node, task))
    }

    /// A worker queues a task; the workers that were started or woken for it.
    fn push(&self, worker: usize, task: u64) -> PyResult<Vec<usize>> {
        let roused = self.steps().push(worker, task);
        roused.ok_or_else(|| not_started(worker))
    }

    /// What a worker takes next, if anything, how many tasks come along, and who is woken then.
    fn take(&self, worker: usize) -> PyResult<(Option<u64>, usize, Vec<usize>)> {
        let taken = self.steps().take(worker);
        let taken = taken.ok_or_else(|| not_started(worker))?;
        Ok((taken.task, taken.brought, taken.roused))
    }

    /// A worker found nothing: for how many seconds it sleeps at most, and who is woken then.
    fn rest(&self, worker: usize) -> PyResult<(f64, Vec<usize>)> {
        let rested = self.steps().rest(worker);
        let rested = rested.ok_or_else(|| not_started(worker))?;
        let seconds = match rested.outlook {
            Outlook::Work => 0.0,
            Outlook::Later => PATIENCE.as_secs_f64(),
            Outlook::Nothing => f64::INFINITY,
        };
        Ok((seconds, rested.roused))
    }

    /// A worker slept for as long as it would; whether nobody woke it, so that it looks now.
    fn stop_waiting(&self, worker: usize) -> PyResult<bool> {
        let is_late = self.steps().stop_waiting(worker);
        is_late.ok_or_else(|| not_started(worker))
    }

    /// What each worker has done.
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let (counts, depths) = {
            let steps = self.steps();
            (steps.counts(), steps.deque_counts())
        };
        counts_by_worker(py, &counts, &self.node_of_worker, &depths)
    }
}
