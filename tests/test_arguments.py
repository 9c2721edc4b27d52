"""Arguments of the wrong kind or range are refused where they enter, by name, as our own errors."""

import math
import sys
import threading

import pytest

from moirai import errors, executor, pressure
from moirai.integrations import gunicorn_hooks
from moirai.pressure import Stage

LONG = 10**30
HUGE = 10**400  # No float is so large.


class HasObserve:
    def observe(self, *_):
        pass


def nothing(*_):
    pass


def cap(**options):
    return pressure.AsgiCap(**{"app": nothing, "cap": pressure.ConcurrencyCap(1), **options})


def wsgi_cap(**options):
    return pressure.WsgiCap(**{"app": nothing, "cap": pressure.ConcurrencyCap(1), **options})


def webhook(**options):
    return pressure.Webhook(**{"url": "http://localhost:1", **options})


def action(**options):
    return pressure.Action(**{"name": "x", "stage": Stage.GENTLE, "run": nothing, **options})


def registration(**options):
    return pressure.Registry().register(**{"name": "x", "shrink": nothing, **options})


def reserved(**options):
    with pressure.Guard(forecaster=None).reserve(**{"size": 1, **options}):
        pass


def adapted(**options):
    cap = pressure.ConcurrencyCap(1)
    return cap.adapt(**{"time_seconds": 0.0, "under_pressure": False, **options})


def observed(**options):
    values = {"time_seconds": 0.0, "used_bytes": 1, "limit_bytes": 2, **options}
    pressure.Forecaster().observe(**values)


def foreseen(**options):
    pressure.Forecaster().forecast().at(**options)


def sampled(**options):
    return pressure.Sample(**{"time_seconds": 0.0, "used_bytes": 1, "limit_bytes": 2, **options})


def stepped(sample):
    pressure.Guard(forecaster=None).step(sample)


def executor_over_processes(**options):
    return executor.Executor(backend="processes", **options)


# What is called, with which argument, and what the message says besides its name.
WRONG = [
    (executor.Executor, {"topology": 5}, "must be Topology or None, got int"),
    (executor.Executor, {"memory": 5}, "must be Resource or None, got int"),
    (executor.Executor, {"thread_name_prefix": 5}, "must be a str, got int"),
    (executor.Executor, {"thread_name_prefix": None}, "must be a str, got NoneType"),
    (executor.Executor, {"initargs": 5}, "must be a tuple, got int"),
    (executor.Executor, {"initargs": None}, "must be a tuple, got NoneType"),
    (executor.Executor, {"backend": 5}, "must be one of .*, got 5"),
    (executor.Executor, {"backend": ["threads"]}, "must be one of .*, got"),
    (executor.Executor, {"affinity": []}, r"must be .*, got \[\]"),
    (executor.Executor, {"when_full": 5}, 'must be "block" or .*, got 5'),
    (executor.Executor, {"when_full": None}, 'must be "block" or .*, got None'),
    (executor.Executor, {"max_pending": "x"}, "must be an int, got str"),
    (executor.Executor, {"max_pending": LONG}, f"must be .*, got {LONG}"),
    (executor.Executor, {"max_workers": LONG}, f"at most 4096, got {LONG}"),
    (executor.Executor, {"max_workers": 1.5}, "must be an int or None, got float"),
    (executor.Executor, {"task_arena": "x"}, "must be a bool, got str"),
    (executor.Executor, {"task_arena": None}, "must be a bool, got NoneType"),
    (executor.Executor, {"measure_latency": 1}, "must be a bool, got int"),
    (executor.Executor, {"blas_threads": 1.5}, "must be .*, got 1.5"),
    (executor_over_processes, {"thread_name_prefix": 5}, "must be a str, got int"),
    (executor_over_processes, {"measure_latency": "x"}, "must be a bool, got str"),
    (executor_over_processes, {"task_arena": 0}, "must be a bool, got int"),
    (executor_over_processes, {"topology": "x"}, "must be Topology or None, got str"),
    (executor_over_processes, {"when_full": 5}, 'must be "block" or .*, got 5'),
    (executor.ProcessExecutor, {"topology": 5}, "must be Topology or None, got int"),
    (executor.ProcessExecutor, {"mp_context": 5}, "must be a context, a str or None, got int"),
    (executor.ProcessExecutor, {"mp_context": "no"}, "must be a context, .*, got 'no'"),
    (executor.ProcessExecutor, {"initargs": 5}, "must be a tuple, got int"),
    (executor.ProcessExecutor, {"max_tasks_per_child": "x"}, "must be an int or None, got str"),
    (executor.ProcessExecutor, {"max_tasks_per_child": True}, "must be an int or None, got bool"),
    (executor.ProcessExecutor, {"max_workers": "x"}, "must be an int or None, got str"),
    (executor.ProcessExecutor, {"memory_bytes": 0}, "must be from 1 to 549755813888, got 0"),
    (executor.ProcessExecutor, {"memory_bytes": LONG}, f"must be from 1 .*, got {LONG}"),
    (executor.ProcessExecutor, {"memory_bytes": None}, "must be an int or a str, got NoneType"),
    (executor.TaskGroup, {"executor": 5}, "must be Executor, got int"),
    (executor.LatencyHistogram((1,)).at_most_seconds, {"share": "x"}, "must be a number, got str"),
    (pressure.Guard, {"source": 5}, "must be something that reads samples, or None, got int"),
    (pressure.Guard, {"thresholds": 0}, "must be Thresholds or None, got int"),
    (pressure.Guard, {"registry": None}, "must be Registry, got NoneType"),
    (pressure.Guard, {"built_in": 5}, "must be actions or None, got int"),
    (pressure.Guard, {"dry_run": "no"}, "must be a bool, got str"),
    (pressure.Guard, {"on_stage": 5}, "must be callable or None, got int"),
    (pressure.Forecaster, {"trend_unit_seconds": "x"}, "must be a number, got str"),
    (pressure.Forecaster, {"trend_unit_seconds": None}, "must be a number, got NoneType"),
    (pressure.Forecaster, {"trend_unit_seconds": math.nan}, "must be finite and above 0, got nan"),
    (pressure.Forecaster, {"trend_unit_seconds": HUGE}, "must be finite and above 0, got 1000"),
    (pressure.Forecaster, {"model": 5}, "must be Model or None, got int"),
    (observed, {"time_seconds": "x"}, "must be a number, got str"),
    (observed, {"time_seconds": None}, "must be a number, got NoneType"),
    (observed, {"used_bytes": "1 GiB"}, "must be a number, got str"),
    (observed, {"used_bytes": []}, "must be a number, got list"),
    (observed, {"used_bytes": -HUGE}, "must be at least 0, got -1000"),
    (observed, {"limit_bytes": "1 GiB"}, "must be a number or None, got str"),
    (observed, {"limit_bytes": -1}, "must be at least 0 or None, got -1"),
    (foreseen, {"horizon_seconds": "60"}, "must be a number, got str"),
    (foreseen, {"horizon_seconds": None}, "must be a number, got NoneType"),
    (foreseen, {"horizon_seconds": {}}, "must be a number, got dict"),
    (foreseen, {"horizon_seconds": HUGE}, "must be above 0 and at most 120, got 1000"),
    (sampled, {"time_seconds": "x"}, "must be a number, got str"),
    (sampled, {"time_seconds": math.nan}, "must be finite, got nan"),
    (sampled, {"time_seconds": HUGE}, "must be finite, got 1000"),
    (sampled, {"used_bytes": "x"}, "must be a number, got str"),
    (sampled, {"used_bytes": -1}, r"must be from 0 to 2\*\*64 - 1, got -1"),
    (sampled, {"used_bytes": math.inf}, "must be from 0 to .*, got inf"),
    (sampled, {"limit_bytes": "x"}, "must be a number or None, got str"),
    (sampled, {"limit_bytes": -1}, "must be None or from 0 to .*, got -1"),
    (sampled, {"limit_bytes": HUGE}, "must be None or from 0 to .*, got 1000"),
    (sampled, {"without_cache_bytes": None}, "must be a number, got NoneType"),
    (sampled, {"without_cache_bytes": math.nan}, r"must be below 2\*\*64, got nan"),
    (sampled, {"stalled_ratio": "x"}, "must be a number or None, got str"),
    (sampled, {"total_limit_hits": "x"}, "must be a number or None, got str"),
    (pressure.Guard, {"forecaster": "last"}, "must be \"default\", .*, got 'last'"),
    (pressure.Guard, {"forecaster": HasObserve()}, 'must be "default", a forecaster or None, got'),
    (pressure.Guard, {"action_timeout_seconds": math.inf}, "at most 1e9, .* inf and"),
    (pressure.Guard, {"action_timeout_seconds": HUGE}, "at most 1e9, .* 1000"),
    (pressure.Guard, {"stall_seconds": "x"}, "must be a number, got str"),
    (pressure.Guard, {"action_timeout_seconds": None}, "must be a number, got NoneType"),
    (pressure.Guard, {"forecast_seconds": []}, "must be a number, got list"),
    (reserved, {"size": None}, "must be an int or a str, got NoneType"),
    (reserved, {"margin": 1.5}, "must be an int or a str, got float"),
    (reserved, {"timeout_seconds": "x"}, "must be a number, got str"),
    (stepped, {"sample": 5}, "must be Sample, got int"),
    (pressure.start, {"foo": 5}, "must be an option of a guard .*, got 5"),
    (pressure.start, {"source": 5}, "must be an option of a guard .*, got 5"),
    (pressure.start, {"main_process_id": "x"}, "must be an int or None, got str"),
    (pressure.start, {"main_process_id": 0}, "must be from 1 to 2147483647, got 0"),
    (pressure.start, {"root": 5}, "must be a str or a path, got int"),
    (pressure.start, {"fence": 5}, "must be a bool or a Fence, got int"),
    (pressure.Sampler, {"root": None}, "must be a str or a path, got NoneType"),
    (pressure.Sampler, {"shortest_seconds": "x"}, "must be a number, got str"),
    (pressure.Sampler, {"longest_seconds": "x"}, "must be a number, got str"),
    (pressure.Sampler().next, {"timeout_seconds": "x"}, "must be a number or None, got str"),
    (pressure.Sampler().next, {"timeout_seconds": HUGE}, "must be None or .* 1e9, got 1000"),
    (pressure.Source, {"root": 5}, "must be a str or a path, got int"),
    (pressure.Source, {"process_id": True}, "must be an int or None, got bool"),
    (pressure.Fence, {"margin_bytes": None}, "must be an int or a str, got NoneType"),
    (pressure.Fence, {"margin_bytes": LONG}, f"must be below .*, got {LONG}"),
    (pressure.Fence, {"ledger": 5}, "must be a str or a path, got int"),
    (pressure.Fence.default_ledger, {"limit_name": 5}, "must be a str, got int"),
    (pressure.TraceSource, {"path": 1.5}, "must be a str or a path, got float"),
    (pressure.Registry().remove, {"registration": 5}, "must be Registration, got int"),
    (registration, {"cost": math.inf}, "must be a number of at least 0, got inf"),
    (registration, {"irreversible": "no"}, "must be a bool, got str"),
    (registration, {"shrink": 5}, "must be callable, got int"),
    (registration, {"size": 5}, "must be callable or None, got int"),
    (registration, {"owner": 5}, "must be one that can be held weakly, got int"),
    (pressure.ConcurrencyCap, {"maximum": "x"}, "must be an int, got str"),
    (pressure.ConcurrencyCap(1).acquire, {"timeout_seconds": "x"}, "must be a number or None, got"),
    (adapted, {"time_seconds": "x"}, "must be a number, got str"),
    (adapted, {"time_seconds": math.nan}, "must be finite, got nan"),
    (adapted, {"time_seconds": HUGE}, "must be finite, got 1000"),
    (adapted, {"under_pressure": "no"}, "must be a bool, got str"),
    (cap, {"app": 5}, "must be callable, got int"),
    (cap, {"cap": 5}, "must be ConcurrencyCap, got int"),
    (wsgi_cap, {"cap": None}, "must be ConcurrencyCap, got NoneType"),
    (wsgi_cap, {"retry_after_seconds": "x"}, "must be a number, got str"),
    (webhook, {"from_stage": 3}, "must be Stage, got int"),
    (webhook, {"repeat_seconds": "x"}, "must be a number, got str"),
    (webhook, {"timeout_seconds": None}, "must be a number, got NoneType"),
    (webhook, {"timeout_seconds": math.inf}, "at most 1e9, got 60.0 and inf"),
    (webhook, {"headers": 5}, "must be a mapping or None, got int"),
    (webhook, {"headers": {5: "x"}}, "each name: must be a str, got int"),
    (webhook, {"headers": {"x": None}}, "x: must be a str, got NoneType"),
    (action, {"name": 5}, "must be a str, got int"),
    (action, {"stage": 2}, "must be Stage, got int"),
    (action, {"run": 5}, "must be callable, got int"),
    (gunicorn_hooks.guard_workers, {"foo": 1}, "must be an option of a guard .*, got 1"),
    (gunicorn_hooks.guard_workers, {"on_stall": nothing}, "must be left to the hook"),
    (gunicorn_hooks.guard_workers, {"limit": "much"}, "must be a number of bytes"),
    (gunicorn_hooks.guard_workers, {"stall_seconds": "x"}, "must be a number, got str"),
    (gunicorn_hooks.guard_workers, {"root": 5}, "must be a str or a path, got int"),
    *(
        (pressure.Thresholds, {name: "x"}, "must be a number, got str")
        for name in pressure.Thresholds.__dataclass_fields__
    ),
]


@pytest.mark.parametrize(
    ("call", "options", "message"),
    WRONG,
    ids=[f"{call.__name__}-{'-'.join(options)}" for call, options, _ in WRONG],
)
def test_a_wrong_argument_is_refused_by_name(call, options, message):
    threads = threading.active_count()
    (name,) = options
    with pytest.raises(errors.InvalidArgument, match=rf"{name}\b.* {message}"):
        call(**options)
    assert threading.active_count() == threads, "it began before it looked"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 3}, "stage: must be Stage, got int"),
        ({"sample": None}, "sample: must be Sample, got NoneType"),
    ],
)
def test_a_wrong_argument_of_what_a_webhook_is_told_is_named(options, message):
    with pytest.raises(errors.WrongType, match=message):
        webhook()(**{"stage": Stage.CALM, "sample": sampled(), **options})


@pytest.mark.parametrize(
    "wrong",
    [("x", 1, 2), (1.0, None, 2), (1.0, 1, []), (1.0, -1, 2), (1.0, 1, -2), (math.nan, "x", None)],
)
def test_an_observation_that_is_refused_leaves_no_trace(wrong):
    forecaster = pressure.Forecaster()
    for second in range(10):
        forecaster.observe(second, second, 100)
    before = forecaster.forecast()
    with pytest.raises(errors.InvalidArgument):
        forecaster.observe(*wrong)
    assert forecaster.forecast() is before
    assert forecaster.ignored_count == 0


def test_an_observation_too_large_for_a_float_is_not_finite():
    forecaster = pressure.Forecaster()
    forecaster.observe(HUGE, 1, 2)
    forecaster.observe(1.0, HUGE, 2)
    assert forecaster.ignored_count == 2
    forecaster.observe(1.0, 1, HUGE)
    assert forecaster.forecast().limit_bytes is None


def test_a_sample_of_before_the_last_one_is_refused_and_changes_nothing():
    guard = pressure.Guard(forecaster=None, registry=pressure.Registry(), built_in=())
    guard.step(sampled(time_seconds=2.0))
    before = guard.status()
    with pytest.raises(errors.InvalidArgument, match=r"at 2.0 s, got 1.0 s"):
        guard.step(sampled(time_seconds=1.0, used_bytes=2))
    assert guard.status() == before
    guard.step(sampled(time_seconds=2.0))


def test_a_reservation_may_wait_as_long_as_an_int_can_say():
    reserved(timeout_seconds=HUGE)


@pytest.mark.parametrize(
    "content", [b"t_seconds,rss_bytes,limit_bytes\n\xff\xfe,1,2\n", b"x" * 200_000]
)
def test_a_file_that_is_no_recording_is_named(tmp_path, content):
    path = tmp_path / "trace.csv"
    path.write_bytes(content)
    with pytest.raises(errors.InvalidArgument, match=r"path: .*trace.csv must"):
        pressure.TraceSource(path)


def test_a_recording_may_begin_with_a_mark_of_its_encoding(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xef\xbb\xbft_seconds,rss_bytes,limit_bytes\n0,1,2\n")
    assert len(pressure.TraceSource(path)) == 1


def test_what_is_of_the_wrong_kind_is_a_type_error_too():
    with pytest.raises(TypeError, match="topology"):
        executor.Executor(topology=5)
    with pytest.raises(ValueError, match="topology"):
        executor.Executor(topology=5)


@pytest.fixture(scope="module", params=["threads", "processes"])
def workers(request):
    with executor.Executor(1, backend=request.param) as made:
        yield made


@pytest.mark.parametrize("method", ["map", "map_unordered"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunksize": LONG}, f'chunksize: must be "auto" or an int .*, got {LONG}'),
        ({"chunksize": "x"}, "chunksize: must be .*, got 'x'"),
        ({"chunksize": 1.5}, "chunksize: must be .*, got 1.5"),
        ({"chunksize": True}, "chunksize: must be .*, got True"),
        ({"timeout": "x"}, "timeout: must be a number or None, got str"),
        ({"timeout": math.inf}, "timeout: must be None or a number up to 1e9, got inf"),
        ({"timeout": math.nan}, "timeout: must be None or a number up to 1e9, got nan"),
        ({"priority": "x"}, "priority: must be a Priority.*, got 'x'"),
        ({"node": "x"}, "node: must be .*, got .*(x|str)"),
        ({"node": LONG}, "node: must be .*, got"),
    ],
)
def test_a_wrong_argument_of_map_is_refused_at_the_call(workers, method, options, message):
    before = workers.statistics().submitted
    with pytest.raises(errors.InvalidArgument, match=message):
        getattr(workers, method)(abs, [1, 2], **options)
    assert workers.statistics().submitted == before


def test_the_largest_chunks_are_of_all_there_is(workers):
    assert list(workers.map(abs, [-1, 2], chunksize=sys.maxsize)) == [1, 2]


@pytest.mark.parametrize("method", ["result", "exception"])
@pytest.mark.parametrize("timeout", ["x", math.nan, math.inf, LONG, 10**400])
def test_a_wrong_timeout_of_a_future_is_named(workers, method, timeout):
    with executor.Executor(1) as other:
        opened = threading.Event()
        blocked = other.submit(opened.wait)
        try:
            future = blocked if workers.__class__ is executor.Executor else workers.submit(abs, 1)
            with pytest.raises(errors.InvalidArgument, match="timeout: must be"):
                getattr(future, method)(timeout)
        finally:
            opened.set()


def test_a_wrong_interval_of_progress_is_named():
    with (
        executor.ProcessExecutor(1) as workers,
        pytest.raises(errors.InvalidArgument, match="interval_seconds: must be a number, got str"),
    ):
        workers.progress("x")


def test_a_wrong_argument_of_the_joblib_backend_is_named():
    backend = pytest.importorskip("moirai.integrations.joblib_backend")
    for call, options, message in [
        (backend.MoiraiBackend, {"executor": 5}, "executor: must be BaseExecutor or None, got int"),
        (backend.MoiraiBackend, {"priority": "x"}, "priority: must be a Priority or None, got 'x'"),
        (backend.register, {"name": 5}, "name: must be a str, got int"),
        (backend.register, {"make_default": "x"}, "make_default: must be a bool, got str"),
    ]:
        with pytest.raises(errors.InvalidArgument, match=message):
            call(**options)


def test_a_wrong_argument_of_dask_is_named():
    pytest.importorskip("distributed")
    from moirai.integrations.dask import DistributedExecutor
    from moirai.integrations.dask_worker import PressurePlugin

    for call, options, message in [
        (DistributedExecutor, {"client": 5}, "client: must be a synchronous .*, got 5"),
        (PressurePlugin, {"share": "x"}, "share: must be a number or None, got str"),
        (PressurePlugin, {"interval_seconds": None}, "interval_seconds: must be a number, got"),
        (PressurePlugin, {"restart": "no"}, "restart: must be a bool, got str"),
        (PressurePlugin, {"root": 5}, "root: must be a str or a path, got int"),
    ]:
        with pytest.raises(errors.InvalidArgument, match=message):
            call(**options)
