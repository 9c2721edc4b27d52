//! Channels: bounded queues between threads and between processes.

pub mod shared;
