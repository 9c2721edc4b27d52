//! What an arena costs in the core, without Python: nanoseconds, as JSON for `bench_arena.py`.
//!
//! Every figure is the median of several rounds. The argument is the blocks of a round.

use moirai_core::resource::arena::{ArenaResource, ThreadLocalArena};
use moirai_core::resource::pool::PoolResource;
use moirai_core::resource::system::SystemResource;
use moirai_core::resource::{Request, Resource};
use std::hint::black_box;
use std::ptr::NonNull;
use std::sync::{Arc, Barrier};
use std::time::Instant;

const ROUNDS: usize = 31;
const SIZE: usize = 64;
const CHUNK: usize = 1 << 20;

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn request() -> Request {
    Request::bytes(SIZE).expect("a small size")
}

fn pool() -> Arc<dyn Resource> {
    Arc::new(PoolResource::new(Default::default()).expect("a pool"))
}

fn nanoseconds(count: usize, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64 / count as f64
}

fn free(resource: &dyn Resource, blocks: &[NonNull<u8>]) {
    for &block in blocks {
        // SAFETY: a live block.
        unsafe { resource.deallocate(block) };
    }
}

/// Nanoseconds to cut a block and to free one, with the addresses in a list that is there already:
/// an arena that is empty cuts the same addresses again.
fn cut_alone(arena: &ArenaResource, count: usize) -> (f64, f64) {
    let request = request();
    let allocate = || arena.allocate(black_box(request)).expect("memory").address;
    let (mut cut, mut freed) = (Vec::new(), Vec::new());
    let first: Vec<NonNull<u8>> = (0..count).map(|_| allocate()).collect();
    free(arena, &first);
    arena.reset(false).expect("nothing is alive");
    let blocks: Vec<NonNull<u8>> = (0..count).map(|_| allocate()).collect();
    free(arena, &blocks);
    for _ in 0..ROUNDS {
        arena.reset(false).expect("nothing is alive");
        cut.push(nanoseconds(count, || {
            for _ in 0..count {
                black_box(allocate());
            }
        }));
        freed.push(nanoseconds(count, || free(arena, &blocks)));
    }
    assert_eq!(
        arena.statistics().invalid_frees,
        0,
        "the addresses were the same"
    );
    (median(cut), median(freed))
}

/// Nanoseconds to allocate a block and put it on a list, `count` of them.
fn kept(resource: &dyn Resource, count: usize) -> f64 {
    let request = request();
    let mut blocks = Vec::with_capacity(count);
    let round = |_| {
        let taken = nanoseconds(count, || {
            for _ in 0..count {
                blocks.push(
                    resource
                        .allocate(black_box(request))
                        .expect("memory")
                        .address,
                );
            }
        });
        free(resource, &blocks);
        blocks.clear();
        taken
    };
    median((0..ROUNDS).map(round).collect())
}

/// Nanoseconds of allocating and freeing a block in each of two threads at once.
fn two_threads(resource: &Arc<dyn Resource>, count: usize) -> f64 {
    let barrier = Arc::new(Barrier::new(2));
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let (resource, barrier) = (Arc::clone(resource), Arc::clone(&barrier));
            std::thread::spawn(move || {
                let request = request();
                barrier.wait();
                nanoseconds(count * ROUNDS, || {
                    for _ in 0..count * ROUNDS {
                        let block = resource.allocate(black_box(request)).expect("memory");
                        free(&*resource, &[block.address]);
                    }
                })
            })
        })
        .collect();
    let taken = threads
        .into_iter()
        .map(|thread| thread.join().expect("a thread"));
    taken.sum::<f64>() / 2.0
}

/// Nanoseconds of giving up `live` blocks in a rollback.
fn rollback(live: usize) -> f64 {
    let arena = ArenaResource::new(Arc::new(SystemResource::new()), CHUNK).expect("an arena");
    let round = |_| {
        let savepoint = arena.savepoint();
        let allocate = |_| arena.allocate(request()).expect("memory").address;
        let blocks: Vec<NonNull<u8>> = (0..live).map(allocate).collect();
        let start = Instant::now();
        let left = arena.rollback(&savepoint, true).expect("a savepoint");
        let taken = start.elapsed().as_nanos() as f64;
        assert_eq!(left as usize, live);
        free(&arena, &blocks);
        taken
    };
    median((0..ROUNDS).map(round).collect())
}

fn main() {
    let count = std::env::args()
        .nth(1)
        .map_or(Ok(10_000), |text| text.parse())
        .expect("the argument: must be a count of blocks");
    let arena = ArenaResource::new(pool(), CHUNK).expect("an arena");
    let (cut, freed) = cut_alone(&arena, count);
    let resources: [(&str, Arc<dyn Resource>); 4] = [
        ("arena", Arc::new(arena)),
        (
            "thread_local_arena",
            Arc::new(ThreadLocalArena::new(pool(), CHUNK).expect("arenas")),
        ),
        ("pool", pool()),
        ("malloc", Arc::new(SystemResource::new())),
    ];
    let mut fields = vec![
        format!("\"cut\": {cut:.2}"),
        format!("\"free\": {freed:.2}"),
    ];
    for (name, resource) in &resources {
        fields.push(format!("\"kept_{name}\": {:.2}", kept(&**resource, count)));
        fields.push(format!(
            "\"two_threads_{name}\": {:.2}",
            two_threads(resource, count)
        ));
    }
    for live in [10, 1_000, 100_000] {
        fields.push(format!("\"rollback_{live}\": {:.0}", rollback(live)));
    }
    println!("{{{}}}", fields.join(", "));
}
