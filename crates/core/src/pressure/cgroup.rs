//! The control groups that a process is in, own first, up to what is mounted: versions 1 and 2.
//!
//! A group's memory is its usage less the page cache that the kernel would drop first
//! (`inactive_file`), as the working set of Kubernetes; a second figure leaves out all file cache.

use super::kept::{Kept, Page, fields, words};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Version 1 says "no limit" by a number near 2^63.
const UNLIMITED: u64 = 1 << 60;
/// Time for which a reading of the file cache holds, far from the limit.
const CACHE_NANOSECONDS: u64 = 2_000_000_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// One group.
pub(super) struct Group {
    version: Version,
    pub(super) folder: Arc<Path>,
    usage: Kept,
    stat: Kept,
    maximum: Kept,
    high: Kept,
    /// Where the kernel counts shortage: how often the limit was hit, and kills.
    hits: Kept,
    kills: Kept,
    stalls: Kept,
    /// Version 1: the least limit of the group and those above.
    hierarchical: Option<u64>,
    /// The least limit.
    pub(super) limit: Option<u64>,
    /// Where the kernel kills, if that is another.
    pub(super) deadly: Option<u64>,
    /// Whether `limit` is where the kernel slows the group down, not where it kills.
    pub(super) is_high: bool,
    /// File cache that is not, and that is, in active use; when it was read, and at what usage.
    cache: (u64, u64),
    cache_at: u64,
    cache_usage: u64,
    pub(super) used: u64,
    pub(super) without_cache: u64,
}

/// What the kernel counted of shortage in a group.
#[derive(Clone, Copy, Default)]
pub(super) struct Shortage {
    pub(super) limit_hits: Option<u64>,
    pub(super) kills: Option<u64>,
}

impl Group {
    fn new(version: Version, folder: PathBuf) -> Self {
        let (usage, maximum, hits, kills) = match version {
            Version::One => (
                "memory.usage_in_bytes",
                "memory.limit_in_bytes",
                "memory.failcnt",
                "memory.oom_control",
            ),
            Version::Two => (
                "memory.current",
                "memory.max",
                "memory.events",
                "memory.events",
            ),
        };
        let kept = |name: &str| Kept::new(folder.join(name));
        Group {
            version,
            usage: kept(usage),
            stat: kept("memory.stat"),
            maximum: kept(maximum),
            high: kept("memory.high"),
            hits: kept(hits),
            kills: kept(kills),
            stalls: kept("memory.pressure"),
            hierarchical: None,
            folder: folder.into(),
            limit: None,
            deadly: None,
            is_high: false,
            cache: (0, 0),
            cache_at: 0,
            cache_usage: 0,
            used: 0,
            without_cache: 0,
        }
    }

    /// Read the limits, which may change while the group is in use; without `all`, not those of the
    /// groups above that are not mounted here, which cost the most.
    pub(super) fn read_limits(&mut self, page: &mut Page, now: u64, all: bool) {
        let maximum = self.maximum.number(page, true);
        let second = match self.version {
            Version::Two => self.high.number(page, true),
            Version::One => {
                if all {
                    self.read_stat(page, true);
                    self.cache_at = now;
                }
                self.hierarchical
            }
        };
        let finite = |limit: Option<u64>| limit.filter(|limit| *limit < UNLIMITED);
        let (maximum, second) = (finite(maximum), finite(second));
        self.limit = maximum.into_iter().chain(second).min();
        self.is_high = self.version == Version::Two && self.limit != maximum;
        self.deadly = maximum.filter(|_| self.is_high);
    }

    /// Read how much is used. False if the group is gone.
    ///
    /// How much of it is file cache costs several times as much to read as the rest, and so is
    /// read again only with `all`, after a while, when the usage has moved, or near the limit.
    pub(super) fn read_usage(&mut self, page: &mut Page, now: u64, all: bool) -> bool {
        let Some(usage) = self.usage.number(page, all) else {
            return false;
        };
        let limit = self.limit.unwrap_or(u64::MAX);
        let (inactive, active) = self.cache;
        if self.cache_at == now {
            self.cache_usage = usage;
        } else if all
            || now.saturating_sub(self.cache_at) >= CACHE_NANOSECONDS
            || usage.abs_diff(self.cache_usage) > limit / 64
            || usage.saturating_sub(inactive + active) > limit / 2
        {
            self.read_stat(page, all);
            self.cache_at = now;
            self.cache_usage = usage;
        }
        self.used = usage.saturating_sub(self.cache.0);
        self.without_cache = self.used.saturating_sub(self.cache.1);
        true
    }

    fn read_stat(&mut self, page: &mut Page, reopen: bool) {
        let names: [&[u8]; 3] = match self.version {
            Version::One => [
                b"hierarchical_memory_limit",
                b"total_inactive_file",
                b"total_active_file",
            ],
            // Version 2 has none of the first, for which its whole file would be searched.
            Version::Two => [b"anon", b"inactive_file", b"active_file"],
        };
        let stat = self.stat.read(page, reopen).unwrap_or_default();
        let [first, inactive, active] = fields(stat, names);
        if self.version == Version::One {
            self.hierarchical = first;
        }
        self.cache = (inactive.unwrap_or(0), active.unwrap_or(0));
    }

    /// Bytes left without file cache; `None` without a limit.
    pub(super) fn room(&self) -> Option<u64> {
        Some(self.limit?.saturating_sub(self.without_cache))
    }

    pub(super) fn shortage(&mut self, page: &mut Page) -> Shortage {
        match self.version {
            Version::One => {
                let limit_hits = self.hits.number(page, true);
                let text = self.kills.read(page, true).unwrap_or_default();
                Shortage {
                    limit_hits,
                    kills: fields(text, [b"oom_kill"])[0],
                }
            }
            Version::Two => {
                let text = self.hits.read(page, true).unwrap_or_default();
                let [limit_hits, kills] = fields(text, [b"max", b"oom_kill"]);
                Shortage { limit_hits, kills }
            }
        }
    }

    /// What the kernel says of threads that waited for memory; `None` if it says nothing.
    pub(super) fn stalls<'a>(&mut self, page: &'a mut Page) -> Option<&'a [u8]> {
        self.stalls.read(page, true)
    }
}

/// Parse `/proc/<pid>/cgroup` and `mountinfo` into the groups that count memory, own first.
pub(super) fn groups(root: &Path, membership: &[u8], mounts: &[u8]) -> Vec<Group> {
    let mut second = None;
    let mut first = None;
    for line in membership.split(|byte| *byte == b'\n') {
        let mut parts = line.splitn(3, |byte| *byte == b':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        if controllers.is_empty() {
            second = Some(path);
        } else if controllers
            .split(|byte| *byte == b',')
            .any(|name| name == b"memory")
        {
            first = Some(path);
        }
    }
    // Where both versions are mounted, memory is counted by the one that has the controller.
    if let Some(path) = first
        && let Some(mount) = find_mount(mounts, Version::One)
    {
        return walk(root, Version::One, &mount, path);
    }
    match (second, find_mount(mounts, Version::Two)) {
        (Some(path), Some(mount)) => walk(root, Version::Two, &mount, path),
        _ => Vec::new(),
    }
}

/// Where a hierarchy is mounted, and which of its groups is seen there.
struct Mount {
    group: Vec<u8>,
    point: Vec<u8>,
}

fn find_mount(mounts: &[u8], version: Version) -> Option<Mount> {
    mounts.split(|byte| *byte == b'\n').find_map(|line| {
        let all: Vec<&[u8]> = words(line).collect();
        let dash = all.iter().position(|word| *word == b"-")?;
        let (kind, options) = (*all.get(dash + 1)?, *all.get(dash + 3)?);
        let fits = match version {
            Version::Two => kind == b"cgroup2",
            Version::One => {
                kind == b"cgroup" && options.split(|byte| *byte == b',').any(|o| o == b"memory")
            }
        };
        fits.then_some(Mount {
            group: unescape(all.get(3)?),
            point: unescape(all.get(4)?),
        })
    })
}

/// The kernel writes a blank in a path as `\040`.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| byte == b'\\');
        let code = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                plain.push(code);
                rest = &after[3..];
            }
            None => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    plain
}

fn walk(root: &Path, version: Version, mount: &Mount, path: &[u8]) -> Vec<Group> {
    let as_path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let top = root.join(
        as_path(&mount.point)
            .strip_prefix("/")
            .unwrap_or(Path::new("")),
    );
    // A group outside of what is mounted is not to be seen; the top is the nearest that is.
    let inside = as_path(path);
    let inside = inside
        .strip_prefix(as_path(&mount.group))
        .map(Path::to_path_buf)
        .unwrap_or_default();
    if inside.components().any(|part| part.as_os_str() == "..") {
        return vec![Group::new(version, top)];
    }
    let own = top.join(inside);
    own.ancestors()
        .take_while(|folder| folder.starts_with(&top))
        .map(|folder| Group::new(version, folder.to_path_buf()))
        .collect()
}
