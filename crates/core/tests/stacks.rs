//! Random stacks of resources and adaptors, over an upstream that fails wherever it is asked to.

#![cfg(not(loom))]

mod model;

use model::{Failures, Step, healthy, run, step};
use moirai_core::error::{Error, Result};
use moirai_core::resource::adaptor::Adaptor;
use moirai_core::resource::large_object::{Fit, LargeObjectResource, Options};
use moirai_core::resource::ledger::LedgerAdaptor;
use moirai_core::resource::limit::LimitAdaptor;
use moirai_core::resource::numa::NumaResource;
use moirai_core::resource::pool::PoolResource;
use moirai_core::resource::priority::PriorityResource;
use moirai_core::resource::realtime::RealtimeResource;
use moirai_core::resource::slab::SlabResource;
use moirai_core::resource::statistics::StatisticsAdaptor;
use moirai_core::resource::system::SystemResource;
use moirai_core::resource::{Block, Request, Resource};
use moirai_core::sync::{AtomicUsize, Ordering::SeqCst};
use proptest::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// An upstream that counts what it is asked for, and refuses the requests in a range of numbers.
struct Failing {
    upstream: Arc<dyn Resource>,
    asked: AtomicUsize,
    fails: Range<usize>,
}

impl Failing {
    fn at(upstream: Arc<dyn Resource>, fails: Range<usize>) -> Arc<Self> {
        Arc::new(Failing {
            upstream,
            asked: AtomicUsize::new(0),
            fails,
        })
    }
}

impl Adaptor for Failing {
    fn title(&self) -> &'static str {
        "Failing"
    }

    fn source(&self) -> &Arc<dyn Resource> {
        &self.upstream
    }

    fn pass(&self, request: Request) -> Result<Block> {
        if self.fails.contains(&self.asked.fetch_add(1, SeqCst)) {
            return Err(Error::out_of_memory(request.size(), "told to fail"));
        }
        self.upstream.allocate(request)
    }

    /// One by one, so that each block of a group may be the one that fails.
    fn pass_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        let mut blocks: Vec<Block> = Vec::new();
        for request in requests {
            match self.pass(*request) {
                Ok(block) => blocks.push(block),
                Err(error) => {
                    for block in blocks {
                        // SAFETY: drawn above, and nobody has seen it.
                        unsafe { self.upstream.deallocate(block.address) };
                    }
                    return Err(error);
                }
            }
        }
        Ok(blocks)
    }
}

/// Where a stack gets its memory.
#[derive(Clone, Copy, Debug)]
enum Source {
    System,
    Large(Fit),
    Uncached,
    Pool,
    Numa,
    Realtime,
    Priority,
}

/// What stands over it.
#[derive(Clone, Copy, Debug)]
enum Layer {
    Slab,
    Statistics,
    Limit,
    Ledger,
    /// As the normal lane of a resource with lanes.
    Lane,
}

fn source() -> impl Strategy<Value = Source> {
    prop_oneof![
        Just(Source::System),
        prop_oneof![Just(Fit::Best), Just(Fit::First), Just(Fit::Worst)].prop_map(Source::Large),
        Just(Source::Uncached),
        Just(Source::Pool),
        Just(Source::Numa),
        Just(Source::Realtime),
        Just(Source::Priority),
    ]
}

fn layers() -> impl Strategy<Value = Vec<Layer>> {
    let layer = prop_oneof![
        3 => Just(Layer::Slab),
        2 => Just(Layer::Statistics),
        2 => Just(Layer::Limit),
        1 => Just(Layer::Ledger),
        1 => Just(Layer::Lane),
    ];
    prop::collection::vec(layer, 0..5)
}

fn large(fit: Fit, cache_cap: Option<usize>) -> Arc<dyn Resource> {
    let options = Options {
        fit,
        cache_cap,
        decay_milliseconds: None,
        ..Options::default()
    };
    Arc::new(LargeObjectResource::new(options).unwrap())
}

fn system() -> Arc<dyn Resource> {
    Arc::new(SystemResource::new())
}

fn with_lanes(normal: Arc<dyn Resource>) -> Arc<dyn Resource> {
    let realtime = Arc::new(RealtimeResource::new(4096, true).unwrap());
    let high = large(Fit::Best, None);
    Arc::new(PriorityResource::of_lanes([realtime, high, normal, system()]).unwrap())
}

fn make(source: Source) -> Arc<dyn Resource> {
    match source {
        Source::System => system(),
        Source::Large(fit) => large(fit, None),
        Source::Uncached => large(Fit::Best, Some(0)),
        Source::Pool => Arc::new(PoolResource::new(Options::default()).unwrap()),
        Source::Numa => {
            let pools = NumaResource::placed(&[None, None], &[0, 1, 0, 1], Options::default());
            Arc::new(pools.unwrap())
        }
        Source::Realtime => Arc::new(RealtimeResource::new(48 << 20, true).unwrap()),
        Source::Priority => with_lanes(Arc::new(PoolResource::new(Options::default()).unwrap())),
    }
}

fn stack(bottom: Arc<dyn Resource>, layers: &[Layer]) -> Arc<dyn Resource> {
    layers.iter().fold(bottom, |upstream, layer| match layer {
        Layer::Slab => Arc::new(SlabResource::new(upstream).unwrap()),
        Layer::Statistics => Arc::new(StatisticsAdaptor::new(upstream)),
        Layer::Limit => Arc::new(LimitAdaptor::new(upstream, 1 << 30, Box::new(|| ()))),
        Layer::Ledger => Arc::new(LedgerAdaptor::new(upstream)),
        Layer::Lane => with_lanes(upstream),
    })
}

/// Wait until nothing that was drawn is out: the background thread may be looking at a layer that is
/// dropped, which then goes when it has looked.
fn everything_came_back(bottom: &dyn Resource) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while bottom.statistics().current_count > 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "what the layers drew came not back"
        );
        std::thread::yield_now();
    }
}

/// Short: each run is repeated for every request that may fail.
fn few_steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_stack_keeps_the_contract(
        source in source(),
        layers in layers(),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let bottom = make(source);
        let resource = stack(Arc::clone(&bottom), &layers);
        // Real-time memory ends; nothing else may refuse.
        let failures = match source {
            Source::Realtime => Failures::Allowed,
            _ => Failures::None,
        };
        run(&*resource, &steps, failures);
        drop(resource);
        everything_came_back(&*bottom);
        healthy(&*bottom);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn a_failure_at_any_request_leaves_a_sound_stack(
        source in source(),
        layers in layers(),
        steps in few_steps(),
    ) {
        let bottom = make(source);
        let failing = Failing::at(Arc::clone(&bottom), 0..0);
        run(&*stack(failing.clone(), &layers), &steps, Failures::Allowed);
        let requests = failing.asked.load(SeqCst);
        for number in 0..requests {
            // Just this one, and this one and all that follow.
            for fails in [number..number + 1, number..usize::MAX] {
                let failing = Failing::at(Arc::clone(&bottom), fails);
                run(&*stack(failing, &layers), &steps, Failures::Allowed);
                everything_came_back(&*bottom);
            }
        }
        healthy(&*bottom);
    }
}

#[test]
fn failures_amid_threads_leave_a_sound_stack() {
    use Layer::{Ledger, Limit, Slab, Statistics};
    for layers in [
        &[Slab][..],
        &[Limit, Slab, Statistics],
        &[Ledger, Statistics, Slab, Limit],
    ] {
        let bottom = large(Fit::Best, None);
        // A stretch of failures in the middle, in which every thread runs into some.
        let failing = Failing::at(Arc::clone(&bottom), 500..4_000);
        let resource = stack(failing.clone(), layers);
        let work = |seed: usize| {
            let mut live = Vec::new();
            let mut refused = 0;
            for turn in 0..4_000usize {
                let size = [50, 700, 9_000, 40_000, 300_000][(turn * 7 + seed) % 5];
                let requests = vec![Request::bytes(size).unwrap(); 1 + turn % 3];
                match resource.allocate_group(&requests) {
                    Ok(blocks) => live.extend(blocks),
                    Err(_) => refused += 1,
                }
                while live.len() > 20 {
                    let block = live.swap_remove(turn % live.len());
                    // SAFETY: a live block.
                    unsafe { block.address.write_bytes(seed as u8, block.size) };
                    // SAFETY: taken out of the live ones.
                    unsafe { resource.deallocate(block.address) };
                }
            }
            for block in live {
                // SAFETY: still live.
                unsafe { resource.deallocate(block.address) };
            }
            refused
        };
        let refused: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3).map(|seed| scope.spawn(move || work(seed))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert!(refused > 0, "no request ran into a failure");
        healthy(&*resource);
        assert_eq!(resource.statistics().current_count, 0);
        drop(resource);
        drop(failing);
        healthy(&*bottom);
        everything_came_back(&*bottom);
    }
}
