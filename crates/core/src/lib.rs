//! Memory resources: where blocks come from, who owns them, and how they go back to the kernel.
//!
//! This crate is mechanism and knows no Python. Layers, lowest first: [`os`], [`sync`] and
//! [`error`]; then [`resource`]; then [`buffer`].

pub mod buffer;
pub mod error;
pub mod os;
pub mod resource;
pub mod sync;
