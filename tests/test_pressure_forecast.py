"""Forecasts in virtual time: on recordings of real programs, and on what no recording shows."""

import importlib
import json
import math
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moirai.errors import InvalidArgument
from moirai.pressure import Forecaster, TimeRange
from moirai.pressure.features import CROSSING_NAMES, HORIZONS, NAMES, crossing_features, describe
from moirai.pressure.history import WINDOW_BINS, History
from moirai.pressure.model import Ensemble
from moirai.pressure.record import Record
from moirai.pressure.straight import straight_odds
from moirai.pressure.trend import Trend

ROOT = Path(__file__).parents[1]
TRACES = ROOT / "tests" / "fixtures" / "pressure"
MIB = 1 << 20
LIMIT = 1000.0 * MIB


def recording(name: str) -> np.ndarray:
    (path,) = TRACES.glob(f"*-{name}-*.csv")
    rows = np.loadtxt(path, delimiter=",", skiprows=1)
    rows[:, 0] *= 10.0  # one recorded second stands for ten
    return rows


def fed(rows, forecaster=None) -> Forecaster:
    forecaster = forecaster or Forecaster()
    for seconds, used, limit in rows:
        forecaster.observe(seconds, used, limit)
    return forecaster


def ramp(seconds: int, *, start: float = 0.3, per_second: float = 0.002, limit=LIMIT):
    return [(float(t), LIMIT * (start + per_second * t), limit) for t in range(seconds)]


def assert_sound(forecast) -> None:
    """What holds for every forecast, whatever was observed."""
    for horizon in HORIZONS:
        each = forecast.at(horizon)
        assert 0.0 <= each.low_bytes <= each.value_bytes <= each.high_bytes
        assert math.isfinite(each.value_bytes)
        assert 0.0 <= each.confidence <= 1.0
    odds = [forecast.p_critical[horizon] for horizon in HORIZONS]
    assert all(0.0 <= p <= 1.0 for p in odds)
    assert odds == sorted(odds)
    assert forecast.trend in ("decreasing", "stable", "increasing", "critical")
    times = forecast.time_to_critical
    assert 0.0 <= times.low_seconds <= times.middle_seconds <= times.high_seconds


# === what a forecast says =======================================================================


def test_a_leak_is_forecast_to_go_on():
    forecast = fed(ramp(200)).forecast()

    assert_sound(forecast)
    for horizon in HORIZONS:
        assert forecast.at(horizon).value_bytes > forecast.used_bytes
        assert forecast.at(horizon).low_bytes <= LIMIT * (0.7 + 0.002 * horizon)
    assert forecast.at(120).value_bytes > forecast.at(30).value_bytes


def test_constant_memory_stays_and_is_no_danger():
    forecast = fed([(float(t), 0.5 * LIMIT, LIMIT) for t in range(300)]).forecast()

    assert_sound(forecast)
    assert forecast.trend == "stable"
    assert forecast.at(60).value_bytes == pytest.approx(0.5 * LIMIT, rel=0.02)
    assert forecast.p_critical[60] < 0.15
    assert not forecast.is_alarm


def test_the_odds_are_certain_once_the_line_is_reached():
    forecast = fed([*ramp(200), (200.0, 0.91 * LIMIT, LIMIT)]).forecast()

    assert set(forecast.p_critical.values()) == {1.0}
    assert forecast.time_to_critical == TimeRange(0.0, 0.0, 0.0)


def test_a_lower_limit_raises_the_odds_at_once():
    forecaster = fed(ramp(200))
    before = forecaster.forecast().p_critical[60]

    forecaster.observe(200.0, 0.7 * LIMIT, 0.8 * LIMIT)

    assert forecaster.forecast().limit_bytes == 0.8 * LIMIT
    assert forecaster.forecast().p_critical[60] > before


@pytest.mark.parametrize("limit", [None, 0, math.inf, math.nan])
def test_without_a_limit_there_is_nothing_to_reach(limit):
    forecast = fed([(t, used, limit) for t, used, _ in ramp(300)]).forecast()

    assert_sound(forecast)
    assert forecast.limit_bytes is None
    assert set(forecast.p_critical.values()) == {0.0}
    assert forecast.time_to_critical.low_seconds == math.inf
    assert forecast.at(60).value_bytes > forecast.used_bytes


def test_between_the_horizons_forecasts_are_between():
    forecast = fed(ramp(200)).forecast()

    assert forecast.at(45).value_bytes == pytest.approx(
        (forecast.at(30).value_bytes + forecast.at(60).value_bytes) / 2
    )
    now_to_first = forecast.at(15)
    assert forecast.used_bytes <= now_to_first.value_bytes <= forecast.at(30).value_bytes


@pytest.mark.parametrize("horizon", [0, -1, 121, math.nan])
def test_a_horizon_out_of_range_is_refused(horizon):
    forecast = fed(ramp(10)).forecast()
    with pytest.raises(InvalidArgument, match=r"horizon_seconds: must be above 0 and at most 120"):
        forecast.at(horizon)


def test_forecasts_do_not_depend_on_the_unit_of_bytes():
    rows = recording("batch_sawtooth_leak")[:100]
    once = fed(rows).forecast()
    scaled = fed([(t, used * 1024, limit * 1024) for t, used, limit in rows]).forecast()

    assert scaled.p_critical == pytest.approx(once.p_critical)
    assert scaled.at(60).value_bytes == pytest.approx(1024 * once.at(60).value_bytes)
    assert scaled.trend == once.trend


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("begin", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("percent", [0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85, 1.0, 1.3, 2.0])
def test_a_straight_climb_is_foreseen(percent, begin, noise):
    """Likelier than not from 45 s before the line on, once 30 s of it were seen; ever more so."""
    speed = percent / 100
    count = int((0.9 - begin) / speed)
    random = np.random.default_rng(5)
    forecaster, odds = Forecaster(), []
    for second in range(count):
        used = begin + speed * (second + noise * random.normal())
        forecaster.observe(float(second), used * LIMIT, LIMIT)
        left = (0.9 - begin) / speed - second
        if second >= 40 and 45 >= left > 2:
            odds.append(forecaster.forecast().p_critical[60])
        elif second >= 40 and left > 180 and second % 10 == 0:
            assert forecaster.forecast().p_critical[60] < 0.5

    assert not odds or min(odds) >= 0.5
    # Trees answer in steps; what was foreseen is not taken back.
    highest = np.maximum.accumulate(np.array([0.0, *odds]))
    assert (highest[1:] - odds < 0.2).all()


def test_a_climb_that_stopped_is_no_longer_foreseen():
    stopped = [*ramp(160, per_second=0.003), *((160.0 + t, 0.78 * LIMIT, LIMIT) for t in range(60))]
    climbing = fed(stopped[:160]).forecast()

    assert climbing.p_critical[60] > 0.5 > fed(stopped).forecast().p_critical[60]


def test_a_straight_climb_counts_only_where_nothing_fell_before():
    line = np.linspace(0.3, 0.7, 100)

    def odds(series, gap):
        rows, scale = describe(np.asarray(series))
        return straight_odds(rows, gap / scale)

    assert odds(line, 0.1)[1] > 0.5
    assert odds(line, 5.0).max() < 0.01
    assert odds(line[:25], 0.01).max() == 0.0  # too young
    assert odds([*line, *line], 0.1).max() == 0.0  # fell
    assert odds(line[::-1], 0.1).max() == 0.0  # falls
    assert odds([*line, *[line[-1]] * 15], 0.1).max() == 0.0  # stopped
    by_gap = [odds(line, gap)[1] for gap in np.linspace(0.01, 2.0, 50)]
    assert by_gap == sorted(by_gap, reverse=True)


# === what comes in ==============================================================================


def test_before_the_first_observation_nothing_is_known():
    forecast = Forecaster().forecast()

    assert_sound(forecast)
    assert forecast.confidence == 0.0
    assert forecast.at(60).high_bytes == math.inf
    assert forecast.at(45).high_bytes == math.inf
    assert math.isnan(forecast.time_seconds)


def test_one_observation_gives_a_sound_forecast():
    forecast = fed([(5.0, 100.0 * MIB, LIMIT)]).forecast()

    assert_sound(forecast)
    assert forecast.used_bytes == 100.0 * MIB


@pytest.mark.parametrize(
    ("time", "used"), [(math.nan, 1.0), (math.inf, 1.0), (1000.0, math.nan), (1000.0, math.inf)]
)
def test_what_is_not_finite_is_counted_and_ignored(time, used):
    forecaster = fed(ramp(100))
    before = forecaster.forecast()

    forecaster.observe(time, used, LIMIT)

    assert forecaster.forecast() == before
    assert forecaster.ignored_count == 1


def test_negative_numbers_are_refused():
    forecaster = Forecaster()
    with pytest.raises(InvalidArgument, match=r"used_bytes: must be at least 0, got -1"):
        forecaster.observe(0.0, -1, LIMIT)
    with pytest.raises(InvalidArgument, match=r"limit_bytes: must be at least 0 or None, got -5"):
        forecaster.observe(0.0, 1, -5)
    with pytest.raises(InvalidArgument, match=r"trend_unit_seconds: must be finite and above 0"):
        Forecaster(trend_unit_seconds=0)


def test_a_clock_that_goes_back_starts_afresh():
    forecaster = fed(ramp(200))

    forecaster.observe(3.0, 100.0 * MIB, LIMIT)

    fresh = fed([(3.0, 100.0 * MIB, LIMIT)])
    assert forecaster.forecast() == fresh.forecast()


def test_a_long_gap_starts_afresh_and_a_short_one_is_bridged():
    bridged = fed([row for row in ramp(200) if not 100 < row[0] < 110])
    assert bridged.forecast().at(60) == fed(ramp(200)).forecast().at(60)

    late = 200.0 + 2 * WINDOW_BINS
    restarted = fed([*ramp(200), (late, 100.0 * MIB, LIMIT)])
    assert restarted.forecast() == fed([(late, 100.0 * MIB, LIMIT)]).forecast()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.floats(-1e3, 1e6), st.just(math.nan)),
            st.one_of(st.floats(0.0, 1e15), st.just(math.nan), st.just(0.0)),
            st.one_of(st.none(), st.floats(0.0, 1e15), st.just(math.inf)),
        ),
        max_size=40,
    )
)
def test_every_forecast_is_sound_whatever_is_observed(rows):
    forecaster = Forecaster()
    for row in rows:
        forecaster.observe(*row)
        assert_sound(forecaster.forecast())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 40.0), st.floats(0.0, 1e9)), min_size=1, max_size=80))
def test_forecasts_are_sound_at_irregular_times(steps):
    forecaster, now = Forecaster(), 0.0
    for step, used in steps:
        now += step
        forecaster.observe(now, used, 1e9)
    assert_sound(forecaster.forecast())


def test_memory_is_bounded():
    forecaster = fed((float(t), 1e6 * (t % 97), 1e9) for t in range(3000))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        fed(((float(t), 1e6 * (t % 97), 1e9) for t in range(3000, 9000)), forecaster)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000


def test_threads_may_share_a_forecaster():
    forecaster = Forecaster()
    failures = []

    def work(offset: int) -> None:
        try:
            for index in range(300):
                forecaster.observe(index + offset / 8, 1e6 * index, 1e9)
                assert_sound(forecaster.forecast())
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# === recordings =================================================================================


def test_a_leak_of_a_real_program_raises_an_alarm_before_it_crosses():
    score = fed(recording("leaky_loop")).score()

    assert score.crossing_count == 1
    assert score.true_alarm_count == 1
    assert score.missed_count == 0
    assert score.median_lead_seconds >= 30
    assert score.horizons[60].skill > 0.3


def test_a_sawtooth_of_a_real_program_raises_none():
    score = fed(recording("gc_sawtooth")).score()

    assert (score.alarm_count, score.crossing_count) == (0, 0)
    assert score.horizons[30].coverage > 0.7


# === the parts ==================================================================================


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 100)), min_size=1, max_size=100))
def test_history_is_a_plain_interpolation(steps):
    history, time, points = History(), 0, {}
    for step, value in steps:
        time += step
        history.add(float(time), value)
        points[time] = value

    times = sorted(points)
    grid = np.arange(times[0], times[-1] + 1)[-WINDOW_BINS:]
    expected = np.interp(grid, times, [points[t] for t in times])
    np.testing.assert_allclose(history.window(), expected, atol=1e-9)


def test_a_bin_holds_the_last_value_seen_in_it():
    history = History()
    for time, value in ((0.0, 1.0), (0.4, 2.0), (1.1, 3.0), (0.9, 4.0), (2.0, 5.0)):
        history.add(time, value)
    assert history.window().tolist() == [2.0, 4.0, 5.0]


def test_features_of_a_line_are_its_closed_form():
    rows, scale = describe(np.arange(1.0, 201.0))

    assert scale == 200.0
    columns = {name: rows[:, index] for index, name in enumerate(NAMES)}
    for window in (5, 10, 20, 40, 80, 160):
        np.testing.assert_allclose(columns[f"trend_{window}"], np.array(HORIZONS) / 200.0)
        np.testing.assert_allclose(columns[f"above_min_{window}"], (window - 1) / 200.0)
        np.testing.assert_allclose(columns[f"rms_{window}"], 0.0, atol=1e-6)
    np.testing.assert_allclose(columns["change"], np.array(HORIZONS) / 200.0)
    np.testing.assert_allclose(columns["similar"], np.array(HORIZONS) / 200.0)
    assert crossing_features(rows, 0.5).shape == (3, len(CROSSING_NAMES))


def test_every_feature_of_a_single_bin_is_finite():
    rows, _ = describe(np.array([7.0]))
    assert np.isfinite(rows).all()
    assert rows.shape == (len(HORIZONS), len(NAMES))


@pytest.mark.parametrize(("period", "fall_bins"), [(40, 1), (50, 6)])
def test_a_sawtooth_goes_on_as_its_cycles_before(period, fall_bins):
    rise = np.linspace(0.2, 1.0, period - fall_bins, endpoint=False)
    cycle = np.concatenate([rise, np.linspace(1.0, 0.2, fall_bins, endpoint=False)])
    series = np.tile(cycle, 12)
    end = 5 * period + period // 4
    rows, scale = describe(series[max(0, end - WINDOW_BINS) : end])

    columns = {name: rows[:, index] for index, name in enumerate(NAMES)}
    then = np.array([series[end - 1 + horizon] for horizon in HORIZONS])
    assert columns["period"] == pytest.approx(period)
    assert columns["cycle_change"] * scale == pytest.approx(then - series[end - 1], abs=0.01)
    assert columns["height"] == pytest.approx((series[end - 1] - 0.2) / 0.8, abs=0.05)
    assert np.diff(columns["cycles_ahead"]) == pytest.approx([30 / period, 60 / period])


def test_quantiles_are_those_of_the_window():
    rows, _ = describe(np.arange(1.0, 101.0))
    columns = {name: rows[0, index] for index, name in enumerate(NAMES)}
    assert columns["rank"] == pytest.approx(0.99)
    assert columns["quantile_0.5"] == pytest.approx(-0.5)
    assert columns["recent_quantile_0.1"] == pytest.approx(-0.54)
    assert columns["falls"] == 0


def test_trees_answer_as_written():
    tree = [[0, 1], [10.0, 20.0], [1.0, 2.0, 3.0, 4.0]]
    ensemble = Ensemble([{"base": 0.5, "trees": [tree]}, {"base": 0.0, "trees": [tree, tree]}])

    found = ensemble.predict(np.array([[0.0, 0.0], [0.0, 21.0], [11.0, 0.0], [11.0, 21.0]]))

    assert found[:, 0].tolist() == [1.5, 2.5, 3.5, 4.5]
    assert found[:, 1].tolist() == [2.0, 4.0, 6.0, 8.0]


def trend_of(*percents: float, unit: float = 1.0) -> list[str]:
    """Classes after each of some rates, each kept for a minute."""
    trend, time, used = Trend(unit), 0.0, 1e6
    trend.observe(time, used, 100.0)
    found = []
    for percent in percents:
        for _ in range(120):
            time += 1.0
            used += percent
            trend.observe(time, used, 100.0)
        found.append(trend.kind)
    return found


def test_trend_classes_have_their_thresholds():
    assert trend_of(-1.0, 0.0, 1.0, 3.0) == ["decreasing", "stable", "increasing", "critical"]


def test_a_trend_near_a_threshold_keeps_its_class():
    assert trend_of(0.55, 0.7, 0.45, 0.3) == ["stable", "increasing", "increasing", "stable"]
    assert trend_of(2.5, 1.8, 1.5) == ["critical", "critical", "increasing"]


def test_trend_classes_follow_their_unit():
    assert trend_of(0.05, unit=1.0) == ["stable"]
    assert trend_of(0.05, unit=60.0) == ["critical"]


def test_the_record_counts_what_came_of_each_alarm():
    record = Record()
    record.alarm(0.0, True)
    record.observe(50.0, 95.0, 90.0)  # true, 50 s ahead
    record.alarm(60.0, False)
    record.observe(60.0, 10.0, 90.0)
    record.observe(100.0, 95.0, 90.0)  # missed
    record.observe(110.0, 10.0, 90.0)
    record.alarm(120.0, True)
    record.alarm(130.0, False)
    record.observe(300.0, 10.0, 90.0)  # false
    record.alarm(310.0, True)
    record.observe(500.0, 10.0, 90.0)  # lasts: open

    score = record.score()

    assert (score.alarm_count, score.true_alarm_count, score.false_alarm_count) == (3, 1, 1)
    assert (score.open_alarm_count, score.crossing_count, score.missed_count) == (1, 2, 1)
    assert score.lead_seconds == (50.0,)
    json.dumps(score.to_dict())


def test_the_record_scores_a_forecast_when_its_time_comes():
    record = Record()
    record.promise(0.0, 30, value=110.0, low=90.0, high=120.0, unchanged=80.0)
    record.promise(10.0, 30, value=100.0, low=90.0, high=99.0, unchanged=100.0)
    record.observe(29.9, 1.0, None)
    assert record.score().horizons[30].coverage is None

    record.observe(30.0, 100.0, None)
    record.observe(40.0, 100.0, None)

    score = record.score().horizons[30]
    assert (score.count, score.inside_count) == (2, 1)
    assert score.skill == pytest.approx(0.5)


def test_alarms_add_up_on_every_recording():
    for path in TRACES.glob("*.csv"):
        rows = np.loadtxt(path, delimiter=",", skiprows=1)
        score = fed((t * 10, used, limit) for t, used, limit in rows).score()
        settled = score.true_alarm_count + score.false_alarm_count
        assert score.alarm_count == settled + score.open_alarm_count
        assert score.crossing_count == score.true_alarm_count + score.missed_count


# === training ===================================================================================


@pytest.fixture(scope="module")
def training():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("train_forecaster")
    sys.path.remove(str(ROOT / "scripts"))


def test_boosting_learns_what_two_columns_say(training):
    random = np.random.default_rng(1)
    rows = random.random((4000, 5))
    target = np.where(rows[:, 1] > 0.5, 2.0, 0.0) + np.where(rows[:, 3] > 0.3, 1.0, 0.0)
    made = training.fit(rows, target, np.ones(4000), training.MIDDLE)

    found = Ensemble([made]).predict(rows)[:, 0]

    assert np.abs(found - target).mean() < 0.1


def test_folds_never_split_a_program(training):
    traces = training.read_traces(TRACES)
    doubled = [*traces, *traces]
    folds = training.program_folds(doubled, 2)
    assert folds[: len(traces)].tolist() == folds[len(traces) :].tolist()
    assert set(folds.tolist()) == {0, 1}


def test_recordings_are_also_learnt_from_at_other_speeds(training):
    traces = training.read_traces(TRACES)
    shown = training.with_other_speeds(traces)
    assert shown[: len(traces)] == traces
    assert len(shown) == len(traces) * (1 + len(training.SPEEDS))
    copies = shown[len(traces) :: len(traces)]
    for speed, copy in zip(training.SPEEDS, copies, strict=True):
        assert copy.program == traces[0].program
        assert copy.weight < traces[0].weight
        assert len(copy.used) == pytest.approx(speed * len(traces[0].used), abs=2)
        half = len(traces[0].used) // 2
        assert copy.used[round(half * speed)] == pytest.approx(traces[0].used[half], abs=0.05)


def test_ramps_are_learnt_from_and_never_judged(training):
    traces = training.read_traces(TRACES)
    shown = training.lessons(traces)
    ramps = [trace for trace in shown if trace.program == training.RAMP]
    assert len(ramps) == training.RAMP_COUNT
    assert [trace.name for trace in ramps] == [trace.name for trace in training.ramps()]

    folds = training.program_folds(shown, 2)
    assert folds[-len(ramps) :].tolist() == [-1] * len(ramps)
    assert folds[: len(traces)].tolist() == training.program_folds(traces, 2).tolist()

    table = training.describe_traces(ramps[:3], 8)
    assert len(training.find_crossings(table, ramps[:3]).label) == 0
    share = np.mean([trace.used.max() < 0.9 for trace in ramps])
    assert 0.05 < share < training.RAMPS_THAT_STOP + 0.01


def test_odds_are_sharpened_towards_what_came(training):
    random = np.random.default_rng(2)
    logits = random.normal(0.0, 2.0, 20_000)
    label = (random.random(20_000) < 1 / (1 + np.exp(-1.5 * logits))).astype(float)
    assert training._sharpness(logits, label) == pytest.approx(1.5, abs=0.1)


def test_the_shipped_constants_fit_the_features():
    path = ROOT / "python" / "moirai" / "pressure" / "forecaster.json"
    constants = json.loads(path.read_text())
    assert constants["features"] == list(NAMES)
    assert constants["made_by"] == "scripts/train_forecaster.py"
    for ensemble in constants["value"].values():
        assert max(max(tree[0]) for tree in ensemble["trees"]) < len(NAMES)
    crossing = constants["crossing"]["trees"]
    assert max(max(tree[0]) for tree in crossing) < len(CROSSING_NAMES)
