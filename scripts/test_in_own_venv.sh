#!/bin/sh
# Build and test in a virtual environment of its own: test_in_own_venv.sh freethreaded|numpy25.
# PYTHON names the interpreter. The main .venv is not touched.
set -eu

kind=${1:?usage: PYTHON=/path/to/python scripts/test_in_own_venv.sh freethreaded|numpy25}
python=${PYTHON:-python3}

case $kind in
freethreaded)
    "$python" -c 'import sys, sysconfig
if not sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(f"PYTHON: must be a free-threaded build (python3.13t or newer), got {sys.version}")'
    numpy='numpy>=2.1' ;;
numpy25)
    "$python" -c 'import sys
if sys.version_info < (3, 12):
    sys.exit(f"PYTHON: must be 3.12 or newer (NumPy 2.5 asks for it), got {sys.version.split()[0]}")'
    numpy='numpy>=2.5' ;;
*)
    echo "kind: must be freethreaded or numpy25, got $kind" >&2
    exit 2 ;;
esac

venv=build/venv-$kind
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
VIRTUAL_ENV=$PWD/$venv
PYO3_PYTHON=$VIRTUAL_ENV/bin/python
export VIRTUAL_ENV PYO3_PYTHON
"$venv/bin/python" -m pip install --quiet --upgrade 'pip>=25.1'
# The newest of each that has a wheel: building NumPy takes longer than the tests.
"$venv/bin/python" -m pip install --quiet --only-binary :all: \
    'maturin>=1.8,<2' "$numpy" rich --group test-core
manifest=crates/python/Cargo.toml
if [ "$kind" = freethreaded ] && "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 14))'; then
    # PyO3 from 0.29 on asks free-threaded builds to be 3.14 or newer: an older one, in a copy.
    source=build/source-freethreaded
    rm -rf "$source" && mkdir -p "$source"
    git ls-files -z | xargs -0 cp --parents -t "$source"
    manifest=$source/$manifest
    sed -i '/^pyo3/s/>=0.28, <0.31/=0.28.3/' "$manifest"
fi
rm -rf "build/wheel-$kind"
"$venv/bin/python" -m maturin build --release --quiet --manifest-path "$manifest" \
    --interpreter "$PYO3_PYTHON" --target-dir "target/$kind" --out "build/wheel-$kind"
"$venv/bin/python" -m pip install --quiet --force-reinstall --no-deps "build/wheel-$kind"/*.whl
"$venv/bin/python" -c 'import numpy, sys; print("Python", sys.version.split()[0], "NumPy", numpy.__version__)'
# TESTS chooses others than these.
tests=${TESTS:-tests/contracts tests/test_memory.py tests/test_numpy*.py tests/test_priority.py
    tests/test_health.py tests/test_channels*.py tests/test_shared_channels*.py
    tests/test_executor.py tests/test_executor_limits.py tests/test_executor_memory.py
    tests/test_executor_cpython.py tests/test_process_executor.py
    tests/test_process_limits.py tests/test_process_time_limits.py
    tests/test_pressure_guard.py tests/test_pressure_fence.py
    tests/test_pressure_source.py tests/test_pressure_worker.py}
# shellcheck disable=SC2086 # words and patterns
exec "$venv/bin/python" -m pytest -m 'not slow and not endurance' $tests
