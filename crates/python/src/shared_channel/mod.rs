//! `SharedChannel`: messages between processes.

pub(crate) mod array;
pub(crate) mod block;
mod bytes;
pub(crate) mod handle;
pub(crate) mod lent;
pub(crate) mod receiver;
mod reference;
pub(crate) mod sender;
mod wait;
