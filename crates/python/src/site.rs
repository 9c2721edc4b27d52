//! Which line of the program is asking.
#![allow(unsafe_code)]

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyCode;

/// How far up the stack to look for a line of the program itself.
const FRAMES: usize = 40;

/// "file:line" of the innermost line outside installed packages and this one, or else the
/// innermost line; `None` if no Python code runs. Keeps an exception that is on its way.
pub(crate) fn current(py: Python<'_>) -> Option<String> {
    let pending = PyErr::take(py);
    let found = walk(py);
    if let Some(pending) = pending {
        pending.restore(py);
    }
    found
}

fn walk(py: Python<'_>) -> Option<String> {
    // SAFETY: attached; returns a borrowed reference or null.
    let frame = unsafe { ffi::PyEval_GetFrame() };
    // SAFETY: as said.
    let mut frame = unsafe { Bound::from_borrowed_ptr_or_opt(py, frame.cast()) };
    let mut innermost = None;
    for _ in 0..FRAMES {
        let Some(current) = frame else { break };
        let code = current.getattr("f_code").ok()?.cast_into::<PyCode>().ok()?;
        let file: String = code.getattr("co_filename").ok()?.extract().ok()?;
        let line: u32 = current.getattr("f_lineno").ok()?.extract().ok()?;
        let place = format!("{file}:{line}");
        let library = file.contains("site-packages")
            || file.contains("dist-packages")
            || file.starts_with('<')
            || is_ours(&current);
        if !library {
            return Some(place);
        }
        innermost.get_or_insert(place);
        frame = current
            .getattr("f_back")
            .ok()
            .filter(|back| !back.is_none());
    }
    innermost
}

/// Whether a frame is of this package, also where that is not among the installed ones.
fn is_ours(frame: &Bound<'_, PyAny>) -> bool {
    let name = frame
        .getattr("f_globals")
        .and_then(|globals| globals.get_item("__name__"))
        .and_then(|name| name.extract::<String>());
    name.is_ok_and(|name| name == "moirai" || name.starts_with("moirai."))
}
