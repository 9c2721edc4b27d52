//! The pattern of what a program asks for, and the resource that follows it.

use crate::argument::choice;
use crate::errors::{InvalidArgument, to_py};
use crate::resource::{Resource, with_base};
use moirai_core::resource as core;
use moirai_core::resource::adaptive::{Decision, Effect, Outcome, Rules, Standing, Workload};
use moirai_core::resource::pattern::{ClassPattern, Evidence, Pattern};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::Arc;

/// A dict of named values.
macro_rules! dict {
    ($py:expr, $($name:literal: $value:expr),+ $(,)?) => {{
        let dict = PyDict::new($py);
        $(dict.set_item($name, $value)?;)+
        Ok(dict)
    }};
}

type Dict<'py> = Bound<'py, PyDict>;

fn pattern_dict<'py>(py: Python<'py>, class: ClassPattern) -> PyResult<Dict<'py>> {
    dict!(py,
        "max_bytes": class.max_bytes,
        "requests": class.requests,
        "bytes": class.bytes,
        "threads": class.threads,
        "ended": class.lifetimes.ended,
        "ended_elsewhere": class.lifetimes.ended_elsewhere,
        "spans": class.lifetimes.spans,
        "outlived": class.lifetimes.outlived,
        "open": class.lifetimes.open,
    )
}

fn pattern_dicts<'py>(py: Python<'py>, pattern: &Pattern) -> PyResult<Vec<Dict<'py>>> {
    let classes = py.detach(|| pattern.classes());
    classes
        .into_iter()
        .map(|class| pattern_dict(py, class))
        .collect()
}

/// Notes the pattern of what passes through it on the way to `upstream`.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct PatternAdaptor(Arc<core::pattern::PatternAdaptor>);

#[pymethods]
impl PatternAdaptor {
    #[new]
    fn new(upstream: &Bound<'_, Resource>) -> PyClassInitializer<Self> {
        let core = core::pattern::PatternAdaptor::new(Arc::clone(upstream.get().core()));
        let core = Arc::new(core);
        let base = Resource::above(core.clone(), upstream);
        with_base(PatternAdaptor(core), base)
    }

    /// (bytes rounded up to a multiple of 64, requests) of all requests up to 16 KiB, by bytes.
    fn sizes(&self, py: Python<'_>) -> Vec<(usize, u64)> {
        py.detach(|| self.0.pattern().sizes())
    }

    /// What was noted of each size class.
    fn class_patterns<'py>(&self, py: Python<'py>) -> PyResult<Vec<Dict<'py>>> {
        pattern_dicts(py, self.0.pattern())
    }
}

fn evidence_dict<'py>(py: Python<'py>, evidence: &Evidence) -> PyResult<Dict<'py>> {
    dict!(py,
        "requests": evidence.requests,
        "seconds": evidence.seconds,
        "threads": evidence.threads,
        "short": evidence.short,
        "long": evidence.long,
        "ended_elsewhere": evidence.ended_elsewhere,
        "sampled": evidence.sampled,
        "reused": evidence.reused,
    )
}

fn effect_dict<'py>(py: Python<'py>, effect: Option<Effect>) -> PyResult<Option<Dict<'py>>> {
    let to_dict = |effect: Effect| {
        dict!(py,
            "median_nanoseconds": effect.median_nanoseconds,
            "timed": effect.timed,
            "reused_share": effect.reused_share,
        )
    };
    effect.map(to_dict).transpose()
}

fn decision_dict<'py>(py: Python<'py>, decision: &Decision) -> PyResult<Dict<'py>> {
    dict!(py,
        "time_seconds": decision.at as f64 / 1e9,
        "max_bytes": decision.max_bytes,
        "previous": decision.from.name(),
        "chosen": decision.to.name(),
        "evidence": evidence_dict(py, &decision.evidence)?,
        "before": effect_dict(py, decision.before)?,
        "expected": effect_dict(py, decision.expected)?,
        "observed": effect_dict(py, decision.observed)?,
        "outcome": match decision.outcome {
            Outcome::Switched => "switched",
            Outcome::Counterfactual => "counterfactual",
            Outcome::TakenBack => "taken back",
            Outcome::Avoided => "avoided",
        },
    )
}

fn standing_dict<'py>(py: Python<'py>, standing: &Standing) -> PyResult<Dict<'py>> {
    dict!(py,
        "max_bytes": standing.max_bytes,
        "workload": standing.workload.map(Workload::name),
        "strategy": standing.part.name(),
        "evidence": evidence_dict(py, &standing.evidence)?,
        "effect": effect_dict(py, standing.effect)?,
    )
}

fn positive(name: &str, value: f64, most: f64) -> PyResult<f64> {
    if value > 0.0 && value <= most {
        return Ok(value);
    }
    Err(InvalidArgument::new_err(format!(
        "{name}: must be a number above 0 and up to {most}, got {value}"
    )))
}

fn nanoseconds(name: &str, seconds: f64) -> PyResult<u64> {
    Ok(((positive(name, seconds, 1e6)? * 1e9) as u64).max(1))
}

/// Routes each size class to the part that suits its workload.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct AdaptiveResource {
    core: Arc<core::adaptive::AdaptiveResource>,
    /// The resource for each workload, in the order of the arguments.
    #[pyo3(get)]
    parts: Vec<Py<Resource>>,
    /// Whether it only says what it would do.
    #[pyo3(get)]
    is_counterfactual: bool,
}

#[pymethods]
impl AdaptiveResource {
    #[new]
    #[pyo3(signature = (high_throughput, low_latency, long_running, *, initial, window_seconds,
        long_seconds, long_share, high_rate, hysteresis, confirmations, tolerance, avoid_seconds,
        is_counterfactual))]
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a line that policy draws"
    )]
    fn new(
        high_throughput: &Bound<'_, Resource>,
        low_latency: &Bound<'_, Resource>,
        long_running: &Bound<'_, Resource>,
        initial: &str,
        window_seconds: f64,
        long_seconds: f64,
        long_share: f64,
        high_rate: f64,
        hysteresis: f64,
        confirmations: u32,
        tolerance: f64,
        avoid_seconds: f64,
        is_counterfactual: bool,
    ) -> PyResult<PyClassInitializer<Self>> {
        let initial = choice(
            "initial",
            initial,
            &Workload::ALL.map(|workload| (workload.name(), workload)),
        )?;
        let rules = Rules {
            window_nanoseconds: nanoseconds("window_seconds", window_seconds)?,
            long_nanoseconds: nanoseconds("long_seconds", long_seconds)?,
            long_share: positive("long_share", long_share, 1.0)?,
            high_rate: positive("high_rate", high_rate, 1e12)?,
            hysteresis,
            confirmations,
            tolerance,
            avoid_nanoseconds: nanoseconds("avoid_seconds", avoid_seconds)?,
            is_counterfactual,
        };
        let parts = [high_throughput, low_latency, long_running];
        let cores = parts.map(|part| Arc::clone(part.get().core()));
        let core = core::adaptive::AdaptiveResource::new(cores, initial, rules);
        let core = Arc::new(core.map_err(to_py)?);
        let base = Resource::new(core.clone(), None);
        let parts = parts.map(|part| part.clone().unbind()).into();
        Ok(with_base(
            AdaptiveResource {
                core,
                parts,
                is_counterfactual,
            },
            base,
        ))
    }

    /// (bytes rounded up to a multiple of 64, requests) of all requests up to 16 KiB, by bytes.
    fn sizes(&self, py: Python<'_>) -> Vec<(usize, u64)> {
        py.detach(|| self.core.pattern().sizes())
    }

    /// What was noted of each size class.
    fn class_patterns<'py>(&self, py: Python<'py>) -> PyResult<Vec<Dict<'py>>> {
        pattern_dicts(py, self.core.pattern())
    }

    /// The latest decisions, the oldest first, and how many there were in all.
    fn decisions<'py>(&self, py: Python<'py>) -> PyResult<(Vec<Dict<'py>>, u64)> {
        let (decisions, count) = py.detach(|| self.core.decisions());
        let dicts: PyResult<_> = decisions
            .iter()
            .map(|decision| decision_dict(py, decision))
            .collect();
        Ok((dicts?, count))
    }

    /// What is known of each class now.
    fn standings<'py>(&self, py: Python<'py>) -> PyResult<Vec<Dict<'py>>> {
        let standings = py.detach(|| self.core.standings());
        standings
            .iter()
            .map(|standing| standing_dict(py, standing))
            .collect()
    }
}
