//! What a resource must look like from outside: live blocks, each with its own byte in it.

use moirai_core::error::Error;
use moirai_core::resource::{Block, HealthReport, Request, Resource};
use proptest::prelude::*;
use std::ptr::NonNull;

/// No finding, and counts that add up.
pub fn healthy(resource: &dyn Resource) {
    let mut report = HealthReport::default();
    resource.check(&mut report);
    assert_eq!(report.findings, Vec::<String>::new(), "{}", resource.name());
    // Nobody else uses it now, so no request is under way.
    let reserved = |count: &&(String, u64)| count.0 == "limit.under_way_bytes" && count.1 > 0;
    assert_eq!(report.counts.iter().find(reserved), None);
    let counts = resource.statistics();
    assert_eq!(counts.hits + counts.misses, counts.total_count);
    assert!(counts.peak_bytes >= counts.current_bytes);
    assert!(counts.cached_bytes <= counts.resident_bytes);
    assert_eq!(counts.invalid_frees, 0);
}

/// One thing that is done to a resource.
#[derive(Clone, Debug)]
pub enum Step {
    Allocate {
        size: usize,
        alignment: usize,
        zeroed: bool,
    },
    Group(Vec<usize>),
    Free(usize),
    Resize(usize, usize),
    Trim(usize),
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        8 => 0usize..2048,
        4 => 2048usize..70_000,
        4 => 70_000usize..1_200_000,
        1 => 1_200_000usize..9_000_000,
    ]
}

/// Any step, allocations and frees about as often.
pub fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (size(), 0u32..22, any::<bool>()).prop_map(|(size, log, zeroed)| Step::Allocate {
            size,
            alignment: if log < 16 { 64 } else { 1 << log },
            zeroed
        }),
        1 => prop::collection::vec(0usize..200_000, 0..5).prop_map(Step::Group),
        5 => any::<usize>().prop_map(Step::Free),
        1 => (any::<usize>(), size()).prop_map(|(index, size)| Step::Resize(index, size)),
        1 => (0usize..4 << 20).prop_map(Step::Trim),
    ]
}

/// Whether requests may be refused.
#[derive(Clone, Copy, PartialEq)]
pub enum Failures {
    None,
    Allowed,
}

struct Live {
    address: NonNull<u8>,
    size: usize,
    mark: u8,
}

impl Live {
    fn new(block: &Block, size: usize, mark: u8) -> Self {
        assert!(block.size >= size);
        let live = Live {
            address: block.address,
            size,
            mark,
        };
        live.fill();
        live
    }

    fn fill(&self) {
        // SAFETY: a live block of at least `size` bytes.
        unsafe { self.address.write_bytes(self.mark, self.size) };
    }

    fn assert_intact(&self, size: usize) {
        // SAFETY: a live block whose first `size` bytes were written.
        let bytes = unsafe { std::slice::from_raw_parts(self.address.as_ptr(), size) };
        assert!(
            bytes.iter().all(|byte| *byte == self.mark),
            "a block was overwritten"
        );
    }
}

fn is_zero(block: &Block, size: usize) -> bool {
    // SAFETY: a live block of at least `size` bytes that was asked to be zeroed.
    let bytes = unsafe { std::slice::from_raw_parts(block.address.as_ptr(), size) };
    bytes.iter().all(|byte| *byte == 0)
}

/// Blocks that live between steps.
struct Model<'a> {
    resource: &'a dyn Resource,
    failures: Failures,
    live: Vec<Live>,
}

impl Model<'_> {
    /// What was granted; a refusal must be allowed, say so, and leave nothing behind.
    fn granted<T>(&self, ask: impl FnOnce() -> Result<T, Error>) -> Option<T> {
        let before = self.resource.statistics();
        match ask() {
            Ok(granted) => Some(granted),
            Err(error) => {
                assert!(self.failures == Failures::Allowed, "{error}");
                assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
                let after = self.resource.statistics();
                assert_eq!(after.current_count, before.current_count, "{error}");
                assert_eq!(after.current_bytes, before.current_bytes, "{error}");
                None
            }
        }
    }

    fn take(&mut self, step: &Step, mark: u8) {
        let resource = self.resource;
        match step {
            Step::Allocate {
                size,
                alignment,
                zeroed,
            } => {
                let request = Request::new(*size, *alignment, *zeroed).unwrap();
                if let Some(block) = self.granted(|| resource.allocate(request)) {
                    assert_eq!(block.address.as_ptr() as usize % alignment, 0);
                    assert!(!zeroed || is_zero(&block, *size), "not zeroed");
                    self.live.push(Live::new(&block, *size, mark));
                }
            }
            Step::Group(sizes) => {
                let request = |size: &usize| Request::bytes(*size).unwrap();
                let requests: Vec<_> = sizes.iter().map(request).collect();
                if let Some(blocks) = self.granted(|| resource.allocate_group(&requests)) {
                    assert_eq!(blocks.len(), sizes.len());
                    let lives = blocks.iter().zip(sizes);
                    self.live
                        .extend(lives.map(|(block, size)| Live::new(block, *size, mark)));
                }
            }
            Step::Free(which) if !self.live.is_empty() => {
                let live = self.live.swap_remove(which % self.live.len());
                live.assert_intact(live.size);
                // SAFETY: taken out of the live ones.
                assert!(unsafe { resource.deallocate(live.address) } >= live.size);
            }
            Step::Resize(which, size) if !self.live.is_empty() => {
                let index = which % self.live.len();
                let address = self.live[index].address;
                // SAFETY: a live block.
                let resize = || unsafe { resource.reallocate(address, *size) };
                if let Some(block) = self.granted_resize(resize) {
                    let kept = self.live[index].size.min(*size);
                    self.live[index].address = block.address;
                    self.live[index].assert_intact(kept);
                    self.live[index] = Live::new(&block, *size, mark);
                }
            }
            Step::Trim(target) => {
                resource.trim(*target);
            }
            _ => {}
        }
    }

    /// As `granted`, for a request whose bytes change when it is granted too.
    fn granted_resize(&self, ask: impl FnOnce() -> Result<Block, Error>) -> Option<Block> {
        let before = self.resource.statistics().current_count;
        let granted = self.granted(ask);
        assert_eq!(self.resource.statistics().current_count, before);
        granted
    }
}

/// Take the steps, look at every block, free all, and look whether nothing is left.
pub fn run(resource: &dyn Resource, steps: &[Step], failures: Failures) {
    let mut model = Model {
        resource,
        failures,
        live: Vec::new(),
    };
    for (index, step) in steps.iter().enumerate() {
        model.take(step, (index % 251) as u8 + 1);
    }
    for live in &model.live {
        live.assert_intact(live.size);
    }
    healthy(resource);
    let counts = resource.statistics();
    assert_eq!(counts.current_count, model.live.len() as u64);
    for live in model.live {
        // SAFETY: still live.
        unsafe { resource.deallocate(live.address) };
    }
    healthy(resource);
    let counts = resource.statistics();
    assert_eq!((counts.current_bytes, counts.current_count), (0, 0));
}
