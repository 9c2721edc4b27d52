//! The core as the Python module `moirai._native`: convert, detach, call the core, map the error.

#![deny(unsafe_code)]

mod argument;
mod buffer;
mod errors;
mod numpy;
mod pools;
mod resource;
mod site;

use pyo3::prelude::*;

/// The compiled core. Import it through `moirai.memory` or `moirai.pools`, never directly.
#[pymodule(gil_used = false)]
mod _native {
    use super::*;

    #[pymodule_export]
    use super::buffer::Buffer;
    #[pymodule_export]
    use super::numpy::install::{install, installed, largest_arrays, uninstall};
    #[pymodule_export]
    use super::numpy::scope::{Use, handler_of};
    #[pymodule_export]
    use super::pools::buffer::{BufferPool, PooledBuffer};
    #[pymodule_export]
    use super::pools::lease::Lease;
    #[pymodule_export]
    use super::pools::object::ObjectPool;
    #[pymodule_export]
    use super::pools::records::{Acquisition, PoolStatistics};
    #[pymodule_export]
    use super::pools::ticket::Ticket;
    #[pymodule_export]
    use super::pools::vector::{Vector, VectorPool};
    #[pymodule_export]
    use super::resource::{
        HealthReport, LargeObjectResource, LimitAdaptor, PoolResource, Resource, SlabResource,
        Statistics, StatisticsAdaptor, SystemResource,
    };

    /// End the background thread that lets kept memory age; it starts again when needed.
    #[pyfunction]
    fn stop_background(py: Python<'_>) {
        py.detach(moirai_core::resource::stop_background);
    }

    /// How this module was compiled: "release" or "debug".
    #[pyfunction]
    fn build_profile() -> &'static str {
        if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        }
    }
}
