//! The pools as classes: items are Python objects, or blocks of a resource.

pub(crate) mod lease;
pub(crate) mod object;
pub(crate) mod ticket;
mod wait;
