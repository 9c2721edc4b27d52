//! Memory resources: where blocks come from, who owns them, and how they go back to the kernel.
//!
//! This crate is mechanism and knows no Python. Layers, lowest first: [`os`], [`sync`] and
//! [`error`]; then [`resource`]; then [`buffer`]; then [`pools`], [`channel`],
//! [`executor`] and [`pressure`], which do not know each other.

// Loom models explore `sync` and `channel` alone: their types replace those the rest needs from std.
#[cfg(not(loom))]
pub mod buffer;
pub mod channel;
pub mod error;
pub mod executor;
#[cfg(not(loom))]
pub mod os;
#[cfg(not(loom))]
pub mod pools;
#[cfg(not(loom))]
pub mod pressure;
#[cfg(not(loom))]
pub mod resource;
pub mod sync;
