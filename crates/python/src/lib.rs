//! The core as the Python module `moirai._native`: convert, detach, call the core, map the error.

#![deny(unsafe_code)]

mod adaptive;
mod arena;
mod argument;
mod attached;
mod buffer;
mod channel;
mod counts;
mod errors;
mod executor;
mod lane;
mod numa;
mod numpy;
mod pools;
mod pressure;
mod priority;
mod resource;
mod shared_channel;
mod shared_memory;
mod site;
mod slab;
mod transaction;

use pyo3::prelude::*;

/// The compiled core. Import it through a facade such as `moirai.memory`, never directly.
#[pymodule(gil_used = false)]
mod _native {
    use super::*;

    #[pymodule_export]
    use super::adaptive::{AdaptiveResource, PatternAdaptor};
    #[pymodule_export]
    use super::arena::{Arena, ArenaResource, Savepoint, ThreadLocalArena};
    #[pymodule_export]
    use super::buffer::{Batch, Buffer};
    #[pymodule_export]
    use super::channel::awaitable::{Pending, Waiting};
    #[pymodule_export]
    use super::channel::ends::{Receiver, Sender};
    #[pymodule_export]
    use super::channel::queue::BareQueue;
    #[pymodule_export]
    use super::channel::waker::LoopDoorbell;
    #[pymodule_export]
    use super::channel::{Channel, ChannelStatistics, select_channels, select_channels_async};
    #[pymodule_export]
    use super::executor::future::Future;
    #[pymodule_export]
    use super::executor::limits::{CancelToken, TimerHandle, call_outside_tasks, task_token};
    #[pymodule_export]
    use super::executor::pool::BareExecutor;
    #[pymodule_export]
    use super::executor::rehearsal::Rehearsal;
    #[pymodule_export]
    use super::executor::results::Results;
    #[pymodule_export]
    use super::executor::worker::WorkerHandle;
    #[pymodule_export]
    use super::lane::current_lane;
    #[pymodule_export]
    use super::numa::{NumaResource, pages_by_node, prefer_node};
    #[pymodule_export]
    use super::numpy::install::{install, installed, largest_arrays, uninstall};
    #[pymodule_export]
    use super::numpy::priority::Priority;
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
    use super::pressure::{
        PressureSampler, PressureSource, idle_channel_bytes, lift_inherited_fence,
        retained_heap_bytes, sweep_fence_ledger, trim_channels, trim_libc_heap, trim_resources,
    };
    #[pymodule_export]
    use super::priority::{PriorityResource, RealtimeResource};
    #[pymodule_export]
    use super::resource::{
        HealthReport, LargeObjectResource, LimitAdaptor, PoolResource, Resource, SlabResource,
        Statistics, StatisticsAdaptor, SystemResource, lost_blocks, walk_resources,
    };
    #[pymodule_export]
    use super::shared_channel::array::{ReceivedView, ReservedArray};
    #[pymodule_export]
    use super::shared_channel::block::SharedBlock;
    #[pymodule_export]
    use super::shared_channel::handle::SharedChannel;
    #[pymodule_export]
    use super::shared_channel::lent::LentBlock;
    #[pymodule_export]
    use super::shared_channel::receiver::SharedReceiver;
    #[pymodule_export]
    use super::shared_channel::sender::SharedSender;
    #[pymodule_export]
    use super::shared_memory::{SharedMemoryResource, linger};
    #[pymodule_export]
    use super::slab::Slab;
    #[pymodule_export]
    use super::transaction::{TransactionArena, TransactionStore};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::channel::awaitable::install_send_slot(module.py());
        super::channel::fast::install(module.py())
    }

    /// End the background thread that lets kept memory age; it starts again when needed.
    #[pyfunction]
    fn stop_background(py: Python<'_>) {
        py.detach(moirai_core::resource::stop_background);
    }

    /// Have libc's heap keep freed memory and give it back by age; false if libc is not glibc.
    #[pyfunction]
    fn keep_libc_heap(keep_bytes: &Bound<'_, PyAny>, decay_seconds: f64) -> PyResult<bool> {
        let keep = argument::bytes("keep_bytes", keep_bytes)?;
        let decay = argument::milliseconds("decay_seconds", Some(decay_seconds))?;
        Ok(moirai_core::resource::libc_heap::keep_warm(
            keep,
            decay.unwrap_or_default(),
        ))
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
