//! What an arena costs in the core, without Python: nanoseconds, as JSON for `bench_arena.py`.
//!
//! Every figure is the median of several rounds. The argument is the blocks of a round.

use moirai_core::resource::arena::{ArenaResource, ThreadLocalArena};
use moirai_core::resource::pool::PoolResource;
use moirai_core::resource::system::SystemResource;
use moirai_core::resource::{Block, Request, Resource};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

const ROUNDS: usize = 15;
const SIZE: usize = 64;

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// Median nanoseconds of (allocate, deallocate) a block, `count` of them held in between.
fn held(resource: &dyn Resource, count: usize) -> (f64, f64) {
    let request = Request::bytes(SIZE).expect("a small size");
    let (mut allocate, mut deallocate) = (Vec::new(), Vec::new());
    let mut blocks: Vec<Block> = Vec::with_capacity(count);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..count {
            blocks.push(resource.allocate(black_box(request)).expect("memory"));
        }
        allocate.push(start.elapsed().as_nanos() as f64 / count as f64);
        let start = Instant::now();
        for block in blocks.drain(..) {
            // SAFETY: a live block.
            unsafe { resource.deallocate(block.address) };
        }
        deallocate.push(start.elapsed().as_nanos() as f64 / count as f64);
    }
    (median(allocate), median(deallocate))
}

/// Median nanoseconds of giving up `count` live blocks in a rollback.
fn rollback(count: usize) -> f64 {
    let upstream = Arc::new(SystemResource::new());
    let arena = ArenaResource::new(upstream, 1 << 20).expect("an arena");
    let request = Request::bytes(SIZE).expect("a small size");
    let mut samples = Vec::new();
    for _ in 0..ROUNDS {
        let savepoint = arena.savepoint();
        let blocks: Vec<Block> = (0..count)
            .map(|_| arena.allocate(request).expect("memory"))
            .collect();
        let start = Instant::now();
        let live = arena.rollback(&savepoint, true).expect("a savepoint");
        samples.push(start.elapsed().as_nanos() as f64);
        assert_eq!(live as usize, count);
        for block in blocks {
            // SAFETY: a live block.
            unsafe { arena.deallocate(block.address) };
        }
    }
    median(samples)
}

fn main() {
    let count = std::env::args()
        .nth(1)
        .map_or(Ok(10_000), |text| text.parse())
        .expect("the argument: must be a count of blocks");
    let pool = || -> Arc<dyn Resource> {
        Arc::new(PoolResource::new(Default::default()).expect("a pool"))
    };
    let resources: [(&str, Arc<dyn Resource>); 4] = [
        (
            "arena",
            Arc::new(ArenaResource::new(pool(), 1 << 20).expect("an arena")),
        ),
        (
            "thread_local_arena",
            Arc::new(ThreadLocalArena::new(pool(), 1 << 20).expect("arenas")),
        ),
        ("pool", pool()),
        ("malloc", Arc::new(SystemResource::new())),
    ];
    let mut fields = Vec::new();
    for (name, resource) in &resources {
        let (allocate, deallocate) = held(&**resource, count);
        fields.push(format!("\"{name}_allocate\": {allocate:.3}"));
        fields.push(format!("\"{name}_deallocate\": {deallocate:.3}"));
    }
    for live in [10, 1_000, count] {
        fields.push(format!("\"rollback_{live}\": {:.1}", rollback(live)));
    }
    println!("{{{}}}", fields.join(", "));
}
