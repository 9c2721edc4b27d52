//! Every resource against a plain model: blocks never overlap, keep their bytes, and add up.

#![cfg(not(loom))]

use moirai_core::os::HugePages;
use moirai_core::resource::arena::{ArenaResource, ThreadLocalArena};
use moirai_core::resource::large_object::{Fit, LargeObjectResource, Options};
use moirai_core::resource::limit::LimitAdaptor;
use moirai_core::resource::pool::PoolResource;
use moirai_core::resource::slab::SlabResource;
use moirai_core::resource::statistics::StatisticsAdaptor;
use moirai_core::resource::system::SystemResource;
use moirai_core::resource::{HealthReport, Request, Resource};
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

fn healthy(resource: &dyn Resource) {
    let mut report = HealthReport::default();
    resource.check(&mut report);
    assert_eq!(report.findings, Vec::<String>::new(), "{}", resource.name());
    let counts = resource.statistics();
    assert_eq!(counts.hits + counts.misses, counts.total_count);
    assert!(counts.peak_bytes >= counts.current_bytes);
    assert_eq!(counts.invalid_frees, 0);
}

#[derive(Clone, Debug)]
enum Step {
    Allocate {
        size: usize,
        alignment: usize,
        zeroed: bool,
    },
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

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (size(), 0u32..22, any::<bool>()).prop_map(|(size, log, zeroed)| Step::Allocate {
            size,
            alignment: if log < 16 { 64 } else { 1 << log },
            zeroed
        }),
        5 => any::<usize>().prop_map(Step::Free),
        1 => (any::<usize>(), size()).prop_map(|(index, size)| Step::Resize(index, size)),
        1 => (0usize..4 << 20).prop_map(Step::Trim),
    ]
}

struct Live {
    address: NonNull<u8>,
    size: usize,
    mark: u8,
}

fn fill(live: &Live) {
    // SAFETY: a live block of at least `size` bytes.
    unsafe { live.address.write_bytes(live.mark, live.size) };
}

fn bytes(live: &Live) -> &[u8] {
    // SAFETY: a live block whose first `size` bytes were written.
    unsafe { std::slice::from_raw_parts(live.address.as_ptr(), live.size) }
}

fn intact(live: &Live, size: usize) {
    assert!(
        bytes(live)[..size].iter().all(|byte| *byte == live.mark),
        "a block was overwritten"
    );
}

fn run(resource: &dyn Resource, steps: &[Step]) {
    let mut live: Vec<Live> = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let mark = (index % 251) as u8 + 1;
        match *step {
            Step::Allocate {
                size,
                alignment,
                zeroed,
            } => {
                let request = Request::new(size, alignment, zeroed).unwrap();
                let block = resource.allocate(request).unwrap();
                assert!(block.size >= size);
                assert_eq!(block.address.as_ptr() as usize % alignment, 0);
                let entry = Live {
                    address: block.address,
                    size,
                    mark,
                };
                if zeroed {
                    assert!(bytes(&entry).iter().all(|byte| *byte == 0), "not zeroed");
                }
                fill(&entry);
                live.push(entry);
            }
            Step::Free(which) if !live.is_empty() => {
                let entry = live.swap_remove(which % live.len());
                intact(&entry, entry.size);
                // SAFETY: taken out of the live ones.
                assert!(unsafe { resource.deallocate(entry.address) } >= entry.size);
            }
            Step::Resize(which, size) if !live.is_empty() => {
                let index = which % live.len();
                let entry = &mut live[index];
                let kept = entry.size.min(size);
                // SAFETY: a live block.
                let block = unsafe { resource.reallocate(entry.address, size) }.unwrap();
                entry.address = block.address;
                entry.size = size;
                intact(entry, kept);
                entry.mark = mark;
                fill(entry);
            }
            Step::Trim(target) => {
                resource.trim(target);
            }
            _ => {}
        }
    }
    for entry in &live {
        intact(entry, entry.size);
    }
    healthy(resource);
    for entry in live {
        // SAFETY: still live.
        unsafe { resource.deallocate(entry.address) };
    }
    healthy(resource);
    assert_eq!(resource.statistics().current_bytes, 0);
    assert_eq!(resource.statistics().current_count, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn blocks_keep_their_bytes_and_counts_add_up(
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        for resource in resources() {
            run(&*resource, &steps);
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
