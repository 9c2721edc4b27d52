//! A thread that reads a [`Source`] as often as is needed, and keeps what it read.
//!
//! The time to the next reading is a fifth of the time in which the room left would be used up, at
//! the pace of late or at a gibibyte a second for each process that shares the fence, whichever is
//! faster. Readers take what is kept under a
//! short lock, or sleep until the next sample. A forked child has no such thread: its sampler is
//! stopped until `start` makes another, with files of the child's own.

use super::fence::{Fence, FenceSettings};
use super::source::{Sample, Source};
use crate::error::{Error, Result};
use crate::os::{self, WaitEnd};
use crate::resource::fork;
use crate::sync::{AtomicU32, Lock, Ordering};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Share of the time to the limit after which to look again.
const SHARE: f64 = 0.2;
/// Pace to be ready for: what one core touches in a second, about; of so many sharers at most.
const READY_BYTES_PER_SECOND: f64 = (1u64 << 30) as f64;
const READY_SHARERS: u64 = 8;
/// Weight of the newest pace.
const PACE_WEIGHT: f64 = 0.5;

/// How to sample.
#[derive(Clone, Debug)]
pub struct SamplerSettings {
    /// Where `/proc` and `/sys` are.
    pub root: PathBuf,
    /// `self` or a number.
    pub process: String,
    /// The user's own limit for the process and its children.
    pub budget: Option<u64>,
    /// The process that the budget is for, with its children, if it is not the one sampled.
    pub eldest: Option<u32>,
    /// Shortest time between two samples.
    pub shortest: Duration,
    /// Longest time between two samples.
    pub longest: Duration,
    /// Samples to keep.
    pub capacity: usize,
    /// Keep a fence, if any.
    pub fence: Option<FenceSettings>,
}

/// What sampling cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SamplerStatistics {
    /// Samples taken.
    pub samples: u64,
    /// Time spent reading them.
    pub reading_nanoseconds: u64,
    /// Longest time that a sample came later than planned.
    pub latest_nanoseconds: u64,
    /// Time planned until the next sample.
    pub interval_nanoseconds: u64,
    /// Bytes that the fence still lets be mapped; `None` without one.
    pub fence_room: Option<u64>,
    /// Processes that share the fence's room.
    pub sharers: u64,
    /// Whether this process is to act for those that share.
    pub is_leader: bool,
    /// Why the fence's ledger cannot be opened, as the system's number; `None` if it can.
    pub ledger_error: Option<i32>,
}

/// How a wait for a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// There is a newer sample; its number.
    Sample(u64),
    /// The time has passed.
    TimedOut,
    /// A signal handler is to run on this thread.
    Interrupted,
    /// The sampler is stopped.
    Stopped,
}

struct Kept {
    samples: VecDeque<Sample>,
    statistics: SamplerStatistics,
}

/// One run of the thread.
struct Run {
    kept: Lock<Kept>,
    capacity: usize,
    /// Low bits of the number of samples; slept on. `Release` after the sample is kept.
    sequence: AtomicU32,
    /// 1 to stop; the thread sleeps on it. `Release`: whoever stops has nothing else to hand over.
    stopping: AtomicU32,
    /// 1 when the thread has ended and its fence is lifted.
    ended: AtomicU32,
    generation: u64,
}

/// Samples on a thread of its own; any number of threads may ask it at once.
pub struct Sampler {
    settings: SamplerSettings,
    run: Arc<Lock<Option<Arc<Run>>>>,
}

impl Sampler {
    /// A sampler that is not started.
    pub fn new(settings: SamplerSettings) -> Self {
        let run = fork::shared(Lock::new(None));
        Sampler { settings, run }
    }

    fn current(&self) -> Option<Arc<Run>> {
        let run = self.run.lock().clone()?;
        (run.generation == fork::generation()).then_some(run)
    }

    /// Whether the thread runs in this process.
    pub fn is_running(&self) -> bool {
        self.current()
            .is_some_and(|run| run.ended.load(Ordering::Acquire) == 0)
    }

    /// Take a first sample and start the thread; does nothing if it runs.
    pub fn start(&self) -> Result<()> {
        let mut place = self.run.lock();
        let generation = fork::generation();
        if let Some(run) = place.as_ref()
            && run.generation == generation
            && run.ended.load(Ordering::Acquire) == 0
        {
            return Ok(());
        }
        let settings = &self.settings;
        let mut source = Source::new(
            &settings.root,
            &settings.process,
            settings.budget,
            settings.eldest,
        );
        let mut fence = None;
        if let Some(asked) = &settings.fence {
            let Some(made) = Fence::new(asked.clone()) else {
                return Err(Error::unsupported(
                    "fence: this process has one already: stop the sampler that keeps it",
                ));
            };
            source.set_fenced(made.before());
            fence = Some(made);
        }
        let Some(first) = source.read() else {
            return Err(Error::unsupported(format!(
                "{}: no such process, or no /proc under {}",
                settings.process,
                settings.root.display()
            )));
        };
        let run = Arc::new(Run {
            kept: Lock::new(Kept {
                samples: VecDeque::with_capacity(settings.capacity),
                statistics: SamplerStatistics::default(),
            }),
            capacity: settings.capacity,
            sequence: AtomicU32::new(0),
            stopping: AtomicU32::new(0),
            ended: AtomicU32::new(0),
            generation,
        });
        let (shortest, longest) = (settings.shortest, settings.longest);
        let of_thread = Arc::clone(&run);
        // Kept before the thread runs: whoever starts a sampler finds a sample.
        run.keep(first, 0, 0, Duration::ZERO, fence.as_mut());
        let body =
            move || sample_until_stopped(&of_thread, source, fence, first, shortest, longest);
        if !os::spawn_quiet("moirai-sampler", body) {
            return Err(Error::out_of_memory(0, "no thread can be started"));
        }
        *place = Some(run);
        Ok(())
    }

    /// End the thread and wait until its fence is lifted; does nothing if it does not run.
    pub fn stop(&self) {
        let Some(run) = self.current() else { return };
        run.stopping.store(1, Ordering::Release);
        os::process::wake_all(&run.stopping);
        while run.ended.load(Ordering::Acquire) == 0 {
            os::wait_on(&run.ended, 0, None);
        }
    }

    /// The newest sample and its number, from 1; `None` before `start`.
    pub fn latest(&self) -> Option<(u64, Sample)> {
        let run = self.current()?;
        let kept = run.kept.lock();
        Some((kept.statistics.samples, *kept.samples.back()?))
    }

    /// The newest `count` samples that are kept, oldest first.
    pub fn history(&self, count: usize) -> Vec<Sample> {
        let Some(run) = self.current() else {
            return Vec::new();
        };
        let kept = run.kept.lock();
        let skipped = kept.samples.len().saturating_sub(count);
        kept.samples.iter().skip(skipped).copied().collect()
    }

    /// What sampling cost since `start`.
    pub fn statistics(&self) -> SamplerStatistics {
        self.current().map_or(SamplerStatistics::default(), |run| {
            run.kept.lock().statistics
        })
    }

    /// Sleep until there is a sample after the one with number `seen`, for `timeout` at most.
    pub fn wait(&self, seen: u64, timeout: Duration) -> Waited {
        let Some(run) = self.current() else {
            return Waited::Stopped;
        };
        loop {
            let sequence = run.sequence.load(Ordering::Acquire);
            let newest = run.kept.lock().statistics.samples;
            if newest > seen {
                return Waited::Sample(newest);
            }
            if run.ended.load(Ordering::Acquire) == 1 {
                return Waited::Stopped;
            }
            match os::wait_on(&run.sequence, sequence, Some(timeout)) {
                WaitEnd::TimedOut => return Waited::TimedOut,
                WaitEnd::Interrupted => return Waited::Interrupted,
                WaitEnd::Woken => {}
            }
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Run {
    fn keep(
        &self,
        sample: Sample,
        cost: u64,
        late: u64,
        interval: Duration,
        fence: Option<&mut Fence>,
    ) {
        let fenced = fence.map(|fence| {
            let room = fence.follow(&sample);
            (
                room,
                fence.sharers(),
                fence.is_leader(),
                fence.ledger_error(),
            )
        });
        let mut kept = self.kept.lock();
        if kept.samples.len() == self.capacity {
            kept.samples.pop_front();
        }
        kept.samples.push_back(sample);
        let statistics = &mut kept.statistics;
        statistics.samples += 1;
        statistics.reading_nanoseconds += cost;
        statistics.latest_nanoseconds = statistics.latest_nanoseconds.max(late);
        statistics.interval_nanoseconds = interval.as_nanos() as u64;
        statistics.fence_room = fenced.map(|(room, ..)| room);
        statistics.sharers = fenced.map_or(1, |(_, sharers, ..)| sharers);
        statistics.is_leader = fenced.is_none_or(|(_, _, leads, _)| leads);
        statistics.ledger_error = fenced.and_then(|(.., error)| error);
        drop(kept);
        self.sequence.fetch_add(1, Ordering::Release);
        os::process::wake_all(&self.sequence);
    }
}

fn sample_until_stopped(
    run: &Run,
    mut source: Source,
    mut fence: Option<Fence>,
    first: Sample,
    shortest: Duration,
    longest: Duration,
) {
    let mut pace = Pace::default();
    let sharers = |fence: &Option<Fence>| fence.as_ref().map_or(1, Fence::sharers);
    let mut interval = pace.interval(&first, sharers(&fence), shortest, longest);
    let mut planned = os::now_nanoseconds() + interval.as_nanos() as u64;
    loop {
        let rest = planned.saturating_sub(os::now_nanoseconds());
        if run.stopping.load(Ordering::Acquire) == 0 && rest > 0 {
            os::wait_on(&run.stopping, 0, Some(Duration::from_nanos(rest)));
        }
        if run.stopping.load(Ordering::Acquire) == 1 {
            break;
        }
        let start = os::now_nanoseconds();
        if start < planned {
            continue;
        }
        // The process that is looked at may end before the one that looks.
        let Some(sample) = source.glance() else { break };
        let sharers_before = sharers(&fence);
        interval = pace.interval(&sample, sharers_before, shortest, longest);
        let end = os::now_nanoseconds();
        run.keep(
            sample,
            end - start,
            start - planned,
            interval,
            fence.as_mut(),
        );
        if sharers(&fence) != sharers_before {
            source.look_again();
        }
        planned = end + interval.as_nanos() as u64;
    }
    drop(fence);
    run.ended.store(1, Ordering::Release);
    os::process::wake_all(&run.ended);
    run.sequence.fetch_add(1, Ordering::Release);
    os::process::wake_all(&run.sequence);
}

/// How fast the use grows.
#[derive(Default)]
struct Pace {
    last: Option<(u64, u64)>,
    bytes_per_second: f64,
}

impl Pace {
    /// The time to the next sample.
    fn interval(
        &mut self,
        sample: &Sample,
        sharers: u64,
        shortest: Duration,
        longest: Duration,
    ) -> Duration {
        if let Some((time, used)) = self.last
            && sample.time_nanoseconds > time
        {
            let seconds = (sample.time_nanoseconds - time) as f64 / 1e9;
            let grown = sample.used.saturating_sub(used) as f64;
            self.bytes_per_second += PACE_WEIGHT * (grown / seconds - self.bytes_per_second);
        }
        self.last = Some((sample.time_nanoseconds, sample.used));
        let room = sample
            .deadly_room
            .min(sample.limit.saturating_sub(sample.used));
        let ready = READY_BYTES_PER_SECOND * sharers.min(READY_SHARERS) as f64;
        let pace = self.bytes_per_second.max(ready);
        let seconds = SHARE * room as f64 / pace;
        Duration::from_secs_f64(seconds.clamp(shortest.as_secs_f64(), longest.as_secs_f64()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> SamplerSettings {
        SamplerSettings {
            root: "/".into(),
            process: "self".into(),
            budget: Some(1 << 40),
            eldest: None,
            shortest: Duration::from_millis(1),
            longest: Duration::from_millis(2),
            capacity: 4,
            fence: None,
        }
    }

    fn sample(time_nanoseconds: u64, used: u64) -> Sample {
        let limit = 10 << 30;
        Sample {
            time_nanoseconds,
            kind: None,
            used,
            without_cache: used,
            limit,
            deadly_room: limit - used,
            deadly_limit: limit,
            resident: used,
            anonymous: used,
            data: used,
            children: 0,
            faults: 0,
            stalled_millionths: None,
            limit_hits: None,
            kills: None,
        }
    }

    #[test]
    fn it_keeps_the_newest_samples_and_wakes_who_waits() {
        let sampler = Sampler::new(settings());
        assert_eq!(sampler.wait(0, Duration::ZERO), Waited::Stopped);
        sampler.start().expect("a thread");
        let mut seen = 0;
        while seen < 10 {
            match sampler.wait(seen, Duration::from_secs(60)) {
                Waited::Sample(number) => seen = number,
                Waited::Interrupted => {}
                other => panic!("{other:?}"),
            }
        }
        let history = sampler.history(100);
        assert_eq!(history.len(), 4);
        assert!(history.is_sorted_by_key(|sample| sample.time_nanoseconds));
        sampler.stop();
        assert!(!sampler.is_running());
        let (last, _) = sampler.latest().expect("what was kept stays");
        assert_eq!(sampler.wait(last, Duration::from_secs(60)), Waited::Stopped);
        sampler.start().expect("once more");
        assert!(sampler.is_running());
    }

    #[test]
    fn it_looks_again_sooner_as_the_room_or_the_time_to_the_limit_shrinks() {
        let (shortest, longest) = (Duration::from_millis(5), Duration::from_secs(1));
        let mut pace = Pace::default();
        let interval = |pace: &mut Pace, time: f64, gib: f64| {
            let used = (gib * (1u64 << 30) as f64) as u64;
            pace.interval(&sample((time * 1e9) as u64, used), 1, shortest, longest)
        };
        assert_eq!(interval(&mut pace, 0.0, 1.0), longest);
        let calm = interval(&mut pace, 1.0, 8.0);
        assert!(calm < Duration::from_millis(400), "{calm:?}");
        let hurried = interval(&mut pace, 1.1, 9.0);
        assert!(hurried < Duration::from_millis(40), "{hurried:?}");
        assert_eq!(interval(&mut pace, 1.2, 10.0), shortest);
        let of_four =
            |sharers| Pace::default().interval(&sample(0, 8 << 30), sharers, shortest, longest);
        assert_eq!(of_four(4) * 4, of_four(1));
    }

    #[test]
    fn a_process_that_is_gone_cannot_be_sampled() {
        let sampler = Sampler::new(SamplerSettings {
            process: "0".into(),
            ..settings()
        });
        let error = sampler.start().expect_err("nobody is number 0");
        assert!(
            error.to_string().starts_with("0: no such process"),
            "{error}"
        );
    }
}
