//! `NumaResource`, and where the pages of a buffer lie.

use crate::argument::{choice, count};
use crate::errors::{InvalidArgument, Unsupported, to_py};
use crate::resource::{Resource, options, with_base};
use moirai_core::os::numa::{self, NodeSet, Placement, Policy};
use moirai_core::resource as core;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Pools whose pages come from chosen nodes.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct NumaResource(Arc<core::numa::NumaResource>);

#[pymethods]
impl NumaResource {
    #[new]
    #[pyo3(
        signature = (*, policy, node_sets, pool_of_cpu, huge_pages="auto", cache_cap_bytes=None, decay_seconds=Some(0.5)),
        text_signature = "(*, policy, node_sets, pool_of_cpu, huge_pages='auto', cache_cap_bytes=None, decay_seconds=0.5)"
    )]
    fn new(
        policy: &str,
        node_sets: Vec<Vec<usize>>,
        pool_of_cpu: Vec<u16>,
        huge_pages: &str,
        cache_cap_bytes: Option<&Bound<'_, PyAny>>,
        decay_seconds: Option<f64>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let policies = [
            ("none", None),
            ("prefer", Some(Policy::Prefer)),
            ("bind", Some(Policy::Bind)),
            ("interleave", Some(Policy::Interleave)),
        ];
        let policy = choice("policy", policy, &policies)?;
        let placement = |ids: &Vec<usize>| {
            let nodes = NodeSet::new(ids).ok_or_else(|| {
                let most = numa::MAX_NODES;
                InvalidArgument::new_err(format!("node_sets: must be below {most}, got {ids:?}"))
            })?;
            Ok(policy.map(|policy| Placement { policy, nodes }))
        };
        let placements: PyResult<Vec<_>> = node_sets.iter().map(placement).collect();
        let options = options("best", huge_pages, cache_cap_bytes, decay_seconds)?;
        let core = core::numa::NumaResource::placed(&placements?, &pool_of_cpu, options);
        let core = Arc::new(core.map_err(to_py)?);
        let base = Resource::new(core.clone(), None);
        Ok(with_base(NumaResource(core), base))
    }

    /// What the kernel refused to place, and why; None if all of it lies as asked.
    #[getter]
    fn refusal(&self) -> Option<String> {
        self.0.refusal()
    }
}

/// Have memory that this thread touches first come from a node, as long as that has any.
#[pyfunction]
pub fn prefer_node(node: &Bound<'_, PyAny>) -> PyResult<()> {
    let node = count("node", node, 0..=usize::MAX >> 1)?;
    let nodes = NodeSet::new(&[node]).ok_or_else(|| {
        let most = numa::MAX_NODES;
        InvalidArgument::new_err(format!("node: must be below {most}, got {node}"))
    })?;
    let policy = Policy::Prefer;
    numa::place_thread(&Placement { policy, nodes }).map_err(|error| {
        Unsupported::new_err(format!("node: the kernel does not take {node}: {error}"))
    })
}

/// How many pages of a buffer lie on each node; None: not in memory.
#[pyfunction]
pub fn pages_by_node(
    py: Python<'_>,
    buffer: &Bound<'_, PyAny>,
) -> PyResult<BTreeMap<Option<usize>, usize>> {
    let view = PyUntypedBuffer::get(buffer)?;
    if !view.is_c_contiguous() && !view.is_fortran_contiguous() {
        return Err(InvalidArgument::new_err(
            "buffer: must be contiguous, got one with gaps",
        ));
    }
    let (address, bytes) = (view.buf_ptr() as usize, view.len_bytes());
    let nodes = py
        .detach(|| numa::nodes_of_pages(address as *const u8, bytes))
        .map_err(|error| {
            Unsupported::new_err(format!("buffer: the kernel does not say: {error}"))
        })?;
    let mut counts = BTreeMap::new();
    for node in nodes {
        *counts.entry(node).or_insert(0) += 1;
    }
    Ok(counts)
}
