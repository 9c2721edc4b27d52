//! What a process and its children use together, with shared pages counted once.
//!
//! A forked child shares pages with its parent; the sum of their resident sets counts them twice. The
//! proportional set size does not, but costs milliseconds a gigabyte, so it is read for all of them
//! together and at most once a minute; in between, each has its last one and what its resident set
//! grew since. A child that came since counts by its growth alone.
//!
//! Who is there is looked up about once a second, and what each has at each sample: those that fill one
//! limit together would else take the room of the others for free.

use super::kept::{fields, number, words};
use crate::os;
use std::path::{Path, PathBuf};

/// Time between two readings of what each has, for each of them: one takes about 8 µs.
const MEMBER_NANOSECONDS: u64 = 500_000;
/// Time between two readings of proportional set sizes.
const ROUND_NANOSECONDS: u64 = 60_000_000_000;

struct Member {
    process: u64,
    proportional: u64,
    resident_then: u64,
    resident_now: u64,
}

impl Member {
    fn bytes(&self) -> u64 {
        self.proportional + self.resident_now.saturating_sub(self.resident_then)
    }
}

pub(super) struct Family {
    processes: PathBuf,
    /// The number of the eldest, if it is not the process itself.
    eldest: Option<String>,
    /// For one of an eldest's family: what all used when last looked at, and itself of that.
    all: Option<(u64, u64)>,
    own: Option<Member>,
    children: Vec<Member>,
    read_at: Option<u64>,
    seen_at: u64,
}

impl Family {
    pub(super) fn new(processes: PathBuf, eldest: Option<String>) -> Self {
        Family {
            processes,
            eldest,
            all: None,
            own: None,
            children: Vec::new(),
            read_at: None,
            seen_at: 0,
        }
    }

    /// See how much each has that was there at the last look, if that was long enough ago.
    pub(super) fn follow(&mut self, process: &str, now: u64) {
        let pause = MEMBER_NANOSECONDS * self.children.len() as u64;
        if self.children.is_empty() || now.saturating_sub(self.seen_at) < pause {
            return;
        }
        self.seen_at = now;
        let mut children = std::mem::take(&mut self.children);
        children.retain_mut(|child| {
            let resident = self.resident(&child.process.to_string());
            child.resident_now = resident.unwrap_or(0);
            resident.is_some()
        });
        self.children = children;
        if self.all.is_some()
            && let Some(eldest) = &self.eldest
            && let (Some(of_eldest), Some(own)) = (self.resident(eldest), self.resident(process))
        {
            self.all = None;
            let (first, others) = self.bytes(of_eldest);
            self.all = Some((first + others, own));
        }
    }

    /// Look who is there, and how much each has.
    pub(super) fn look(&mut self, process: &str, now: u64) {
        self.seen_at = now;
        self.all = None;
        let Some(eldest) = self.eldest.take() else {
            self.look_below(process, now);
            return;
        };
        // When the eldest is gone, each that is left counts itself and those below it.
        match (self.resident(&eldest), self.resident(process)) {
            (Some(of_eldest), Some(own)) => {
                self.look_below(&eldest, now);
                let (first, others) = self.bytes(of_eldest);
                self.all = Some((first + others, own));
                self.eldest = Some(eldest);
            }
            _ => self.look_below(process, now),
        }
    }

    fn look_below(&mut self, process: &str, now: u64) {
        let mut found = Vec::new();
        // The kernel says in one call that there are none; the files of each thread cost more.
        let is_own = process == "self" && self.processes == Path::new("/proc");
        if !is_own || os::process::has_children() {
            children_of(&self.processes, process, &mut found);
        }
        let seen_before = found.len() == self.children.len()
            && found
                .iter()
                .zip(&self.children)
                .all(|(process, member)| *process == member.process);
        let mut members = std::mem::take(&mut self.children);
        for process in found {
            let Some(resident) = self.resident(&process.to_string()) else {
                continue;
            };
            let known = members
                .iter()
                .position(|member| member.process == process)
                .map(|place| members.swap_remove(place));
            self.children.push(Member {
                resident_now: resident,
                ..known.unwrap_or(Member {
                    process,
                    proportional: 0,
                    resident_then: resident,
                    resident_now: 0,
                })
            });
        }
        if self.children.is_empty() {
            self.own = None;
        }
        let due = self
            .read_at
            .is_none_or(|then| now.saturating_sub(then) >= ROUND_NANOSECONDS);
        // Not while they are being started: the next to come would spoil the shares.
        if due && seen_before && !self.children.is_empty() {
            self.read_at = Some(now);
            self.read_round(process);
        }
    }

    fn read_round(&mut self, process: &str) {
        let read = |name: &str| {
            let text = std::fs::read(self.processes.join(name).join("smaps_rollup")).ok()?;
            Some(fields(&text, [b"Pss:"])[0]? * 1024)
        };
        if let (Some(proportional), Some(resident)) = (read(process), self.resident(process)) {
            self.own = Some(Member {
                process: 0,
                proportional,
                resident_then: resident,
                resident_now: resident,
            });
        }
        for member in &mut self.children {
            if let Some(proportional) = read(&member.process.to_string()) {
                member.proportional = proportional;
                member.resident_then = member.resident_now;
            }
        }
    }

    fn resident(&self, process: &str) -> Option<u64> {
        let text = std::fs::read(self.processes.join(process).join("statm")).ok()?;
        Some(number(words(&text).nth(1)?)? * os::PAGE_BYTES as u64)
    }

    /// Bytes of the process, whose resident set is `resident` now, and those of its children.
    pub(super) fn bytes(&mut self, resident: u64) -> (u64, u64) {
        if let Some((all, own)) = self.all {
            return (resident, all.saturating_sub(own));
        }
        let own = self.own.as_mut().map_or(resident, |own| {
            own.resident_now = resident;
            own.bytes()
        });
        (own, self.children.iter().map(Member::bytes).sum())
    }
}

/// The children of a process and theirs, in the order of their parents.
fn children_of(processes: &Path, process: &str, found: &mut Vec<u64>) {
    let Ok(threads) = std::fs::read_dir(processes.join(process).join("task")) else {
        return;
    };
    for thread in threads.flatten() {
        let text = std::fs::read(thread.path().join("children")).unwrap_or_default();
        for child in words(&text).filter_map(number) {
            // A recycled number could close a circle.
            if !found.contains(&child) {
                found.push(child);
                children_of(processes, &child.to_string(), found);
            }
        }
    }
}
