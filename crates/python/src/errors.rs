//! The core's errors as the exceptions of `moirai.errors`.

use moirai_core::error::Error;
use pyo3::{PyErr, import_exception};

import_exception!(moirai.errors, Closed);

import_exception!(moirai.errors, Corrupted);
import_exception!(moirai.errors, Disconnected);
import_exception!(moirai.errors, InvalidArgument);
import_exception!(moirai.errors, OutOfMemory);
import_exception!(moirai.errors, Timeout);
import_exception!(moirai.errors, Unsupported);
import_exception!(moirai.errors, WrongType);

pub(crate) fn to_py(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::InvalidArgument { .. } => InvalidArgument::new_err(message),
        Error::OutOfMemory { .. } => OutOfMemory::new_err(message),
        Error::Unsupported { .. } => Unsupported::new_err(message),
        Error::Closed { .. } => Closed::new_err(message),
        Error::Disconnected { .. } => Disconnected::new_err(message),
        Error::Corrupted { .. } => Corrupted::new_err(message),
    }
}
