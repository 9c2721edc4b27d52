//! How close the process is to its limit, as tuples that `moirai.pressure` gives names.

use crate::argument::{bytes, count, timeout};
use crate::errors::to_py;
use moirai_core::channel::live;
use moirai_core::os;
use moirai_core::pressure::{
    FenceSettings, Kind, Sample, Sampler, SamplerSettings, SharedSource, Source, Waited, fence,
};
use pyo3::prelude::*;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Longest sleep between two looks at whether a signal has come, which only Python's main thread
/// handles; the others need not look.
const SLICE: Duration = Duration::from_millis(100);
const LONG_SLICE: Duration = Duration::from_secs(10);

/// (seconds, used, limit, bound, without cache, resident, anonymous, data, children, faults, (share
/// of time stalled, limit hits, kills)).
type SampleTuple = (
    f64,
    u64,
    Option<u64>,
    Option<&'static str>,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    (Option<f64>, Option<u64>, Option<u64>),
);

/// (kind, folder, used, without cache, limit).
type BoundTuple = (&'static str, Option<PathBuf>, u64, u64, u64);

fn sample_tuple(sample: Sample) -> SampleTuple {
    (
        sample.time_nanoseconds as f64 / 1e9,
        sample.used,
        sample.kind.map(|_| sample.limit),
        sample.kind.map(Kind::name),
        sample.without_cache,
        sample.resident,
        sample.anonymous,
        sample.data,
        sample.children,
        sample.faults,
        (
            sample.stalled_millionths.map(|share| share as f64 / 1e6),
            sample.limit_hits,
            sample.kills,
        ),
    )
}

fn optional_bytes(name: &str, value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<u64>> {
    value
        .map(|value| bytes(name, value).map(|count| count as u64))
        .transpose()
}

/// Reads how much memory a process, its control groups and the machine use.
#[pyclass(frozen, module = "moirai.pressure")]
pub struct PressureSource(SharedSource);

#[pymethods]
impl PressureSource {
    #[new]
    #[pyo3(signature = (*, root, process, budget_bytes=None, eldest=None))]
    fn new(
        root: PathBuf,
        process: &str,
        budget_bytes: Option<&Bound<'_, PyAny>>,
        eldest: Option<u32>,
    ) -> PyResult<Self> {
        let budget = optional_bytes("budget_bytes", budget_bytes)?;
        let source = Source::new(&root, process, budget, eldest);
        Ok(PressureSource(SharedSource::new(source)))
    }

    /// Read everything now, as a tuple; None if the process is gone.
    fn read(&self, py: Python<'_>) -> Option<SampleTuple> {
        py.detach(|| self.0.read()).map(sample_tuple)
    }

    /// Every limit as of the last reading, the own group's first, as tuples.
    fn bounds(&self, py: Python<'_>) -> Vec<BoundTuple> {
        let bounds = py.detach(|| self.0.bounds());
        let tuple = |bound: moirai_core::pressure::Bound| {
            (
                bound.kind.name(),
                bound.folder.as_deref().map(PathBuf::from),
                bound.used,
                bound.without_cache,
                bound.limit,
            )
        };
        bounds.into_iter().map(tuple).collect()
    }
}

/// Samples a source on a thread of its own.
#[pyclass(frozen, module = "moirai.pressure")]
pub struct PressureSampler(Sampler);

#[pymethods]
impl PressureSampler {
    #[new]
    #[pyo3(signature = (*, root, process, budget_bytes, eldest, shortest_seconds, longest_seconds, capacity,
                        fence_margin_bytes, fence_ledger))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        root: PathBuf,
        process: String,
        budget_bytes: Option<&Bound<'_, PyAny>>,
        eldest: Option<u32>,
        shortest_seconds: f64,
        longest_seconds: f64,
        capacity: &Bound<'_, PyAny>,
        fence_margin_bytes: Option<&Bound<'_, PyAny>>,
        fence_ledger: Option<PathBuf>,
    ) -> PyResult<Self> {
        let margin = optional_bytes("fence_margin_bytes", fence_margin_bytes)?;
        let fence = margin.map(|margin_bytes| FenceSettings {
            margin_bytes,
            ledger: fence_ledger,
        });
        let shortest = timeout("shortest_seconds", Some(shortest_seconds))?.unwrap_or_default();
        let longest = timeout("longest_seconds", Some(longest_seconds))?.unwrap_or_default();
        Ok(PressureSampler(Sampler::new(SamplerSettings {
            root,
            process,
            budget: optional_bytes("budget_bytes", budget_bytes)?,
            eldest,
            shortest: shortest.min(longest),
            longest,
            capacity: count("capacity", capacity, 1..=1 << 20)?,
            fence,
        })))
    }

    /// Take a sample and start the thread; does nothing if it runs.
    fn start(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.start()).map_err(to_py)
    }

    /// End the thread and lift its fence; does nothing if it does not run.
    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.0.stop());
    }

    /// Whether the thread runs in this process.
    #[getter]
    fn is_running(&self) -> bool {
        self.0.is_running()
    }

    /// Number and tuple of the newest sample; None before `start`.
    fn latest(&self) -> Option<(u64, SampleTuple)> {
        let (number, sample) = self.0.latest()?;
        Some((number, sample_tuple(sample)))
    }

    /// The newest `count` samples, oldest first.
    fn history(&self, py: Python<'_>, count: &Bound<'_, PyAny>) -> PyResult<Vec<SampleTuple>> {
        let count = crate::argument::count("count", count, 0..=usize::MAX)?;
        let history = py.detach(|| self.0.history(count));
        Ok(history.into_iter().map(sample_tuple).collect())
    }

    /// Wait for a sample after number `seen`: its number, 0 when the time has passed, None once
    /// stopped.
    #[pyo3(signature = (seen, *, timeout_seconds=None))]
    fn wait(
        &self,
        py: Python<'_>,
        seen: u64,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Option<u64>> {
        let limit = timeout("timeout_seconds", timeout_seconds)?;
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let longest = if os::is_first_thread() {
            SLICE
        } else {
            LONG_SLICE
        };
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let slice = left.unwrap_or(longest).min(longest);
            match py.detach(|| self.0.wait(seen, slice)) {
                Waited::Sample(number) => return Ok(Some(number)),
                Waited::Stopped => return Ok(None),
                Waited::TimedOut if left.is_some_and(|left| left.is_zero()) => return Ok(Some(0)),
                Waited::TimedOut | Waited::Interrupted => py.check_signals()?,
            }
        }
    }

    /// (samples, seconds reading, largest delay, interval, fence room, sharers, leads, errno).
    #[allow(clippy::type_complexity)] // a dataclass's fields in their order
    fn statistics(&self) -> (u64, f64, f64, f64, Option<u64>, u64, bool, Option<i32>) {
        let found = self.0.statistics();
        (
            found.samples,
            found.reading_nanoseconds as f64 / 1e9,
            found.latest_nanoseconds as f64 / 1e9,
            found.interval_nanoseconds as f64 / 1e9,
            found.fence_room,
            found.sharers,
            found.is_leader,
            found.ledger_error,
        )
    }
}

/// Free bytes that libc's heap keeps; None where it cannot tell.
#[pyfunction]
pub fn retained_heap_bytes(py: Python<'_>) -> Option<u64> {
    py.detach(os::process::retained_heap_bytes)
}

/// Have every live resource give the memory that it keeps back to the system; how much.
#[pyfunction]
pub fn trim_resources(py: Python<'_>) -> usize {
    py.detach(|| moirai_core::resource::registry::trim_all(0))
}

/// Bytes of channels that no message needs, and that `trim_channels` would give back.
#[pyfunction]
pub fn idle_channel_bytes(py: Python<'_>) -> usize {
    py.detach(live::idle_bytes)
}

/// Have every channel give memory that no message needs back to the system; how much.
#[pyfunction]
pub fn trim_channels(py: Python<'_>) -> usize {
    py.detach(live::trim_all)
}

/// Have libc give the free memory of its heap back to the kernel.
#[pyfunction]
pub fn trim_libc_heap(py: Python<'_>) {
    py.detach(os::libc_trim);
}

/// Take the ledger of a fence away if no live process is in it; whether it was.
#[pyfunction]
pub fn sweep_fence_ledger(py: Python<'_>, path: PathBuf) -> bool {
    py.detach(|| fence::sweep(&path))
}

/// Lift the soft limit on private memory that a parent's fence left in this forked child.
#[pyfunction]
pub fn lift_inherited_fence() {
    fence::lift_inherited();
}
