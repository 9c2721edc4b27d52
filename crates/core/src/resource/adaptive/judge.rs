//! What workload the evidence on a size class speaks of, and what came of acting on it.
//!
//! A verdict takes several windows that agree, and thresholds are further apart on the way out than
//! on the way in, so that a workload on a border does not flap. A switch is held against what was
//! measured just before it, and taken back if it was for the worse.

use super::super::pattern::{CLASS_COUNT, Evidence, class_bytes};
use std::collections::VecDeque;

/// Decisions that are remembered.
const JOURNAL: usize = 256;

/// What a program does with blocks of one size class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Many requests a second, and blocks that die young.
    HighThroughput,
    /// Fewer of the same: each request counts.
    LowLatency,
    /// Blocks that stay.
    LongRunning,
}

impl Workload {
    /// All of them, by index.
    pub const ALL: [Workload; 3] = [
        Workload::HighThroughput,
        Workload::LowLatency,
        Workload::LongRunning,
    ];

    /// The name users know it by.
    pub fn name(self) -> &'static str {
        ["high_throughput", "low_latency", "long_running"][self as usize]
    }
}

/// Where the lines are; whoever makes the resource decides.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Least time that evidence is collected for.
    pub window_nanoseconds: u64,
    /// A block that lives for so long lives long.
    pub long_nanoseconds: u64,
    /// Share of blocks that live long from which a workload is long-running, 0 to 1.
    pub long_share: f64,
    /// Requests a second from which a workload is one of high throughput.
    pub high_rate: f64,
    /// How far past a line the evidence must be, as a share of it.
    pub hysteresis: f64,
    /// Windows in a row that must agree.
    pub confirmations: u32,
    /// How many times as long calls may take after a switch before it is taken back.
    pub tolerance: f64,
    /// How long a part is avoided for a class after that.
    pub avoid_nanoseconds: u64,
    /// Say what would be done, and do nothing.
    pub is_counterfactual: bool,
}

/// Least difference, in nanoseconds, that takes a switch back: what a clock can tell apart.
const NOTICEABLE: u64 = 50;
/// Fewest timed calls that say anything of an effect.
const TIMED_WANTED: usize = 16;

/// What requests of a class cost, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effect {
    /// Median time of a request and its free together.
    pub median_nanoseconds: u64,
    /// Requests it is the median of.
    pub timed: usize,
    /// Share of requests that got memory used before.
    pub reused_share: f64,
}

impl Effect {
    fn of(evidence: &Evidence) -> Option<Self> {
        (evidence.timed >= TIMED_WANTED).then(|| Effect {
            median_nanoseconds: evidence.median_nanoseconds,
            timed: evidence.timed,
            reused_share: evidence.reused as f64 / evidence.sampled.max(1) as f64,
        })
    }

    fn is_worse_than(&self, before: &Effect, tolerance: f64) -> bool {
        let (now, then) = (self.median_nanoseconds, before.median_nanoseconds);
        now > then + NOTICEABLE
            && now as f64 > then as f64 * tolerance
            && self.reused_share <= before.reused_share
    }
}

/// What was done about a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The class was switched.
    Switched,
    /// The class would have been switched.
    Counterfactual,
    /// The class was switched, and switched back: calls took longer.
    TakenBack,
    /// The class was left alone: the switch was for the worse the last time.
    Avoided,
}

/// A verdict that led to something.
#[derive(Clone, Debug)]
pub struct Decision {
    /// When, in nanoseconds of the monotonic clock.
    pub at: u64,
    /// Largest size of the class in bytes.
    pub max_bytes: usize,
    /// Which part served the class, and which does (or would).
    pub from: Workload,
    /// As said.
    pub to: Workload,
    /// The last window before the decision.
    pub evidence: Evidence,
    /// What requests cost in that window.
    pub before: Option<Effect>,
    /// What they cost when the new part last served this class; `None` if it never did.
    pub expected: Option<Effect>,
    /// What they cost in the first window after the switch.
    pub observed: Option<Effect>,
    /// What was done.
    pub outcome: Outcome,
}

/// What is known of a class now.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Largest size of the class in bytes.
    pub max_bytes: usize,
    /// What the program does with it; `None` before enough windows agreed.
    pub workload: Option<Workload>,
    /// The part that serves it.
    pub part: Workload,
    /// The latest window.
    pub evidence: Evidence,
    /// What requests cost in it.
    pub effect: Option<Effect>,
}

#[derive(Clone)]
struct Class {
    /// The part that was decided for; it serves unless decisions are counterfactual.
    part: Workload,
    workload: Option<Workload>,
    /// What the latest windows say, and how many in a row.
    leaning: Option<(Workload, u32)>,
    /// What requests cost when each part last served them.
    effects: [Option<Effect>; 3],
    /// Until when each part is avoided, since a switch to it was taken back.
    avoided_until: [u64; 3],
    /// The number of the decision whose effect is awaited.
    awaited: Option<u64>,
    latest: Option<Evidence>,
}

pub(super) struct Judge {
    rules: Rules,
    initial: Workload,
    classes: Vec<Class>,
    journal: VecDeque<Decision>,
    /// Decisions ever made; the last of the journal has the number before.
    decided: u64,
}

impl Judge {
    pub(super) fn new(rules: Rules, initial: Workload) -> Self {
        let class = Class {
            part: initial,
            workload: None,
            leaning: None,
            effects: [None; 3],
            avoided_until: [0; 3],
            awaited: None,
            latest: None,
        };
        Judge {
            rules,
            initial,
            classes: vec![class; CLASS_COUNT],
            journal: VecDeque::new(),
            decided: 0,
        }
    }

    /// Take evidence in; the part that the class is to be switched to, if it is.
    pub(super) fn hear(&mut self, class: usize, evidence: Evidence, now: u64) -> Option<Workload> {
        let effect = Effect::of(&evidence);
        let serving = self.serving(&self.classes[class]);
        if effect.is_some() {
            self.classes[class].effects[serving as usize] = effect;
        }
        self.classes[class].latest = Some(evidence.clone());
        if let Some(back) = self.hold_against_before(class, effect, now) {
            return Some(back);
        }
        let verdict = self.verdict(class, &evidence)?;
        self.decide(class, verdict, evidence, effect, now)
    }

    fn serving(&self, class: &Class) -> Workload {
        if self.rules.is_counterfactual {
            self.initial
        } else {
            class.part
        }
    }

    /// The effect of the last switch is in: the part to go back to, if it was for the worse.
    fn hold_against_before(
        &mut self,
        class: usize,
        effect: Option<Effect>,
        now: u64,
    ) -> Option<Workload> {
        let effect = effect?;
        let number = self.classes[class].awaited.take()?;
        let rules = self.rules;
        let decision = self.decision(number)?;
        decision.observed = Some(effect);
        let before = decision.before?;
        if !effect.is_worse_than(&before, rules.tolerance) {
            return None;
        }
        decision.outcome = Outcome::TakenBack;
        let (from, to) = (decision.from, decision.to);
        let class = &mut self.classes[class];
        class.avoided_until[to as usize] = now + rules.avoid_nanoseconds;
        class.part = from;
        Some(from)
    }

    fn decision(&mut self, number: u64) -> Option<&mut Decision> {
        let first = self.decided - self.journal.len() as u64;
        let index = number.checked_sub(first)?;
        self.journal.get_mut(index as usize)
    }

    /// The workload of a class, if windows agree on one that it was not known to have.
    fn verdict(&mut self, class: usize, evidence: &Evidence) -> Option<Workload> {
        let rules = self.rules;
        let class = &mut self.classes[class];
        let seen = classify(class.workload, evidence, &rules);
        if class.workload == Some(seen) {
            class.leaning = None;
            return None;
        }
        let count = match class.leaning {
            Some((leaning, count)) if leaning == seen => count + 1,
            _ => 1,
        };
        class.leaning = Some((seen, count));
        if count < rules.confirmations {
            return None;
        }
        class.leaning = None;
        class.workload = Some(seen);
        Some(seen)
    }

    fn decide(
        &mut self,
        index: usize,
        to: Workload,
        evidence: Evidence,
        before: Option<Effect>,
        now: u64,
    ) -> Option<Workload> {
        let class = &self.classes[index];
        if class.part == to {
            return None;
        }
        let known = class.effects[to as usize];
        let outcome = if self.rules.is_counterfactual {
            Outcome::Counterfactual
        } else if now < class.avoided_until[to as usize] {
            Outcome::Avoided
        } else {
            Outcome::Switched
        };
        self.journal.push_back(Decision {
            at: now,
            max_bytes: class_bytes(index),
            from: class.part,
            to,
            evidence,
            before,
            expected: known,
            observed: None,
            outcome,
        });
        if self.journal.len() > JOURNAL {
            self.journal.pop_front();
        }
        self.decided += 1;
        let class = &mut self.classes[index];
        if outcome != Outcome::Avoided {
            class.part = to;
        }
        if outcome != Outcome::Switched {
            return None;
        }
        class.awaited = Some(self.decided - 1);
        Some(to)
    }

    pub(super) fn decisions(&self) -> (Vec<Decision>, u64) {
        (self.journal.iter().cloned().collect(), self.decided)
    }

    pub(super) fn standings(&self) -> Vec<Standing> {
        let known = |(index, class): (usize, &Class)| {
            class.latest.clone().map(|evidence| Standing {
                max_bytes: class_bytes(index),
                workload: class.workload,
                part: self.serving(class),
                effect: class.effects[self.serving(class) as usize],
                evidence,
            })
        };
        self.classes.iter().enumerate().filter_map(known).collect()
    }
}

/// What evidence speaks of, for a class that was known as `current`.
fn classify(current: Option<Workload>, evidence: &Evidence, rules: &Rules) -> Workload {
    let line = |workload: Workload, line: f64| {
        if current == Some(workload) {
            line * (1.0 - rules.hysteresis)
        } else {
            line * (1.0 + rules.hysteresis)
        }
    };
    let outcomes = (evidence.short + evidence.long).max(1);
    let long_share = evidence.long as f64 / outcomes as f64;
    // A share beyond 1 is never reached: the line in is 1 at most.
    if long_share >= line(Workload::LongRunning, rules.long_share).min(1.0) {
        return Workload::LongRunning;
    }
    let rate = evidence.requests as f64 / evidence.seconds.max(1e-9);
    if rate >= line(Workload::HighThroughput, rules.high_rate) {
        return Workload::HighThroughput;
    }
    Workload::LowLatency
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLASS: usize = 3;

    fn rules() -> Rules {
        Rules {
            window_nanoseconds: 10,
            long_nanoseconds: 100,
            long_share: 0.5,
            high_rate: 1000.0,
            hysteresis: 0.2,
            confirmations: 2,
            tolerance: 1.25,
            avoid_nanoseconds: 1000,
            is_counterfactual: false,
        }
    }

    /// A window of a second.
    fn seen(requests: u64, long_percent: u64, median_nanoseconds: u64) -> Evidence {
        Evidence {
            requests,
            seconds: 1.0,
            threads: 1,
            short: 100 - long_percent,
            long: long_percent,
            sampled: 100,
            median_nanoseconds,
            timed: 100,
            ..Evidence::default()
        }
    }

    fn judge() -> Judge {
        Judge::new(rules(), Workload::LowLatency)
    }

    #[test]
    fn windows_that_agree_switch_a_class_and_no_other() {
        let mut judge = judge();
        assert_eq!(judge.hear(CLASS, seen(5000, 0, 100), 1), None);
        let verdict = judge.hear(CLASS, seen(5000, 0, 100), 2);
        assert_eq!(verdict, Some(Workload::HighThroughput));
        let standings = judge.standings();
        assert_eq!(standings.len(), 1);
        assert_eq!(standings[0].part, Workload::HighThroughput);
        let (decisions, count) = judge.decisions();
        assert_eq!((decisions.len(), count), (1, 1));
        assert_eq!(decisions[0].max_bytes, class_bytes(CLASS));
        assert_eq!((decisions[0].expected, decisions[0].observed), (None, None));
        assert_eq!(decisions[0].outcome, Outcome::Switched);
    }

    #[test]
    fn windows_that_disagree_switch_nothing() {
        let mut judge = judge();
        for turn in 0..20 {
            let rate = if turn % 2 == 0 { 5000 } else { 500 };
            let long = if turn % 4 == 1 { 100 } else { 0 };
            assert_eq!(judge.hear(CLASS, seen(rate, long, 100), turn), None);
        }
        assert_eq!(judge.decisions().1, 0);
    }

    #[test]
    fn a_workload_on_a_line_stays_what_it_is() {
        let mut judge = judge();
        for (rate, expected) in [
            (1100, Workload::LowLatency),
            (1300, Workload::HighThroughput),
            (900, Workload::HighThroughput),
            (700, Workload::LowLatency),
            (1100, Workload::LowLatency),
        ] {
            for turn in 0..3 {
                judge.hear(CLASS, seen(rate, 0, 100), turn);
            }
            assert_eq!(judge.standings()[0].part, expected, "at {rate}");
        }
    }

    #[test]
    fn blocks_that_stay_come_before_any_rate() {
        let mut judge = judge();
        judge.hear(CLASS, seen(1_000_000, 100, 100), 1);
        let verdict = judge.hear(CLASS, seen(1_000_000, 100, 100), 2);
        assert_eq!(verdict, Some(Workload::LongRunning));
    }

    #[test]
    fn a_switch_for_the_worse_is_taken_back_and_avoided_for_a_while() {
        let mut judge = judge();
        judge.hear(CLASS, seen(5000, 0, 100), 1);
        assert!(judge.hear(CLASS, seen(5000, 0, 100), 2).is_some());
        let back = judge.hear(CLASS, seen(5000, 0, 400), 3);
        assert_eq!(back, Some(Workload::LowLatency));
        let decision = judge.decisions().0.pop().unwrap();
        assert_eq!(decision.outcome, Outcome::TakenBack);
        assert_eq!(decision.observed.unwrap().median_nanoseconds, 400);
        // It becomes another workload and this one again: avoided, with what is expected said.
        for turn in [4, 5] {
            judge.hear(CLASS, seen(5, 0, 100), turn);
        }
        for turn in [6, 7] {
            assert_eq!(judge.hear(CLASS, seen(5000, 0, 100), turn), None);
        }
        let decision = judge.decisions().0.pop().unwrap();
        assert_eq!(decision.outcome, Outcome::Avoided);
        assert_eq!(decision.expected.unwrap().median_nanoseconds, 400);
        // After the while it gets another chance.
        for turn in [2004, 2005] {
            judge.hear(CLASS, seen(5, 0, 100), turn);
        }
        judge.hear(CLASS, seen(5000, 0, 100), 2006);
        let verdict = judge.hear(CLASS, seen(5000, 0, 100), 2007);
        assert_eq!(verdict, Some(Workload::HighThroughput));
        assert_eq!(
            judge.hear(CLASS, seen(5000, 0, 110), 2008),
            None,
            "no worse"
        );
    }

    #[test]
    fn counterfactual_decisions_are_noted_and_switch_nothing() {
        let mut rules = rules();
        rules.is_counterfactual = true;
        let mut judge = Judge::new(rules, Workload::LowLatency);
        for (rate, long) in [(5000, 0), (5, 0), (5, 100)] {
            for turn in 0..3 {
                assert_eq!(judge.hear(CLASS, seen(rate, long, 100), turn), None);
            }
        }
        let (decisions, _) = judge.decisions();
        let chosen: Vec<_> = decisions.iter().map(|decision| decision.to).collect();
        let all = [
            Workload::HighThroughput,
            Workload::LowLatency,
            Workload::LongRunning,
        ];
        assert_eq!(chosen, all);
        assert!(
            decisions
                .iter()
                .all(|d| d.outcome == Outcome::Counterfactual)
        );
        assert_eq!(judge.standings()[0].part, Workload::LowLatency);
    }

    #[test]
    fn the_journal_is_bounded_and_its_numbers_hold() {
        let mut judge = judge();
        for turn in 0..2000 {
            let rate = if turn / 3 % 2 == 0 { 5000 } else { 5 };
            judge.hear(CLASS, seen(rate, 0, 100), turn);
        }
        let (decisions, count) = judge.decisions();
        assert_eq!(decisions.len(), JOURNAL);
        assert!(count > JOURNAL as u64);
        let last = decisions.len() - 1;
        assert!(decisions[..last].iter().all(|d| d.observed.is_some()));
    }
}
