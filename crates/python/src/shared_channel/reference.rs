//! Arrays that are sent by reference: finding the block they lie in, and the header that says how.
#![allow(unsafe_code)]

use super::array::Types;
use super::lent::LentBlock;
use crate::buffer::Buffer;
use crate::errors::Corrupted;
use crate::numpy::abi;
use crate::numpy::array::{self, Shape};
use crate::numpy::scope::{self, Source};
use crate::resource::Resource;
use moirai_core::channel::shared::reference::{Part, Received};
use moirai_core::resource::shared_memory::Place;
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyMemoryView;
use std::ptr::NonNull;
use std::sync::Arc;

/// How many owners deep a block is looked for.
const MAX_DEPTH: usize = 8;

/// A block in shared memory: where it is among all processes, and here.
struct Found {
    place: Place,
    start: usize,
    size: usize,
}

fn block_of(resource: &Resource, address: NonNull<u8>) -> Option<Found> {
    let place = resource.core().shared_memory()?.place(address)?;
    let (start, size) = place.holding.place(place.page)?;
    Some(Found {
        place,
        start: start.as_ptr() as usize,
        size,
    })
}

/// The block in shared memory that `object` keeps and shows, if there is one.
fn find(object: &Bound<'_, PyAny>) -> PyResult<Option<Found>> {
    let mut owner = object.clone();
    for _ in 0..MAX_DEPTH {
        if let Ok(lent) = owner.cast::<LentBlock>() {
            let hold = &lent.get().received().hold;
            let place = Place {
                holding: Arc::clone(hold.holding()),
                page: hold.page(),
            };
            return Ok(hold.place().map(|(start, size)| Found {
                place,
                start: start.as_ptr() as usize,
                size,
            }));
        }
        if let Ok(buffer) = owner.cast::<Buffer>() {
            let Some(address) = buffer.get().whole() else {
                return Ok(None);
            };
            return Ok(block_of(buffer.get().source().get(), address));
        }
        if owner.is_instance_of::<PyMemoryView>() {
            owner = owner.getattr(intern!(owner.py(), "obj"))?;
            continue;
        }
        match scope::source(&owner)? {
            None => return Ok(None),
            Some(Source::Block(resource, address)) => {
                return Ok(block_of(resource.get(), address));
            }
            Some(Source::Object(base)) => owner = base,
        }
    }
    Ok(None)
}

/// `length` bytes at an address that `object` shows, as a part of a message by reference.
pub(super) fn part(
    object: &Bound<'_, PyAny>,
    address: *const u8,
    length: usize,
    part: usize,
) -> PyResult<Option<Part>> {
    let Some(found) = find(object)? else {
        return Ok(None);
    };
    let offset = (address as usize).checked_sub(found.start);
    let offset = offset.filter(|offset| {
        let end = offset.checked_add(length);
        end.is_some_and(|end| end <= found.size)
    });
    Ok(offset.map(|offset| Part {
        place: found.place,
        part,
        offset,
        length,
    }))
}

/// How many bytes before and after its first item an array reaches; `None` if that is no number.
fn reach(lengths: &[isize], strides: &[isize], item_bytes: usize) -> Option<(usize, usize)> {
    if lengths.contains(&0) {
        return Some((0, 0));
    }
    let (mut before, mut after) = (0usize, item_bytes);
    for (length, stride) in lengths.iter().zip(strides) {
        let way = stride.unsigned_abs().checked_mul((length - 1) as usize)?;
        let side = if *stride < 0 { &mut before } else { &mut after };
        *side = side.checked_add(way)?;
    }
    Some((before, after))
}

/// An array in shared memory as the part of a message and what is to be said of it; `None` if it is
/// elsewhere, or its items are no plain values.
pub(super) fn array_part(
    types: &Types,
    array: &Bound<'_, PyAny>,
) -> PyResult<Option<(Part, Vec<u8>)>> {
    // Looked for first: most arrays lie elsewhere.
    let Some(found) = find(array)? else {
        return Ok(None);
    };
    // SAFETY: `find` gives blocks of arrays, of LentBlocks and of Buffers; the caller passes arrays.
    let shown = unsafe { abi::shown(array) };
    let Ok(items) = array::items(array.py(), Some(&shown.descr)) else {
        return Ok(None);
    };
    let Some((before, after)) = reach(shown.lengths, shown.strides, items.item_bytes) else {
        return Ok(None);
    };
    let offset = (shown.data as usize).checked_sub(found.start);
    let Some(offset) = offset.filter(|it| *it >= before && it + after <= found.size) else {
        return Ok(None);
    };
    // A dtype that is not written so, such as one of fields out of order, pickle writes.
    let Ok(text) = types.text_of(items.descr()) else {
        return Ok(None);
    };
    let mut header = Vec::with_capacity(1 + 16 * shown.lengths.len() + text.len());
    header.push(shown.lengths.len() as u8);
    for number in shown.lengths.iter().chain(shown.strides) {
        header.extend((*number as i64).to_le_bytes());
    }
    header.extend(&*text);
    let part = Part {
        place: found.place,
        part: 0,
        offset,
        length: after,
    };
    Ok(Some((part, header)))
}

/// The array that was received: read-only unless it was given away and is wanted `writable`. What
/// is wanted writable and was only lent is copied.
pub(super) fn received_array<'py>(
    py: Python<'py>,
    types: &Types,
    received: Received,
    header: &[u8],
    writable: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let broken = || {
        Corrupted::new_err(
            "segment: the header of an array is none that any sender writes: a process has \
             overwritten it",
        )
    };
    let (count, rest) = header.split_first().ok_or_else(broken)?;
    let count = usize::from(*count);
    let (numbers, text) = rest.split_at_checked(16 * count).ok_or_else(broken)?;
    let number = |bytes: &[u8]| i64::from_le_bytes(bytes.try_into().unwrap_or_default());
    let numbers: Vec<i64> = numbers.chunks_exact(8).map(number).collect();
    let shape = Shape::from_lengths(&numbers[..count]).ok_or_else(broken)?;
    let strides: Vec<ffi::Py_ssize_t> = numbers[count..].iter().map(|it| *it as isize).collect();
    let dtype = types.dtype_of(py, text)?;
    let items = array::items(py, Some(&dtype))?;
    let (before, after) = reach(shape.lengths(), &strides, items.item_bytes).ok_or_else(broken)?;
    if before > received.offset || after > received.room {
        return Err(broken());
    }
    let (address, is_given) = (received.address, received.is_given);
    let owner = Bound::new(py, LentBlock::new(received))?.into_any();
    // SAFETY: all that the array reaches lies in the block, as found above, which the owner holds.
    let array = unsafe { array::over(items, &shape, Some(&strides), address, owner) }?;
    if writable && !is_given {
        return array.call_method0(intern!(py, "copy"));
    }
    if !writable {
        // SAFETY: made above, and nobody else has it.
        unsafe { abi::refuse_writes(&array) };
    }
    Ok(array)
}
