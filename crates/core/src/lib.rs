//! Memory resources: where blocks come from, who owns them, and how they go back to the kernel.
//!
//! This crate is mechanism and knows no Python. Layers, lowest first: [`os`], [`sync`] and
//! [`error`]; then [`resource`]; then [`buffer`]; then [`pools`] and
//! [`channel`].

// Loom models explore `sync` alone: its types replace the ones that the rest needs from std.
#[cfg(not(loom))]
pub mod buffer;
#[cfg(not(loom))]
pub mod channel;
pub mod error;
#[cfg(not(loom))]
pub mod os;
#[cfg(not(loom))]
pub mod pools;
#[cfg(not(loom))]
pub mod resource;
pub mod sync;
