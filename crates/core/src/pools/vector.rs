//! Bytes in a block that may be viewed from outside, and that may grow when they are not.

use crate::buffer::Buffer;
use crate::error::Result;
use crate::resource::Resource;
use std::ptr::NonNull;
use std::sync::Arc;

/// Views of a vector are alive, so that its length cannot change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Viewed {
    /// How many.
    pub view_count: usize,
}

/// What a change of length needs first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Nothing: it fits.
    Enough,
    /// A block of this many bytes, for [`Vector::move_to`].
    Short(usize),
}

/// A run of bytes at the start of a block, from which it can move to a larger one.
///
/// Invariants: `size <= block.block_size()`; while `view_count > 0` neither `size` nor `block`
/// changes. A block of which there ever was a view lives as long as the vector: a consumer that does
/// not keep its view (NumPy's `ndarray(buffer=...)`) must not be left with freed memory.
pub struct Vector {
    block: Arc<Buffer>,
    size: usize,
    view_count: usize,
    was_viewed: bool,
    retired: Vec<Arc<Buffer>>,
}

impl Vector {
    /// The first `size` bytes of a block that nobody else uses.
    pub fn new(block: Arc<Buffer>, size: usize) -> Self {
        debug_assert!(size <= block.block_size());
        Vector {
            block,
            size,
            view_count: 0,
            was_viewed: false,
            retired: Vec::new(),
        }
    }

    /// The block it is in.
    pub fn block(&self) -> &Arc<Buffer> {
        &self.block
    }

    /// Bytes of it.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Bytes it may have where it is.
    pub fn capacity(&self) -> usize {
        self.block.block_size()
    }

    /// Views of it that are alive.
    pub fn view_count(&self) -> usize {
        self.view_count
    }

    /// Begin a view: where the bytes are and how many.
    pub fn view(&mut self) -> (NonNull<u8>, usize) {
        self.view_count += 1;
        self.was_viewed = true;
        (self.block.address(), self.size)
    }

    /// End a view.
    pub fn end_view(&mut self) {
        debug_assert!(self.view_count > 0);
        self.view_count -= 1;
    }

    fn unviewed(&self) -> std::result::Result<(), Viewed> {
        match self.view_count {
            0 => Ok(()),
            view_count => Err(Viewed { view_count }),
        }
    }

    /// What it takes to append `bytes` more; a larger block is `growth` times the present one, or
    /// what is needed if that is more.
    pub fn room(&self, bytes: usize, growth: f64) -> std::result::Result<Room, Viewed> {
        self.unviewed()?;
        let needed = self.size.saturating_add(bytes);
        Ok(if needed <= self.capacity() {
            Room::Enough
        } else {
            Room::Short(needed.max((self.capacity() as f64 * growth) as usize))
        })
    }

    /// Move to another block. What is returned is to be dropped: the old one, or the new one if it
    /// is no larger.
    pub fn move_to(
        &mut self,
        block: Arc<Buffer>,
    ) -> std::result::Result<Option<Arc<Buffer>>, (Viewed, Arc<Buffer>)> {
        if let Err(viewed) = self.unviewed() {
            return Err((viewed, block));
        }
        if block.block_size() <= self.capacity() {
            return Ok(Some(block));
        }
        let (from, to) = (self.block.address(), block.address());
        // SAFETY: both blocks have at least `size` bytes, and live blocks do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), self.size) };
        let old = std::mem::replace(&mut self.block, block);
        if std::mem::take(&mut self.was_viewed) {
            self.retired.push(old);
            return Ok(None);
        }
        Ok(Some(old))
    }

    /// Append `bytes` bytes from `source`; false, and nothing done, if they do not fit.
    ///
    /// # Safety
    /// `source` is readable for `bytes` bytes and lies in no part of the block beyond `size`.
    pub unsafe fn append(
        &mut self,
        source: *const u8,
        bytes: usize,
    ) -> std::result::Result<bool, Viewed> {
        self.unviewed()?;
        if bytes > self.capacity() - self.size {
            return Ok(false);
        }
        // SAFETY: `size <= capacity`, so the end lies in the block or just behind it.
        let end = unsafe { self.block.address().add(self.size) };
        // SAFETY: the source is readable, `bytes` fit behind `size`, and the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(source, end.as_ptr(), bytes) };
        self.size += bytes;
        Ok(true)
    }

    /// Forget all bytes; the block stays.
    pub fn clear(&mut self) -> std::result::Result<(), Viewed> {
        self.unviewed()?;
        self.size = 0;
        Ok(())
    }

    /// Overwrite all bytes with zero.
    pub fn zero(&mut self) {
        // SAFETY: the block has at least `size` bytes.
        unsafe { std::ptr::write_bytes(self.block.address().as_ptr(), 0, self.size) };
    }
}

/// A block for a vector.
pub fn draw(resource: &Arc<dyn Resource>, size: usize, zeroed: bool) -> Result<Arc<Buffer>> {
    let alignment = crate::resource::DEFAULT_ALIGNMENT;
    Buffer::new(Arc::clone(resource), size, alignment, zeroed).map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::statistics::StatisticsAdaptor;
    use crate::resource::system::SystemResource;
    use proptest::prelude::*;

    fn resource() -> Arc<dyn Resource> {
        Arc::new(StatisticsAdaptor::new(Arc::new(SystemResource::new())))
    }

    fn contents(vector: &mut Vector) -> Vec<u8> {
        let (address, size) = vector.view();
        // SAFETY: a view of `size` bytes, which were all written by `append`.
        let bytes = unsafe { std::slice::from_raw_parts(address.as_ptr(), size) }.to_vec();
        vector.end_view();
        bytes
    }

    #[derive(Clone, Debug)]
    enum Step {
        Append(Vec<u8>),
        Clear,
        View,
        EndView,
        Zero,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => prop::collection::vec(any::<u8>(), 0..300).prop_map(Step::Append),
            1 => Just(Step::Clear),
            1 => Just(Step::View),
            2 => Just(Step::EndView),
            1 => Just(Step::Zero),
        ]
    }

    proptest! {
        #[test]
        fn a_vector_is_a_list_of_bytes_that_does_not_move_while_it_is_viewed(
            steps in prop::collection::vec(step(), 1..60),
            growth in 1.5f64..2.0,
        ) {
            let resource = resource();
            let mut vector = Vector::new(draw(&resource, 64, false).unwrap(), 0);
            let mut model: Vec<u8> = Vec::new();
            let mut views = Vec::new();
            for step in steps {
                match step {
                    Step::Append(bytes) => match vector.room(bytes.len(), growth) {
                        Err(viewed) => assert_eq!(viewed.view_count, views.len()),
                        Ok(room) => {
                            assert!(views.is_empty());
                            if let Room::Short(wanted) = room {
                                assert!(wanted >= model.len() + bytes.len());
                                assert!(wanted as f64 >= vector.capacity() as f64 * growth - 1.0);
                                drop(vector.move_to(draw(&resource, wanted, false).unwrap()));
                            }
                            // SAFETY: a slice outside of the block.
                            let fitted = unsafe { vector.append(bytes.as_ptr(), bytes.len()) };
                            assert_eq!(fitted, Ok(true));
                            model.extend(bytes);
                        }
                    },
                    Step::Clear => {
                        let cleared = vector.clear();
                        assert_eq!(cleared.is_ok(), views.is_empty());
                        if cleared.is_ok() {
                            model.clear();
                        }
                    }
                    Step::View => views.push(vector.view()),
                    Step::EndView if !views.is_empty() => {
                        let (address, size) = views.remove(0);
                        assert_eq!((address, size), (vector.block().address(), model.len()));
                        vector.end_view();
                    }
                    Step::EndView => {}
                    Step::Zero => {
                        vector.zero();
                        model.fill(0);
                    }
                }
                assert_eq!(contents(&mut vector), model);
                assert_eq!(vector.view_count(), views.len());
            }
            drop(vector);
            assert_eq!(resource.statistics().current_count, 0);
        }
    }

    #[test]
    fn a_block_that_was_viewed_outlives_a_move_and_one_that_was_not_does_not() {
        let resource = resource();
        let mut vector = Vector::new(draw(&resource, 64, false).unwrap(), 0);
        drop(vector.move_to(draw(&resource, 128, false).unwrap()));
        assert_eq!(resource.statistics().current_count, 1);
        vector.view();
        let Err((viewed, block)) = vector.move_to(draw(&resource, 256, false).unwrap()) else {
            panic!("it is viewed");
        };
        assert_eq!(viewed, Viewed { view_count: 1 });
        vector.end_view();
        drop(vector.move_to(block));
        assert_eq!(resource.statistics().current_count, 2);
        // No larger: given back.
        drop(vector.move_to(draw(&resource, 64, false).unwrap()));
        assert_eq!(resource.statistics().current_count, 2);
        drop(vector);
        assert_eq!(resource.statistics().current_count, 0);
    }

    #[test]
    fn what_does_not_fit_is_not_appended() {
        let resource = resource();
        let mut vector = Vector::new(draw(&resource, 64, false).unwrap(), 0);
        let bytes = [7u8; 100_000];
        // SAFETY: a slice outside of the block.
        let fitted = unsafe { vector.append(bytes.as_ptr(), bytes.len()) };
        assert_eq!(fitted, Ok(false));
        assert_eq!(vector.size(), 0);
    }
}
