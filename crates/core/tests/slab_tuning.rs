//! A slab that is tuned while it is used: blocks stay what they are, and the books balance.

use moirai_core::error::Result;
use moirai_core::resource::adaptor::Adaptor;
use moirai_core::resource::large_object::{LargeObjectResource, Options};
use moirai_core::resource::slab::{EXTRA_CLASSES, MAX_BLOCK_BYTES, SlabResource, max_rounds};
use moirai_core::resource::system::SystemResource;
use moirai_core::resource::{Block, HealthReport, Request, Resource};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};

fn slab() -> SlabResource {
    SlabResource::new(Arc::new(SystemResource::new())).unwrap()
}

fn healthy(resource: &dyn Resource) {
    let mut report = HealthReport::default();
    resource.check(&mut report);
    assert_eq!(report.findings, Vec::<String>::new());
}

/// Sizes that may be extra classes; few, so that a test's life does not use them all up at once.
const EXTRA: [usize; EXTRA_CLASSES] = [
    1088, 1152, 1216, 1344, 1600, 1728, 2112, 2176, 2624, 3136, 4160, 5056, 6208, 9024, 11_008,
    13_056,
];

/// Blocks that are out, each filled with its own byte.
#[derive(Default)]
struct Live(Vec<(Block, usize, u8)>);

// SAFETY: blocks of a resource may be used and given back by any thread.
unsafe impl Send for Live {}

impl Live {
    fn take(&mut self, slab: &SlabResource, size: usize, alignment: usize, fill: u8) {
        let request = Request::new(size, alignment, false).unwrap();
        let block = slab.allocate(request).unwrap();
        assert!(block.size >= size);
        assert_eq!(block.address.as_ptr() as usize % alignment, 0);
        // SAFETY: a live block.
        assert_eq!(unsafe { slab.block_bytes(block.address) }, block.size);
        // SAFETY: as above.
        unsafe { block.address.write_bytes(fill, size) };
        self.0.push((block, size, fill));
    }

    fn give(&mut self, slab: &SlabResource, index: usize) {
        if self.0.is_empty() {
            return;
        }
        let (block, size, fill) = self.0.swap_remove(index % self.0.len());
        for offset in [0, size / 2, size - 1] {
            // SAFETY: inside a live block.
            let place = unsafe { block.address.add(offset) };
            // SAFETY: as above, and it was written.
            let found = unsafe { place.read() };
            assert_eq!(found, fill, "a live block was overwritten");
        }
        // SAFETY: a live block, not used any more.
        assert_eq!(unsafe { slab.deallocate(block.address) }, block.size);
    }
}

/// Random steps of one thread, by a linear congruential generator.
fn work(slab: &SlabResource, seed: u64, steps: usize) -> Live {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut below = |limit: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % limit
    };
    let mut live = Live::default();
    for step in 0..steps {
        match below(20) {
            0 => {
                let chosen: Vec<usize> = EXTRA.into_iter().filter(|_| below(2) == 0).collect();
                slab.set_extra_classes(&chosen).unwrap();
            }
            1 => {
                let classes = slab.classes();
                let block_bytes = classes[below(classes.len())].block_bytes;
                let rounds = 2 + below(max_rounds(block_bytes) - 1);
                slab.set_magazine(block_bytes, rounds).unwrap();
            }
            2 => slab.draw_ahead(EXTRA[below(16)]).unwrap_or_default(),
            3 => drop(slab.trim(0)),
            4..=11 => {
                let alignment = if below(8) == 0 { 256 } else { 64 };
                live.take(
                    slab,
                    1 + below(MAX_BLOCK_BYTES + 600),
                    alignment,
                    step as u8,
                );
            }
            _ => live.give(slab, below(1 << 20)),
        }
    }
    live
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_slab_that_is_tuned_at_random_moments_stays_sound(seed in any::<u64>()) {
        let slab = slab();
        let mut live = work(&slab, seed, 400);
        healthy(&slab);
        let now = slab.statistics();
        prop_assert_eq!(now.current_count, live.0.len() as u64);
        let held: u64 = live.0.iter().map(|(block, ..)| block.size as u64).sum();
        prop_assert_eq!(now.current_bytes, held);
        while !live.0.is_empty() {
            live.give(&slab, 0);
        }
        prop_assert_eq!(slab.statistics().current_bytes, 0);
        prop_assert_eq!(slab.statistics().invalid_frees, 0);
        healthy(&slab);
    }
}

#[test]
fn threads_may_tune_a_slab_that_they_all_use() {
    let slab = Arc::new(slab());
    let lives: Vec<Live> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|seed| {
                let slab = Arc::clone(&slab);
                scope.spawn(move || work(&slab, seed, 3000))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    healthy(&*slab);
    // Blocks of threads that have ended go back from another.
    for mut live in lives {
        while !live.0.is_empty() {
            live.give(&slab, 0);
        }
    }
    let now = slab.statistics();
    assert_eq!((now.current_bytes, now.invalid_frees), (0, 0));
    assert_eq!(now.hits + now.misses, now.total_count);
    healthy(&*slab);
    slab.trim(0);
    let runs = |slab: &SlabResource| slab.classes().iter().map(|c| c.run_count).sum::<usize>();
    assert_eq!(runs(&slab), 0, "an idle slab that is trimmed keeps no run");
}

#[test]
fn a_run_drawn_ahead_serves_hits_and_stays_until_the_slab_is_trimmed() {
    let large = Arc::new(LargeObjectResource::new(Options::default()).unwrap());
    let slab = SlabResource::new(large).unwrap();
    let runs = || {
        let classes = slab.classes();
        let of = |class: &&moirai_core::resource::slab::ClassInfo| class.block_bytes == 512;
        classes.iter().find(of).unwrap().run_count
    };
    slab.draw_ahead(512).unwrap();
    slab.draw_ahead(512).unwrap();
    assert_eq!(runs(), 1);
    let mut live = Live::default();
    for _ in 0..128 {
        live.take(&slab, 500, 64, 7);
    }
    assert_eq!(slab.statistics().misses, 0);
    assert_eq!(runs(), 1);
    while !live.0.is_empty() {
        live.give(&slab, 0);
    }
    assert_eq!(runs(), 1);
    healthy(&slab);
    slab.trim(0);
    assert_eq!(runs(), 0);
    healthy(&slab);
    assert!(slab.draw_ahead(500).is_err());
    assert!(slab.draw_ahead(0).is_err());
}

#[test]
fn capacities_are_bounded_and_what_rests_in_magazines_follows_them() {
    let slab = slab();
    for (block, rounds) in [(64, 513), (64, 1), (16_384, 9), (16_384, 0), (100, 2)] {
        let error = slab.set_magazine(block, rounds).unwrap_err().to_string();
        assert!(error.contains("must be"), "{error}");
    }
    // Resting blocks count as out for the peak: the smaller magazines are, the fewer rest.
    let out = |rounds: usize| {
        slab.set_magazine(4096, rounds).unwrap();
        for _ in 0..4 {
            let mut live = Live::default();
            (0..100).for_each(|_| live.take(&slab, 4096, 64, 1));
            while !live.0.is_empty() {
                live.give(&slab, 0);
            }
        }
        let mut report = HealthReport::default();
        slab.check(&mut report);
        let counted = report
            .counts
            .iter()
            .find(|(name, _)| name == "slab.out_bytes");
        counted.unwrap().1
    };
    let (many, few) = (out(32), out(2));
    assert!(many > 40 * 4096 && few <= 2 * 2 * 4096, "{many} {few}");
    healthy(&slab);
}

// ---- upstream that frees ----

/// Does something before it grants, as a limit that has garbage collected does.
struct Collecting {
    upstream: Arc<dyn Resource>,
    collect: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Adaptor for Collecting {
    fn title(&self) -> &'static str {
        "Collecting"
    }

    fn source(&self) -> &Arc<dyn Resource> {
        &self.upstream
    }

    fn pass(&self, request: Request) -> Result<Block> {
        let collect = self.collect.lock().unwrap().take();
        if let Some(collect) = collect {
            collect();
        }
        self.upstream.allocate(request)
    }
}

#[test]
fn a_run_that_is_not_needed_when_it_comes_goes_back() {
    let upstream = Arc::new(Collecting {
        upstream: Arc::new(SystemResource::new()),
        collect: Mutex::new(None),
    });
    let slab = Arc::new(SlabResource::new(upstream.clone()).unwrap());
    let mut live = Live::default();
    // All of one run: the next request asks upstream for another, which frees what is out.
    for _ in 0..64 * 1024 / 4096 {
        live.take(&slab, 4096, 64, 1);
    }
    let drawn = upstream.statistics().current_count;
    let freeing = Arc::clone(&slab);
    let mut freed = Live(live.0.split_off(4));
    *upstream.collect.lock().unwrap() = Some(Box::new(move || {
        while !freed.0.is_empty() {
            freed.give(&freeing, 0);
        }
    }));
    live.take(&slab, 4096, 64, 2);
    assert!(
        upstream.collect.lock().unwrap().is_none(),
        "upstream was asked"
    );
    assert_eq!(upstream.statistics().current_count, drawn);
    healthy(&*slab);
    while !live.0.is_empty() {
        live.give(&slab, 0);
    }
}
