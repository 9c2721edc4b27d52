//! One reading of everything that may limit the memory of a process.
//!
//! Each limit is a [`Bound`] with what is used of it. The sample is about the bound with the least
//! room left, which is the lowest limit unless the neighbours in a wider group have filled theirs. The
//! files stay open between readings. [`Source::read`] reads all of them; [`Source::glance`], for a
//! sampler, reads those that are near, looks at the others and at limits once a second, and at what
//! hardly ever changes and what confirms pressure once a second too, or every four in calm.

use super::cgroup::{self, Group, Shortage};
use super::family::Family;
use super::kept::{Kept, Page, fields, number, words};
use crate::os;
use crate::resource::fork;
use crate::sync::Lock;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Time after which a glance becomes a full reading.
const FULL_NANOSECONDS: u64 = 1_000_000_000;
/// Time after which it becomes a reading of everything where less than half of the limit is used, and
/// the use stands still.
const CALM_NANOSECONDS: u64 = 4_000_000_000;
/// Use that has moved by more than this share of the limit within a second does not stand still.
const STILL: u64 = 64;
/// Pace at which the machine's memory may fill up, for how long a reading of it holds.
const HOST_BYTES_PER_SECOND: f64 = (16u64 << 30) as f64;
/// A bound with more room than this many times the least is far: it is not read at a glance.
const FAR: u64 = 4;

/// What sets a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A control group, where the kernel kills.
    Group,
    /// A control group, where the kernel slows it down.
    GroupHigh,
    /// The process's `RLIMIT_AS`.
    AddressSpace,
    /// The process's `RLIMIT_DATA`.
    Data,
    /// The machine.
    Host,
    /// The user.
    Budget,
}

impl Kind {
    /// The name users see.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Group => "cgroup",
            Kind::GroupHigh => "cgroup high",
            Kind::AddressSpace => "address space",
            Kind::Data => "data",
            Kind::Host => "host",
            Kind::Budget => "budget",
        }
    }
}

/// A limit and what is used of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// What sets it.
    pub kind: Kind,
    /// The group's folder.
    pub folder: Option<Arc<Path>>,
    /// Bytes in use: without the file cache that would go first.
    pub used: u64,
    /// Bytes in use without any file cache.
    pub without_cache: u64,
    /// Bytes that may be used.
    pub limit: u64,
}

/// One reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When, by the monotonic clock.
    pub time_nanoseconds: u64,
    /// What the nearest bound is; `None` if nothing is limited.
    pub kind: Option<Kind>,
    /// Bytes in use of the nearest bound; without one, the process's resident set.
    pub used: u64,
    /// The same without any file cache.
    pub without_cache: u64,
    /// Bytes that the nearest bound allows; `u64::MAX` if there is none.
    pub limit: u64,
    /// Least bytes left, without file cache, of the bounds whose crossing kills.
    pub deadly_room: u64,
    /// Limit of the bound that `deadly_room` is of.
    pub deadly_limit: u64,
    /// The process's resident set.
    pub resident: u64,
    /// Of it, what is no file.
    pub anonymous: u64,
    /// Private writable memory, stacks included, as `RLIMIT_DATA` counts.
    pub data: u64,
    /// What the process's children use, shared pages counted once; 0 unless there is a budget.
    pub children: u64,
    /// Page faults without disk since the process started.
    pub faults: u64,
    /// Share of the last ten seconds in which a thread waited for memory, in millionths.
    pub stalled_millionths: Option<u64>,
    /// Times that the own group ran into its limit.
    pub limit_hits: Option<u64>,
    /// Times that the kernel killed in the own group.
    pub kills: Option<u64>,
}

/// How much of what there is a reading reads.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Depth {
    /// The nearest bounds.
    Near,
    /// All bounds.
    Far,
    /// Also what costs most and hardly ever changes; what was missing is looked for.
    All,
}

/// Reads samples of one process.
pub struct Source {
    process: String,
    /// Whether it is this process, as the kernel sees it: some figures cost less then.
    is_own: bool,
    page: Page,
    root: PathBuf,
    status: Kept,
    stat: Kept,
    limits: Kept,
    host: Kept,
    stalls: Kept,
    membership: Kept,
    mounts: PathBuf,
    membership_then: Vec<u8>,
    groups: Vec<Group>,
    family: Family,
    budget: Option<u64>,
    /// While a fence moves the soft RLIMIT_DATA: what it was before.
    fenced_data_limit: Option<Option<u64>>,
    address_space_limit: Option<u64>,
    data_limit: Option<u64>,
    host_total: u64,
    host_used: u64,
    host_used_then: u64,
    host_resident_then: u64,
    host_at: u64,
    shortage: Shortage,
    stalled_millionths: Option<u64>,
    full_at: Option<u64>,
    all_at: u64,
    /// Room at the last full reading, and whether it is more than half and has stayed so since.
    room_then: u64,
    is_calm: bool,
    least_room: u64,
    bounds: Vec<Bound>,
}

/// A source that any number of threads read in turn. A fork waits for a reading that is under way: a
/// child would else wait for its end for ever.
pub struct SharedSource(Arc<Lock<Source>>);

impl SharedSource {
    /// Share a source.
    pub fn new(source: Source) -> Self {
        let lock = fork::shared(Lock::new(source));
        SharedSource(lock)
    }

    /// See [`Source::read`].
    pub fn read(&self) -> Option<Sample> {
        self.0.lock().read()
    }

    /// See [`Source::bounds`].
    pub fn bounds(&self) -> Vec<Bound> {
        self.0.lock().bounds().to_vec()
    }
}

impl Source {
    /// A source for `process` (`self` or a number) under `root`, where `/proc` and `/sys` are.
    ///
    /// A budget is for the process `eldest`, which may be another, and its children.
    pub fn new(root: &Path, process: &str, budget: Option<u64>, eldest: Option<u32>) -> Self {
        let own_number = match process {
            "self" => os::process::process_id(),
            _ => process.parse().unwrap_or(0),
        };
        let eldest = eldest.filter(|eldest| *eldest != own_number);
        let processes = root.join("proc");
        let own = processes.join(process);
        Source {
            process: process.into(),
            is_own: process == "self" && root == Path::new("/"),
            page: Page::new(),
            root: root.into(),
            status: Kept::new(own.join("statm")),
            stat: Kept::new(own.join("stat")),
            limits: Kept::new(own.join("limits")),
            host: Kept::new(processes.join("meminfo")),
            stalls: Kept::new(processes.join("pressure/memory")),
            membership: Kept::new(own.join("cgroup")),
            mounts: own.join("mountinfo"),
            membership_then: Vec::new(),
            groups: Vec::new(),
            family: Family::new(processes, eldest.map(|number| number.to_string())),
            budget,
            fenced_data_limit: None,
            address_space_limit: None,
            data_limit: None,
            host_total: 0,
            host_used: 0,
            host_used_then: 0,
            host_resident_then: 0,
            host_at: 0,
            shortage: Shortage::default(),
            stalled_millionths: None,
            full_at: None,
            all_at: 0,
            room_then: 0,
            is_calm: false,
            least_room: 0,
            bounds: Vec::new(),
        }
    }

    /// From now on the soft `RLIMIT_DATA` is a fence's; `limit` is what it was before.
    pub(super) fn set_fenced(&mut self, limit: Option<u64>) {
        self.fenced_data_limit = Some(limit);
    }

    /// Read everything. `None` if the process is gone.
    pub fn read(&mut self) -> Option<Sample> {
        self.read_fully(os::now_nanoseconds(), true)
    }

    /// Have the next glance read everything: others have come or gone.
    pub(super) fn look_again(&mut self) {
        self.full_at = None;
    }

    /// Read what is near; more once a second. `None` if the process is gone.
    pub fn glance(&mut self) -> Option<Sample> {
        let now = os::now_nanoseconds();
        match self.full_at {
            Some(then) if now.saturating_sub(then) < FULL_NANOSECONDS => {
                self.sample(now, Depth::Near)
            }
            Some(_) if self.is_calm && now.saturating_sub(self.all_at) < CALM_NANOSECONDS => {
                self.read_fully(now, false)
            }
            _ => self.read_fully(now, true),
        }
    }

    fn read_fully(&mut self, now: u64, all: bool) -> Option<Sample> {
        self.full_at = Some(now);
        if all {
            self.all_at = now;
            self.read_what_stays();
        }
        for group in &mut self.groups {
            group.read_limits(&mut self.page, now, all);
        }
        self.read_own_limits();
        if self.budget.is_some() {
            self.family.look(&self.process, now);
        }
        let sample = self.sample(now, if all { Depth::All } else { Depth::Far });
        self.room_then = self.least_room;
        sample
    }

    /// All bounds as of the last reading, the own group first.
    pub fn bounds(&self) -> &[Bound] {
        &self.bounds
    }

    /// The groups that the process is in, and what confirms pressure in them.
    fn read_what_stays(&mut self) {
        let page = &mut self.page;
        // A process may be moved to another group.
        let membership = self.membership.read(page, true).unwrap_or_default();
        if membership != self.membership_then || self.groups.is_empty() {
            self.membership_then = membership.to_vec();
            let mounts = std::fs::read(&self.mounts).unwrap_or_default();
            self.groups = cgroup::groups(&self.root, &self.membership_then, &mounts);
        }
        let mut own = self.groups.first_mut();
        self.shortage = own
            .as_mut()
            .map_or(Shortage::default(), |group| group.shortage(page));
        let of_own = own.and_then(|group| group.stalls(page).map(stalled_millionths));
        self.stalled_millionths = match of_own {
            Some(found) => found,
            None => self.stalls.read(page, true).and_then(stalled_millionths),
        };
    }

    fn read_own_limits(&mut self) {
        let (space, data) = if self.is_own {
            (
                os::process::address_space_limit(),
                os::process::data_limits().0,
            )
        } else {
            let limits = self.limits.read(&mut self.page, true).unwrap_or_default();
            let [space, data] = fields(limits, [b"Max address space", b"Max data size"]);
            (space, data)
        };
        self.address_space_limit = space;
        self.data_limit = self.fenced_data_limit.unwrap_or(data);
    }

    fn read_groups(&mut self, far: u64, now: u64, depth: Depth) {
        for group in &mut self.groups {
            let Some(limit) = group.limit else { continue };
            let is_near = depth >= Depth::Far || group.room().is_none_or(|room| room <= far);
            if is_near && !group.read_usage(&mut self.page, now, depth == Depth::All) {
                continue;
            }
            let kind = if group.is_high {
                Kind::GroupHigh
            } else {
                Kind::Group
            };
            let mut push = |kind, limit| {
                self.bounds.push(Bound {
                    kind,
                    folder: Some(Arc::clone(&group.folder)),
                    used: group.used,
                    without_cache: group.without_cache,
                    limit,
                });
            };
            push(kind, limit);
            // A fence stands where the kernel kills, not where it slows down.
            if let Some(deadly) = group.deadly {
                push(Kind::Group, deadly);
            }
        }
    }

    /// The machine's memory, whose file costs more to read than all others: as often as its room
    /// asks for, and what the process grew since.
    fn read_host(&mut self, resident: u64, far: u64, now: u64, depth: Depth) {
        let room = self.host_total.saturating_sub(self.host_used);
        let pause = room as f64 / HOST_BYTES_PER_SECOND * 1e9;
        let is_due = room <= far && now.saturating_sub(self.host_at) as f64 >= pause;
        if depth >= Depth::Far || is_due {
            let text = self
                .host
                .read(&mut self.page, depth == Depth::All)
                .unwrap_or_default();
            let [total, available] = fields(text, [b"MemTotal:", b"MemAvailable:"]);
            self.host_total = total.unwrap_or(0) * 1024;
            self.host_used = (self.host_total).saturating_sub(available.unwrap_or(0) * 1024);
            self.host_used_then = self.host_used;
            self.host_resident_then = resident;
            self.host_at = now;
        } else {
            let others = self.host_used_then.saturating_sub(self.host_resident_then);
            self.host_used = (others + resident).min(self.host_total);
        }
    }

    fn read_faults(&mut self, depth: Depth) -> u64 {
        if self.is_own {
            return os::process::minor_faults();
        }
        let text = self.stat.read(&mut self.page, depth == Depth::All);
        text.and_then(minor_faults).unwrap_or(0)
    }

    fn sample(&mut self, now: u64, depth: Depth) -> Option<Sample> {
        let text = self.status.read(&mut self.page, depth == Depth::All)?;
        let [size, resident, file, _, _, data] = page_counts(text);
        self.bounds.clear();
        // A bound whose room was far more than the least of the last reading has not lost it since.
        let far = self.least_room.saturating_mul(FAR);
        self.read_groups(far, now, depth);
        self.read_host(resident, far, now, depth);
        let faults = self.read_faults(depth);

        let mut plain = |kind, used, limit: Option<u64>| {
            let bound = limit.map(|limit| Bound {
                kind,
                folder: None,
                used,
                without_cache: used,
                limit,
            });
            self.bounds.extend(bound);
        };
        if depth == Depth::Near && self.budget.is_some() {
            self.family.follow(&self.process, now);
        }
        let (own, children) = match self.budget {
            Some(_) => self.family.bytes(resident),
            None => (resident, 0),
        };
        plain(Kind::Budget, own + children, self.budget);
        plain(Kind::AddressSpace, size, self.address_space_limit);
        plain(Kind::Data, data, self.data_limit);
        plain(
            Kind::Host,
            self.host_used,
            Some(self.host_total).filter(|total| *total > 0),
        );

        let room = |bound: &&Bound| bound.limit.saturating_sub(bound.used);
        // A fence adds this to the room, which was read after it: what was unmapped in between must
        // not count twice.
        let data = match self.fenced_data_limit {
            Some(_) => {
                let text = self.status.read(&mut self.page, false)?;
                data.min(page_counts(text)[5])
            }
            None => data,
        };
        let nearest = self.bounds.iter().min_by_key(room);
        let deadly_room = |bound: &&Bound| bound.limit.saturating_sub(bound.without_cache);
        let deadly = self
            .bounds
            .iter()
            .filter(|bound| matches!(bound.kind, Kind::Group | Kind::Host | Kind::Budget))
            .min_by_key(deadly_room);
        self.least_room = nearest.as_ref().map_or(u64::MAX, deadly_room);
        self.is_calm = nearest.is_none_or(|bound| {
            self.least_room > bound.limit / 2
                && self.least_room.abs_diff(self.room_then) <= bound.limit / STILL
        });
        Some(Sample {
            time_nanoseconds: now,
            kind: nearest.map(|bound| bound.kind),
            used: nearest.map_or(resident, |bound| bound.used),
            without_cache: nearest.map_or(resident, |bound| bound.without_cache),
            limit: nearest.map_or(u64::MAX, |bound| bound.limit),
            deadly_room: deadly.as_ref().map_or(u64::MAX, deadly_room),
            deadly_limit: deadly.map_or(u64::MAX, |bound| bound.limit),
            resident,
            anonymous: resident.saturating_sub(file),
            data,
            children,
            faults,
            stalled_millionths: self.stalled_millionths,
            limit_hits: self.shortage.limit_hits,
            kills: self.shortage.kills,
        })
    }
}

/// The numbers of `/proc/<pid>/statm` in bytes.
fn page_counts(text: &[u8]) -> [u64; 6] {
    let mut counts = [0; 6];
    for (place, word) in counts.iter_mut().zip(words(text)) {
        *place = number(word).unwrap_or(0) * os::PAGE_BYTES as u64;
    }
    counts
}

/// The tenth field of `/proc/<pid>/stat`; the second, a name in brackets, may hold anything.
fn minor_faults(text: &[u8]) -> Option<u64> {
    let end = text.iter().rposition(|byte| *byte == b')')?;
    number(words(&text[end + 1..]).nth(7)?)
}

/// `some avg10=1.25 …` as millionths of the time.
fn stalled_millionths(text: &[u8]) -> Option<u64> {
    let word = words(text).nth(1)?.strip_prefix(b"avg10=")?;
    let percent: f64 = std::str::from_utf8(word).ok()?.parse().ok()?;
    Some((percent * 1e4) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let text = b"7 (a) b) S 1 2 3 4 5 6 4321 8 9";
        assert_eq!(minor_faults(text), Some(4321));
    }

    #[test]
    fn stalls_are_read_from_the_first_line() {
        let text = b"some avg10=1.25 avg60=0.00 avg300=0.00 total=5\nfull avg10=9.00\n";
        assert_eq!(stalled_millionths(text), Some(12_500));
    }

    #[test]
    fn a_process_that_does_not_exist_has_no_sample() {
        assert_eq!(Source::new(Path::new("/"), "0", None, None).read(), None);
    }

    #[test]
    fn the_own_process_has_one() {
        let mut source = Source::new(Path::new("/"), "self", Some(1 << 50), None);
        let sample = source.read().expect("this process lives");
        assert!(sample.resident > 0);
        assert!(sample.limit > 0);
        assert!(
            source
                .bounds()
                .iter()
                .any(|bound| bound.kind == Kind::Budget)
        );
    }
}
