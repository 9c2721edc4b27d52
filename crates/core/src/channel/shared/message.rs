//! Messages of several parts: a table, then the parts, each at the start of a cache line.
//!
//! An array is a header and its items; an object is a pickle and the buffers it left out of band.

use crate::error::{Error, Result};
use std::ops::Range;

const ALIGNMENT: usize = 64;
const ENTRY: usize = 16;

/// Plain bytes, of no parts.
pub const BYTES: u8 = 0;
/// An array: its header, its items.
pub const ARRAY: u8 = 1;
/// An object: its pickle, its buffers.
pub const OBJECT: u8 = 2;
/// An object that is nothing but its pickle: plain bytes.
pub const PICKLE: u8 = 3;
/// An array by reference: where it is, its header.
pub const LENT_ARRAY: u8 = 4;
/// An object with arrays by reference: where they are, then as an object.
pub const LENT_OBJECT: u8 = 5;

/// Where the parts of a message lie.
pub struct Plan {
    parts: Vec<Range<usize>>,
}

impl Plan {
    /// Parts of these lengths; `None` if they are longer than anything.
    pub fn new(lengths: &[usize]) -> Option<Self> {
        let mut end = 8 + lengths.len() * ENTRY;
        let mut parts = Vec::with_capacity(lengths.len());
        for length in lengths {
            let start = end.checked_next_multiple_of(ALIGNMENT)?;
            end = start.checked_add(*length)?;
            parts.push(start..end);
        }
        Some(Plan { parts })
    }

    /// Bytes of the whole message.
    pub fn length(&self) -> usize {
        self.parts.last().map_or(8, |part| part.end)
    }

    /// Where the parts lie.
    pub fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    /// The table that the message begins with.
    pub fn table(&self) -> Vec<u8> {
        let numbers = self.parts.iter().flat_map(|part| [part.start, part.len()]);
        std::iter::once(self.parts.len())
            .chain(numbers)
            .flat_map(|number| (number as u64).to_le_bytes())
            .collect()
    }

    /// Read the table of a message of `length` bytes; `read` copies from an offset.
    pub fn read(length: usize, read: impl Fn(usize, &mut [u8])) -> Result<Self> {
        let broken = || {
            Error::corrupted(format!(
                "segment: a message of {length} bytes has a table that leads out of it: a process \
                 has overwritten it"
            ))
        };
        let number = |offset: usize| -> Result<usize> {
            if offset + 8 > length {
                return Err(broken());
            }
            let mut bytes = [0; 8];
            read(offset, &mut bytes);
            usize::try_from(u64::from_le_bytes(bytes)).map_err(|_| broken())
        };
        let count = number(0)?;
        if count > length / ENTRY {
            return Err(broken());
        }
        let part = |index: usize| {
            let start = number(8 + index * ENTRY)?;
            let end = start.checked_add(number(16 + index * ENTRY)?);
            let end = end.filter(|end| *end <= length).ok_or_else(broken)?;
            Ok(start..end)
        };
        let parts = (0..count).map(part).collect::<Result<Vec<_>>>()?;
        Ok(Plan { parts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(bytes: &[u8]) -> Result<Plan> {
        Plan::read(bytes.len(), |offset, place| {
            place.copy_from_slice(&bytes[offset..offset + place.len()]);
        })
    }

    #[test]
    fn a_plan_is_read_as_it_was_written() {
        for lengths in [vec![], vec![0], vec![5, 0, 64, 1 << 20]] {
            let plan = Plan::new(&lengths).unwrap();
            let mut bytes = plan.table();
            bytes.resize(plan.length(), 0);
            assert_eq!(from(&bytes).unwrap().parts(), plan.parts());
            assert!(plan.parts().iter().all(|part| part.start % 64 == 0));
        }
        assert!(Plan::new(&[usize::MAX]).is_none());
    }

    #[test]
    fn a_table_that_leads_out_of_the_message_is_refused() {
        let good = Plan::new(&[5]).unwrap();
        for at in 0..24 {
            let mut bytes = good.table();
            bytes.resize(good.length(), 0);
            bytes[at] = 0xff;
            let _ = from(&bytes);
            bytes[at | 7] = 0xff;
            assert!(from(&bytes).is_err(), "{at}");
        }
        assert!(from(&[]).is_err());
        assert!(from(&[1, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }
}
