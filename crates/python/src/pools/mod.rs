//! The pools as classes: items are Python objects, or blocks of a resource.

mod blocks;
pub(crate) mod buffer;
pub(crate) mod lease;
pub(crate) mod object;
pub(crate) mod records;
pub(crate) mod ticket;
pub(crate) mod vector;
pub(crate) mod view;
mod wait;
