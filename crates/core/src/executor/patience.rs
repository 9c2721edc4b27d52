//! What a worker leaves to the workers of another node for a while, and who is woken for a task there.
//!
//! A worker that has nothing to do at its own node does not take another node's last tasks at once:
//! those that are there take them as soon as they are done with what they are at, mostly, and the
//! memory of such a task is near them. So as long as a node's deques hold no more than its workers
//! take at once and one, others wait, asleep and for no longer than [`PATIENCE`]; what comes to their
//! own node ends the wait, and so does more than that elsewhere. Whoever has waited takes what it finds.
//! For a task that it would only wait for, nobody is woken while another one waits: that one takes a
//! task then and wakes the next, or finds that none is left.
//!
//! Nobody waits on a machine of one node, once the scheduler is closed, or while anything is in lanes:
//! what is urgent there goes first, and what is not must not be passed over for a steal put off.
//!
//! Left out: a wait that follows how long tasks take. Tasks of many milliseconds cross after the wait
//! as they would have before, and what they lose by it does not show.

use super::idle::{Outlook, Sleeper};
use super::scheduler::Scheduler;
use std::time::Duration;

/// How long a worker leaves what is queued at another node to the workers there, at most.
pub const PATIENCE: Duration = Duration::from_micros(200);

impl<T: 'static> Scheduler<T> {
    /// Whether a node's deques hold so little that others leave it to the workers there for a while:
    /// no more than these take at once, and one. A steal would bring that one alone.
    pub(super) fn is_left(&self, node: usize) -> bool {
        let (mut tasks, mut workers) = (0, 0);
        for member in self.members.iter().filter(|member| member.node == node) {
            tasks += member.stealer.len();
            workers += 1;
        }
        tasks <= workers + 1 && !self.is_closed()
    }

    /// What there is for a worker that may go to sleep.
    pub(super) fn outlook(&self, who: usize) -> Outlook {
        if !self.has_work() {
            return Outlook::Nothing;
        }
        if self.nodes.len() == 1 || self.has_lane_tasks() {
            return Outlook::Work;
        }
        let mut outlook = Outlook::Nothing;
        for member in &self.members {
            if member.stealer.is_empty() {
                continue;
            }
            if member.node == self.members[who].node || !self.is_left(member.node) {
                return Outlook::Work;
            }
            outlook = Outlook::Later;
        }
        outlook
    }

    /// Which sleeper is to be woken for what is queued at a node, or at any; by its place among them,
    /// and there is at least one. It is one of the node if there is any, or else the nearest; nobody,
    /// if that one would only wait, and another one does already.
    pub(super) fn choose(&self, node: Option<usize>, sleepers: &[Sleeper]) -> Option<usize> {
        let last = sleepers.len() - 1;
        if self.nodes.len() == 1 {
            return Some(last);
        }
        let Some(node) = node else {
            let nodes = 0..self.nodes.len();
            let mut with_work = nodes.filter(|node| self.has_tasks_at(*node)).peekable();
            // What was there is gone: whoever comes finds that out.
            with_work.peek()?;
            return with_work.find_map(|node| self.choose(Some(node), sleepers));
        };
        let far = |sleeper: &Sleeper| {
            let order = &self.members[sleeper.who].order;
            order
                .iter()
                .position(|it| *it == node)
                .unwrap_or(order.len())
        };
        let (place, distance) = (0..=last)
            .rev()
            .map(|place| (place, far(&sleepers[place])))
            .min_by_key(|(_, distance)| *distance)?;
        let may_wait = distance > 0 && self.nodes[node].is_empty() && self.is_left(node);
        if may_wait && sleepers.iter().any(|sleeper| sleeper.waits) {
            return None;
        }
        Some(place)
    }

    fn has_tasks_at(&self, node: usize) -> bool {
        let mut members = self.members.iter().filter(|member| member.node == node);
        !self.nodes[node].is_empty() || members.any(|member| !member.stealer.is_empty())
    }

    /// Whether anything is in a lane.
    pub(super) fn has_lane_tasks(&self) -> bool {
        !self.nodes.iter().all(|lanes| lanes.is_empty())
    }
}
