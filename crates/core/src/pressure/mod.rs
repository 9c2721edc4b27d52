//! How close the process is to the limit of its memory, and a fence that holds it there.
//!
//! [`Source`] reads what the kernel says of the process, its control groups and the machine;
//! [`Sampler`] does so on a thread of its own, as often as the room left and the pace of growth ask
//! for; [`fence`] keeps `RLIMIT_DATA` at what is left, so that an allocation fails instead of the
//! process being killed. What follows from a level is not decided here.

mod cgroup;
mod family;
pub mod fence;
mod kept;
mod sampler;
mod source;

pub use fence::FenceSettings;
pub use sampler::{Sampler, SamplerSettings, SamplerStatistics, Waited};
pub use source::{Bound, Kind, Sample, SharedSource, Source};
