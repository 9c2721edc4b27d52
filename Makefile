# `make` alone lists the targets. Each one creates what it needs under .venv, target and build.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
BUILT := $(VENV)/.stamp-built
DEPENDENCIES := $(VENV)/.stamp-dependencies

RUST_SOURCES := Cargo.toml $(wildcard Cargo.lock) $(shell find crates -name '*.rs' -o -name Cargo.toml)
RUST_HOST = $(shell rustc -vV | sed -n 's/^host: //p')
BENCHMARKS := $(patsubst benchmarks/bench_%.py,bench-%,$(wildcard benchmarks/bench_*.py))
DEMO_RUNS ?= 3
TEST_PROCESSES ?= 2

# One interpreter for every cargo call, so that clippy, maturin and cargo share their builds.
export PYO3_PYTHON := $(PY)
export VIRTUAL_ENV := $(VENV)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 1
unexport CONDA_PREFIX PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo build wheel test test-quick stress check bench docs asan loom numpy-suite \
        test-freethreaded test-numpy25 numa-guest clean $(BENCHMARKS)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '  make %-18s %s\n' 'bench-<name>' 'run one of: $(BENCHMARKS:bench-%=%)'

# Running each program first warms the file cache, so that `compare` needs no warm-up round.
demo: $(BUILT) ## run and compare real programs; DEMO_RUNS=3
	@for example in image_pipeline.py signal_chain.py \
	    "photo_segmentation.py --photographs flower --iterations 3"; do \
	    printf '\n== moirai run examples/%s\n' "$$example"; \
	    $(PY) -m moirai run examples/$$example || exit 1; \
	    printf '\n== moirai compare examples/%s\n' "$$example"; \
	    $(PY) -m moirai compare --runs $(DEMO_RUNS) --no-warm-up examples/$$example || exit 1; \
	done
	@for example in frame_pipeline log_collector data_loader; do \
	    printf '\n== python examples/%s.py\n' "$$example"; \
	    $(PY) examples/$$example.py || exit 1; \
	done

build: $(BUILT) ## create .venv and build the package into it, optimised

# maturin warns that pip will not use it: pip does, through scripts/build_backend.py.
wheel: $(BUILT) ## a wheel and a source archive under dist
	$(PY) -m maturin build --release --quiet --out dist
	$(PY) -m maturin sdist --out dist

test: $(BUILT) ## all tests: the core's, then Python's
	cargo test -p moirai-core
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-quick: $(BUILT) ## all tests but the stress tests
	cargo test -p moirai-core --lib
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist worksteal -m 'not slow and not endurance'

stress: $(BUILT) ## the stress tests alone, a thousand kills of processes among them
	$(PY) -m pytest -m 'slow or endurance' tests/stress

check: $(BUILT) ## formatting, lints, types, stubs, layers
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy.stubtest moirai._native
	$(PY) -m pytest -q tests/test_architecture.py

bench: $(BENCHMARKS) ## every benchmark; takes long, writes benchmarks/results

$(BENCHMARKS): bench-%: $(BUILT)
	$(PY) benchmarks/bench_$*.py --write-docs

docs: $(BUILT) ## refresh the measured tables, check links, run every snippet
	$(PY) scripts/refresh_docs.py
	$(PY) -m pytest -q tests/test_docs.py

asan: ## the core's tests under AddressSanitizer
	ASAN_OPTIONS=allocator_may_return_null=1 \
	    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/asan \
	    cargo test -p moirai-core --target $(RUST_HOST) --lib --tests

loom: ## every interleaving of the core's lock-free parts
	RUSTFLAGS='--cfg loom' CARGO_TARGET_DIR=target/loom \
	    cargo test -p moirai-core --release --test 'loom*'

numpy-suite: $(BUILT) ## NumPy's own tests, plain and under Moirai; QUICK=1 for fft and ma only
	$(PY) -m pip install --group numpy-suite
	PATH=$(VENV)/bin:$$PATH $(PY) scripts/numpy_suite.py $(if $(QUICK),--quick)

test-freethreaded: ## tests on a free-threaded interpreter, found or built; PYTHON= names one
	python=$$(PYTHON=$(PYTHON) scripts/free_threaded_python.sh) && \
	    PYTHON=$$python scripts/test_in_own_venv.sh freethreaded

test-numpy25: ## tests with the newest NumPy: PYTHON=python3.12 or newer
	PYTHON=$(PYTHON) scripts/test_in_own_venv.sh numpy25

numa-guest: $(BUILT) ## where memory lies on two nodes, in an emulator; KERNEL= names a kernel
	kernel=$$(KERNEL=$(KERNEL) scripts/guest_kernel.sh) && $(PY) scripts/numa_guest.py $$kernel

clean: ## remove everything that was built
	rm -rf .venv target build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python tests benchmarks examples scripts -name __pycache__ -prune -exec rm -rf {} +
	rm -f python/moirai/_native*.so
	rm -rf python/moirai/_preload

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON: must be 3.11 or newer, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(DEPENDENCIES): pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --upgrade 'pip>=25.1'
	$(PY) -m pip install --quiet 'maturin>=1.8,<2' --group dev
	@touch $@

# Python sources take effect as they are edited; only Rust needs building.
$(BUILT): $(DEPENDENCIES) $(RUST_SOURCES)
	$(PY) scripts/build_backend.py
	$(PY) -m maturin develop --release --quiet
	@$(PY) -m compileall -q python
	@touch $@
