//! Every resource against a plain model: blocks never overlap, keep their bytes, and add up.

#![cfg(not(loom))]

mod model;

use model::{Failures, healthy, run, step};
use moirai_core::os::HugePages;
use moirai_core::resource::arena::{ArenaResource, ThreadLocalArena};
use moirai_core::resource::large_object::{Fit, LargeObjectResource, Options};
use moirai_core::resource::limit::LimitAdaptor;
use moirai_core::resource::pool::PoolResource;
use moirai_core::resource::slab::SlabResource;
use moirai_core::resource::statistics::StatisticsAdaptor;
use moirai_core::resource::system::SystemResource;
use moirai_core::resource::{Block, HealthReport, Request, Resource};
use proptest::prelude::*;
use std::ptr::NonNull;
use std::sync::Arc;

fn large(fit: Fit, cap: Option<usize>) -> Arc<dyn Resource> {
    let options = Options {
        fit,
        cache_cap: cap,
        decay_milliseconds: Some(50),
        ..Options::default()
    };
    Arc::new(LargeObjectResource::new(options).unwrap())
}

fn arena(chunk_bytes: usize) -> Arc<dyn Resource> {
    Arc::new(ArenaResource::new(large(Fit::Best, None), chunk_bytes).unwrap())
}

fn resources() -> Vec<Arc<dyn Resource>> {
    let system: Arc<dyn Resource> = Arc::new(SystemResource::new());
    let pool: Arc<dyn Resource> = Arc::new(PoolResource::new(Options::default()).unwrap());
    vec![
        Arc::clone(&system),
        Arc::clone(&pool),
        large(Fit::Best, None),
        large(Fit::First, Some(1 << 20)),
        large(Fit::Worst, Some(0)),
        Arc::new(SlabResource::new(system).unwrap()),
        Arc::new(SlabResource::new(large(Fit::Best, None)).unwrap()),
        Arc::new(StatisticsAdaptor::new(Arc::clone(&pool))),
        Arc::new(LimitAdaptor::new(
            Arc::clone(&pool),
            1 << 30,
            Box::new(|| ()),
        )),
        Arc::new(ArenaResource::new(Arc::clone(&pool), 1 << 20).unwrap()),
        Arc::new(ArenaResource::new(Arc::new(SystemResource::new()), 4096).unwrap()),
        Arc::new(ThreadLocalArena::new(pool, 100_000).unwrap()),
        Arc::new(ArenaResource::new(arena(1 << 16), 1 << 13).unwrap()),
        Arc::new(SlabResource::new(arena(1 << 20)).unwrap()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn blocks_keep_their_bytes_and_counts_add_up(
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        for resource in resources() {
            run(&*resource, &steps, Failures::None);
        }
    }
}

#[test]
fn threads_may_free_each_others_blocks() {
    for resource in resources() {
        let (sender, receiver) = std::sync::mpsc::channel::<usize>();
        let producer = {
            let resource = Arc::clone(&resource);
            std::thread::spawn(move || {
                for index in 0..20_000usize {
                    let size =
                        1 + (index * 7919) % 5000 + if index % 97 == 0 { 200_000 } else { 0 };
                    let block = resource.allocate(Request::bytes(size).unwrap()).unwrap();
                    // SAFETY: a live block of `size` bytes.
                    unsafe { block.address.write_bytes(index as u8, size) };
                    sender.send(block.address.as_ptr() as usize).unwrap();
                }
            })
        };
        for (index, address) in receiver.iter().enumerate() {
            let address = NonNull::new(address as *mut u8).unwrap();
            // SAFETY: the producer gave the live block to us.
            assert_eq!(unsafe { address.read() }, index as u8);
            // SAFETY: as above.
            unsafe { resource.deallocate(address) };
        }
        producer.join().unwrap();
        healthy(&*resource);
        assert_eq!(resource.statistics().current_count, 0);
    }
}

#[test]
fn a_request_that_cannot_be_met_leaves_nothing_behind() {
    for resource in resources() {
        let before = resource.statistics().current_bytes;
        assert!(Request::bytes(1 << 62).is_err());
        // A kernel that overcommits grants even this; then it must come back whole.
        let huge = Request::bytes(1 << 46).unwrap();
        if let Ok(block) = resource.allocate(huge) {
            // SAFETY: a live block.
            unsafe { resource.deallocate(block.address) };
        }
        assert_eq!(resource.statistics().current_bytes, before);
        healthy(&*resource);
    }
}

#[test]
fn a_wrong_free_is_counted_and_ignored() {
    let resource = large(Fit::Best, None);
    let block = resource.allocate(Request::bytes(100_000).unwrap()).unwrap();
    // SAFETY: not dereferenced; a resource with a map refuses what is no block.
    let inner = unsafe { block.address.add(64) };
    // SAFETY: refused, see above.
    assert_eq!(unsafe { resource.deallocate(inner) }, 0);
    // SAFETY: a live block.
    assert!(unsafe { resource.deallocate(block.address) } > 0);
    // SAFETY: refused: the block is free already.
    assert_eq!(unsafe { resource.deallocate(block.address) }, 0);
    assert_eq!(resource.statistics().invalid_frees, 2);
}

#[test]
fn a_block_that_was_freed_twice_is_found_on_two_lists() {
    let slab = SlabResource::new(Arc::new(SystemResource::new())).unwrap();
    let block = slab.allocate(Request::bytes(100).unwrap()).unwrap();
    let mut report = HealthReport::default();
    slab.check(&mut report);
    assert_eq!(report.findings, Vec::<String>::new());
    // SAFETY: a live block.
    unsafe { slab.deallocate(block.address) };
    // SAFETY: wrong, but not used again: the slab notices it at the latest when it takes stock.
    unsafe { slab.deallocate(block.address) };
    slab.check(&mut report);
    let text = report.findings.join("; ");
    assert!(
        text.contains("1 blocks of class 1 are on two lists"),
        "{text}"
    );
    assert!(
        text.contains("2 blocks of class 1 came back, 1 were handed out"),
        "{text}"
    );
}

#[test]
fn a_temporary_of_any_size_is_hot_in_the_steady_state() {
    let options = Options {
        decay_milliseconds: None,
        ..Options::default()
    };
    let resource = LargeObjectResource::new(options).unwrap();
    for size in [64 << 10, 1 << 20, 8 << 20, 64 << 20, 256 << 20] {
        let reused = (0..8)
            .map(|_| {
                let block = resource.allocate(Request::bytes(size).unwrap()).unwrap();
                // SAFETY: a live block.
                unsafe { resource.deallocate(block.address) };
                block.reused
            })
            .collect::<Vec<_>>();
        assert!(
            reused[3..].iter().all(|reused| *reused),
            "{size}: {reused:?}"
        );
    }
}

#[test]
fn memory_ages_without_traffic() {
    let options = Options {
        decay_milliseconds: Some(100),
        ..Options::default()
    };
    let resource = LargeObjectResource::new(options).unwrap();
    let block = resource
        .allocate(Request::bytes(20 << 20).unwrap())
        .unwrap();
    // SAFETY: a live block.
    unsafe { block.address.write_bytes(1, 20 << 20) };
    // SAFETY: a live block.
    unsafe { resource.deallocate(block.address) };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while resource.cached_bytes() > 0 {
        assert!(std::time::Instant::now() < deadline, "nothing aged");
        std::thread::yield_now();
    }
    assert!(resource.statistics().decommitted_bytes >= 20 << 20);
    moirai_core::resource::stop_background();
}

#[test]
fn huge_page_choices_are_all_usable() {
    for huge_pages in [HugePages::Auto, HugePages::Always, HugePages::Never] {
        let options = Options {
            huge_pages,
            ..Options::default()
        };
        let resource = PoolResource::new(options).unwrap();
        let request = Request::new(5 << 20, 64, true).unwrap();
        let block = resource.allocate(request).unwrap();
        // SAFETY: the last byte of a live block.
        let last = unsafe { block.address.add((5 << 20) - 1) };
        // SAFETY: as above, and it was asked to be zeroed.
        assert_eq!(unsafe { last.read() }, 0);
        // SAFETY: a live block.
        unsafe { resource.deallocate(block.address) };
    }
}

#[test]
fn a_limit_holds_and_asks_for_help_before_it_refuses() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let pool: Arc<dyn Resource> = Arc::new(PoolResource::new(Options::default()).unwrap());
    let limited = LimitAdaptor::new(
        pool,
        1 << 20,
        Box::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }),
    );
    let block = limited.allocate(Request::bytes(1 << 20).unwrap()).unwrap();
    let error = limited.allocate(Request::bytes(64).unwrap()).unwrap_err();
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    let message = error.to_string();
    assert!(
        message.contains("64 bytes") && message.contains("1048576"),
        "{message}"
    );
    // SAFETY: a live block.
    unsafe { limited.deallocate(block.address) };
    assert!(limited.allocate(Request::bytes(64).unwrap()).is_ok());
}

fn byte_at(block: &Block, offset: usize) -> u8 {
    assert!(offset < block.size);
    // SAFETY: inside the live block.
    let place = unsafe { block.address.add(offset) };
    // SAFETY: as above, and written before.
    unsafe { place.read() }
}

#[test]
fn large_blocks_grow_and_shrink_where_they_are() {
    let resource = LargeObjectResource::new(Options {
        decay_milliseconds: None,
        ..Options::default()
    })
    .unwrap();
    let block = resource.allocate(Request::bytes(4 << 20).unwrap()).unwrap();
    // SAFETY: a live block.
    unsafe { block.address.write_bytes(7, 4 << 20) };
    let mut size = 4 << 20;
    for next in [5 << 20, 60 << 20, 61 << 20, 3 << 20, 200 << 20] {
        // SAFETY: a live block.
        let resized = unsafe { resource.reallocate(block.address, next) }.unwrap();
        assert_eq!(resized.address, block.address);
        assert!(resized.size >= next);
        for offset in [0, size.min(next) - 1] {
            assert_eq!(byte_at(&resized, offset), 7);
        }
        // SAFETY: inside a live block.
        unsafe { resized.address.write_bytes(7, next) };
        size = next;
        healthy(&resource);
        let statistics = resource.statistics();
        assert_eq!(statistics.current_bytes, resized.size as u64);
        assert_eq!(statistics.current_count, 1);
    }
    // A neighbour in the way: the block moves, its bytes come along.
    let wall = resource.allocate(Request::bytes(4 << 20).unwrap()).unwrap();
    assert!(wall.address > block.address);
    // SAFETY: a live block.
    let moved = unsafe { resource.reallocate(block.address, 300 << 20) }.unwrap();
    assert_ne!(moved.address, block.address);
    assert_eq!(byte_at(&moved, (200 << 20) - 1), 7);
    for address in [wall.address, moved.address] {
        // SAFETY: a live block.
        unsafe { resource.deallocate(address) };
    }
    healthy(&resource);
    assert_eq!(resource.statistics().current_bytes, 0);
}
