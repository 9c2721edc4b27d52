//! NumPy's side: its memory handlers (NEP 49), in a context and for the whole process.
//!
//! `abi` mirrors the few structures of NumPy's C API that are needed; `scope` sets a handler in a
//! context, `priority` one for a lane; `install` replaces what stands behind NumPy's default one;
//! `array` shows a block as an array. Only this folder and
//! `buffer.rs` hold unsafe code.
#![allow(unsafe_code)]

pub(crate) mod abi;
pub(crate) mod array;
mod entered;
pub(crate) mod install;
pub(crate) mod priority;
pub(crate) mod scope;
