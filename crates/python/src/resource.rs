//! The resources and adaptors as classes over one base.

use crate::argument::{Alignment, byte_counts, bytes, choice, milliseconds};
use crate::buffer::Buffer;
use crate::counts::counts;
use crate::errors::{InvalidArgument, to_py};
use crate::lane;
use crate::slab::{Slab, slab};
use moirai_core::os::HugePages;
use moirai_core::resource as core;
use moirai_core::resource::large_object::{Fit, Options};
use moirai_core::resource::priority::Lane;
use moirai_core::resource::registry::{self, Member};
use pyo3::PyClass;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::cell::Cell;
use std::sync::Arc;

/// Requests above this leave the interpreter's lock, since the kernel may take its time.
pub(crate) const DETACH_BYTES: usize = 64 * 1024;
/// So do groups of more blocks than this.
pub(crate) const DETACH_COUNT: usize = 16;

/// A source of memory; the base of every resource and adaptor.
#[pyclass(frozen, subclass, weakref, module = "moirai.memory")]
pub struct Resource {
    /// Dropped before `upstream`, so that what it holds from there goes back first.
    member: Member,
    upstream: Option<Py<Resource>>,
    /// Whether the lane of a request makes a difference.
    has_lanes: bool,
}

impl Resource {
    /// The base of a class over `core`; `upstream` is what it draws from, if that is Python's too.
    pub(crate) fn new(core: Arc<dyn core::Resource>, upstream: Option<Py<Resource>>) -> Self {
        Resource {
            has_lanes: core.has_lanes(),
            member: Member::new(core),
            upstream,
        }
    }

    pub(crate) fn core(&self) -> &Arc<dyn core::Resource> {
        self.member.resource()
    }

    /// Whether the lane of a request makes a difference.
    pub(crate) fn has_lanes(&self) -> bool {
        self.has_lanes
    }

    /// The lane of a request: the argument, or else the context's. None if there are no lanes.
    pub(crate) fn lane(
        &self,
        py: Python<'_>,
        priority: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Lane>> {
        match priority {
            None if self.has_lanes => lane::current(py).map(Some),
            None => Ok(None),
            Some(priority) if self.has_lanes => lane::from_priority("priority", priority).map(Some),
            Some(_) => Err(InvalidArgument::new_err(format!(
                "priority: must be left out, got one for a {} without a PriorityResource in it",
                self.core().name()
            ))),
        }
    }

    /// A resource that draws from `upstream`.
    pub(crate) fn above(core: Arc<dyn core::Resource>, upstream: &Bound<'_, Resource>) -> Self {
        Resource::new(core, Some(upstream.clone().unbind()))
    }

    fn over(core: impl core::Resource + 'static) -> Self {
        Resource::new(Arc::new(core), None)
    }
}

#[pymethods]
impl Resource {
    /// A block of `size_bytes` as a Buffer, or OutOfMemory with nothing changed.
    #[pyo3(
        signature = (size_bytes, *, alignment_bytes=Alignment(core::DEFAULT_ALIGNMENT), zeroed=false, priority=None),
        text_signature = "($self, size_bytes, *, alignment_bytes=64, zeroed=False, priority=None)"
    )]
    fn allocate<'py>(
        slf: &Bound<'py, Self>,
        size_bytes: &Bound<'py, PyAny>,
        alignment_bytes: Alignment,
        zeroed: bool,
        priority: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, Buffer>> {
        let size = bytes("size_bytes", size_bytes)?;
        let lane = slf.get().lane(slf.py(), priority)?;
        Buffer::draw(slf, size, alignment_bytes.0, zeroed, lane)?.into_object(slf.py())
    }

    /// A Buffer for each of `sizes`, or OutOfMemory with none taken.
    #[pyo3(
        signature = (sizes, *, alignment_bytes=Alignment(core::DEFAULT_ALIGNMENT), zeroed=false, priority=None),
        text_signature = "($self, sizes, *, alignment_bytes=64, zeroed=False, priority=None)"
    )]
    fn allocate_group(
        slf: &Bound<'_, Self>,
        sizes: &Bound<'_, PyAny>,
        alignment_bytes: Alignment,
        zeroed: bool,
        priority: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Buffer>> {
        let sizes = byte_counts("sizes", sizes)?;
        let alignment = alignment_bytes.0;
        let lane = slf.get().lane(slf.py(), priority)?;
        Buffer::draw_group(slf, &sizes, alignment, zeroed, lane)
    }

    /// What happened so far.
    fn statistics(&self, py: Python<'_>) -> Statistics {
        Statistics(py.detach(|| self.core().statistics()))
    }

    /// Give kept memory back to the system until at most `target_bytes` are kept.
    #[pyo3(signature = (target_bytes=None), text_signature = "($self, target_bytes=0)")]
    fn trim(&self, py: Python<'_>, target_bytes: Option<&Bound<'_, PyAny>>) -> PyResult<usize> {
        let target = target_bytes.map_or(Ok(0), |value| bytes("target_bytes", value))?;
        Ok(py.detach(|| self.core().trim(target)))
    }

    /// Walk the resource's own structures; raises nothing, reports all.
    fn check(&self, py: Python<'_>) -> HealthReport {
        let mut report = core::HealthReport::default();
        py.detach(|| self.core().check(&mut report));
        HealthReport(report)
    }

    /// The resource this one draws from, or None.
    #[getter]
    fn upstream(&self, py: Python<'_>) -> Option<Py<Resource>> {
        self.upstream
            .as_ref()
            .map(|upstream| upstream.clone_ref(py))
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let counts = slf.get().core().statistics();
        Ok(format!(
            "{}(current_bytes={}, resident_bytes={})",
            slf.get_type().name()?,
            counts.current_bytes,
            counts.resident_bytes
        ))
    }
}

pub(crate) fn with_base<T>(class: T, base: Resource) -> PyClassInitializer<T>
where
    T: PyClass<BaseType = Resource>,
{
    PyClassInitializer::from(base).add_subclass(class)
}

/// Draws every block from the C library.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct SystemResource;

#[pymethods]
impl SystemResource {
    #[new]
    fn new() -> PyClassInitializer<Self> {
        with_base(
            SystemResource,
            Resource::over(core::system::SystemResource::new()),
        )
    }
}

pub(crate) fn options(
    fit: &str,
    huge_pages: &str,
    cache_cap_bytes: Option<&Bound<'_, PyAny>>,
    decay_seconds: Option<f64>,
) -> PyResult<Options> {
    Ok(Options {
        fit: choice(
            "fit",
            fit,
            &[
                ("best", Fit::Best),
                ("first", Fit::First),
                ("worst", Fit::Worst),
            ],
        )?,
        huge_pages: choice(
            "huge_pages",
            huge_pages,
            &[
                ("auto", HugePages::Auto),
                ("always", HugePages::Always),
                ("never", HugePages::Never),
            ],
        )?,
        cache_cap: cache_cap_bytes
            .map(|value| bytes("cache_cap_bytes", value))
            .transpose()?,
        decay_milliseconds: milliseconds("decay_seconds", decay_seconds)?,
        placement: None,
    })
}

/// Spans of pages for large blocks.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct LargeObjectResource;

#[pymethods]
impl LargeObjectResource {
    #[new]
    #[pyo3(
        signature = (*, fit="best", huge_pages="auto", cache_cap_bytes=None, decay_seconds=Some(0.5)),
        text_signature = "(*, fit='best', huge_pages='auto', cache_cap_bytes=None, decay_seconds=0.5)"
    )]
    fn new(
        fit: &str,
        huge_pages: &str,
        cache_cap_bytes: Option<&Bound<'_, PyAny>>,
        decay_seconds: Option<f64>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let options = options(fit, huge_pages, cache_cap_bytes, decay_seconds)?;
        let heap = core::large_object::LargeObjectResource::new(options).map_err(to_py)?;
        Ok(with_base(LargeObjectResource, Resource::over(heap)))
    }
}

/// A slab in front of a large-object heap: the general-purpose resource.
#[pyclass(frozen, subclass, extends = Slab, module = "moirai.memory")]
pub struct PoolResource;

#[pymethods]
impl PoolResource {
    #[new]
    #[pyo3(
        signature = (*, huge_pages="auto", cache_cap_bytes=None, decay_seconds=Some(0.5)),
        text_signature = "(*, huge_pages='auto', cache_cap_bytes=None, decay_seconds=0.5)"
    )]
    fn new(
        huge_pages: &str,
        cache_cap_bytes: Option<&Bound<'_, PyAny>>,
        decay_seconds: Option<f64>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let options = options("best", huge_pages, cache_cap_bytes, decay_seconds)?;
        let pool = Arc::new(core::pool::PoolResource::new(options).map_err(to_py)?);
        let base = Resource::new(pool.clone(), None);
        Ok(slab(PoolResource, pool, base))
    }
}

/// Equal blocks by size class; what is larger than 16 KiB goes upstream.
#[pyclass(frozen, subclass, extends = Slab, module = "moirai.memory")]
pub struct SlabResource;

#[pymethods]
impl SlabResource {
    #[new]
    fn new(upstream: &Bound<'_, Resource>) -> PyResult<PyClassInitializer<Self>> {
        let core = core::slab::SlabResource::new(Arc::clone(upstream.get().core()));
        let core = Arc::new(core.map_err(to_py)?);
        let base = Resource::above(core.clone(), upstream);
        Ok(slab(SlabResource, core, base))
    }
}

fn adaptor(upstream: &Bound<'_, Resource>, core: impl core::Resource + 'static) -> Resource {
    Resource::above(Arc::new(core), upstream)
}

/// Counts what passes through it on the way to `upstream`.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct StatisticsAdaptor(Arc<core::statistics::StatisticsAdaptor>);

/// (start, peak, total bytes; total count; current bytes) of a scope.
type ScopeCounts = (u64, u64, u64, u64, i64);

fn scope_tuple(counts: core::statistics::ScopeCounts) -> ScopeCounts {
    let core::statistics::ScopeCounts {
        start_bytes,
        peak_bytes,
        total_bytes,
        total_count,
        current_bytes,
    } = counts;
    (
        start_bytes,
        peak_bytes,
        total_bytes,
        total_count,
        current_bytes,
    )
}

#[pymethods]
impl StatisticsAdaptor {
    #[new]
    fn new(upstream: &Bound<'_, Resource>) -> PyClassInitializer<Self> {
        let core = core::statistics::StatisticsAdaptor::new(Arc::clone(upstream.get().core()));
        let core = Arc::new(core);
        let base = Resource::above(core.clone(), upstream);
        with_base(StatisticsAdaptor(core), base)
    }

    /// Open a scope; the number names it.
    fn open_scope(&self) -> u64 {
        self.0.open_scope()
    }

    /// (start, peak, total bytes; total count; current bytes) of an open scope, or None.
    fn scope_counts(&self, scope: u64) -> Option<ScopeCounts> {
        self.0.scope_counts(scope).map(scope_tuple)
    }

    /// Close a scope; its counts, or None if it is not open.
    fn close_scope(&self, scope: u64) -> Option<ScopeCounts> {
        self.0.close_scope(scope).map(scope_tuple)
    }
}

/// Refuses what would take the use of `upstream` above a limit.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct LimitAdaptor {
    /// The limit in bytes.
    #[pyo3(get)]
    limit_bytes: usize,
}

thread_local! {
    static COLLECTING: Cell<bool> = const { Cell::new(false) };
}

/// Run Python's garbage collector, unless this thread is in it already or Python is ending.
fn collect_garbage() {
    if COLLECTING.replace(true) {
        return;
    }
    Python::try_attach(|py| {
        // An exception may be on its way through the caller; keep it.
        let pending = PyErr::take(py);
        if let Err(error) = py.import("gc").and_then(|gc| gc.call_method0("collect")) {
            error.write_unraisable(py, None);
        }
        if let Some(pending) = pending {
            pending.restore(py);
        }
    });
    COLLECTING.set(false);
}

#[pymethods]
impl LimitAdaptor {
    #[new]
    #[pyo3(signature = (upstream, *, limit_bytes))]
    fn new(
        upstream: &Bound<'_, Resource>,
        limit_bytes: &Bound<'_, PyAny>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let limit_bytes = bytes("limit_bytes", limit_bytes)?;
        let limit = core::limit::LimitAdaptor::new(
            Arc::clone(upstream.get().core()),
            limit_bytes,
            Box::new(collect_garbage),
        );
        Ok(with_base(
            LimitAdaptor { limit_bytes },
            adaptor(upstream, limit),
        ))
    }
}

/// Counts of a resource; bytes are block bytes, the request rounded up to its block.
#[pyclass(frozen, eq, module = "moirai.memory")]
#[derive(PartialEq)]
pub struct Statistics(core::Statistics);

counts! {
    Statistics;
    /// Bytes in blocks that are handed out now.
    current_bytes,
    /// Blocks that are handed out now.
    current_count,
    /// Most bytes handed out at once; a slab counts blocks resting in magazines too.
    peak_bytes,
    /// Most blocks handed out at once, with the same remark.
    peak_count,
    /// Bytes handed out so far.
    total_bytes,
    /// Blocks handed out so far.
    total_count,
    /// Blocks served from memory that was used before and kept.
    hits,
    /// Blocks served from memory new from the kernel, or from libc, which does not say.
    misses,
    /// Bytes held from the kernel, handed out or kept, whether touched or not.
    resident_bytes,
    /// Bytes held from the kernel that are not handed out.
    cached_bytes,
    /// Bytes of kept spans of pages that were handed out again.
    reused_bytes,
    /// Pages of kept spans that were handed out again without having been given back.
    reused_pages,
    /// Bytes given back to the kernel so far.
    decommitted_bytes,
    /// Frees of an address that was no live block; they are ignored.
    invalid_frees,
}

/// What a walk over a resource's structures found.
#[pyclass(frozen, module = "moirai.memory")]
pub struct HealthReport(core::HealthReport);

#[pymethods]
impl HealthReport {
    /// Whether every invariant held.
    #[getter]
    fn ok(&self) -> bool {
        self.0.findings.is_empty()
    }

    /// One sentence for each broken invariant.
    #[getter]
    fn findings(&self) -> Vec<String> {
        self.0.findings.clone()
    }

    /// What was counted on the way, by name.
    #[getter]
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, value) in &self.0.counts {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn __str__(&self) -> String {
        let mut lines = match self.0.findings.len() {
            0 => vec!["healthy".to_owned()],
            count => vec![format!("{count} finding(s)")],
        };
        lines.extend(self.0.findings.iter().map(|finding| format!("- {finding}")));
        lines.extend(
            self.0
                .counts
                .iter()
                .map(|(name, value)| format!("{name}: {value}")),
        );
        lines.join("\n")
    }

    fn __repr__(&self) -> String {
        format!(
            "HealthReport(ok={}, findings={:?})",
            self.ok(),
            self.0.findings
        )
    }
}

/// (number, name, numbers of its sources, counts before, report, held upstream, counts after).
type Walked = (
    u64,
    &'static str,
    Vec<u64>,
    Statistics,
    HealthReport,
    Option<(u64, u64)>,
    Statistics,
);

/// Look at every resource that is alive, oldest first; nothing is stopped meanwhile.
#[pyfunction]
pub fn walk_resources(py: Python<'_>) -> Vec<Walked> {
    let record = |walked: registry::Walked| {
        (
            walked.id,
            walked.name,
            walked.sources,
            Statistics(walked.before),
            HealthReport(walked.report),
            walked.held_upstream,
            Statistics(walked.after),
        )
    };
    let walked = py.detach(registry::walk);
    walked.into_iter().map(record).collect()
}

/// (number, name, blocks, bytes) of resources that went while blocks of theirs were out.
#[pyfunction]
pub fn lost_blocks() -> Vec<(u64, &'static str, u64, u64)> {
    let record = |loss: registry::Loss| (loss.id, loss.name, loss.block_count, loss.block_bytes);
    registry::losses().into_iter().map(record).collect()
}
