# `make demo` and `make test` do all the set-up they need. Each target ends with one line of result.
#
#   make env        .venv with pinned versions; PYTHON=python3.12 chooses the interpreter
#   make data       the real model and text, fetched once; DATA=DIR chooses the folder
#   make demo       convert a real model and show what that saves and costs; CODEC=int4 (int8, fp8)
#                   codes the cached rows as well
#   make test       environment, data, checks and all tests
#   make test-oldest  the transformers drop-in on the oldest transformers that is supported
#   make test-vllm  the vLLM plugin inside vLLM, in an environment of its own (Python 3.11)
#   make test-deepspeed  training under DeepSpeed, which is installed beside the environment
#   make test-ray   batch generation on Ray, which is installed beside the environment
#   make check      ruff, mypy, layering
#   make bench      quick benchmarks, minutes, to out/bench; a second run goes on where one stopped
#   make bench-full every point of every benchmark
#   make bench-compare BASE=REF  this tree against a version in git, slowdowns flagged
#   make convert-report  what conversions cost by bytes, beside the published objective and plain
#                   quantisation: within 40 minutes; HEAL=1: also healed, two hours; goes on where
#                   it stopped
#   make plots      the figures of benchmarks/figures from the rows in benchmarks/results
#   make gpu        tests and benchmarks on a GPU: OUT=DIR COMMIT=SHA PART=all|tests|decode|prefill|
#                   append|tune, in the Python that sees it (GPU_PYTHON=python3); results in OUT
#   make mutants    break the code line by line and require the tests to notice
#   make sanitize   the C++ kernels and their tests under the address and UB sanitizers
#   make thorough   the tests with many more drawn examples
#   make clean      remove what was built, not .venv and the data

PYTHON ?=
DATA ?= .cache/mla
GPU_PYTHON ?= python3
TEST_ARGS ?=
BENCH_ARGS ?=
BASE ?=
MUTANT_ARGS ?=
CODEC ?=
OUT ?= out/gpu
COMMIT ?=
PART ?= all
GPU_ARGS ?=
WORKERS ?= 2

PY := .venv/bin/python
PYTEST := $(PY) -m pytest -q --data-root=$(DATA)
# The model comes from DATA, never from a hub.
export TORCH_PIP_ARGS ?=
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help env data demo test test-oldest test-vllm test-deepspeed test-ray check bench bench-full bench-compare plots gpu mutants sanitize thorough clean
.NOTPARALLEL:

help:
	@sed -n 's/^#   //p' Makefile

env:
	@tools/env.sh "$(PYTHON)"

data: env
	@$(PY) -m tools.data --root $(DATA)

demo: data
	@mkdir -p out/demo
	@$(PY) -m mla demo $(if $(CODEC),--codec $(CODEC))
	@echo "demo: passed, table above, plot and report.json in out/demo"

# Triton's interpreter excludes its compiler, so the kernels have a pytest process of their own.
test: data check
	@TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) --timeout 900 tests/kernels
	@$(PYTEST) -n $(WORKERS) --timeout 600 $(TEST_ARGS)

# With its dependencies, but never another torch: the folder comes before .venv on the path.
OLDEST_TRANSFORMERS := 5.15.0
OLDEST_DIR := .cache/transformers-$(OLDEST_TRANSFORMERS)

$(OLDEST_DIR): | env
	@rm -rf $@.part && mkdir -p .cache
	@$(PY) -m pip install -q --disable-pip-version-check --target $@.part \
	    "transformers==$(OLDEST_TRANSFORMERS)"
	@mv $@.part $@

test-oldest: data $(OLDEST_DIR)
	@PYTHONPATH=$(OLDEST_DIR) $(PY) -c 'import transformers as t; \
	    assert t.__version__ == "$(OLDEST_TRANSFORMERS)", t.__version__'
	@PYTHONPATH=$(OLDEST_DIR) $(PYTEST) -n $(WORKERS) --timeout 600 \
	    tests/test_transformers_*.py $(TEST_ARGS)

test-vllm: env
	@tools/vllm_env.sh $(PY)
	@.cache/vllm/bin/python -m pytest -q --timeout 900 tests/vllm_engine $(TEST_ARGS)

# Without its dependencies, one of which is torch. Its kernels would be compiled when they are used.
DEEPSPEED := 0.19.8
DEEPSPEED_DIR := .cache/deepspeed-$(DEEPSPEED)

$(DEEPSPEED_DIR): | env
	@rm -rf $@.part && mkdir -p .cache
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PY) -m pip install -q --disable-pip-version-check \
	    --no-deps --no-build-isolation --target $@.part "deepspeed==$(DEEPSPEED)"
	@$(PY) -m pip install -q --disable-pip-version-check --target $@.part \
	    hjson msgpack ninja psutil py-cpuinfo pydantic tqdm
	@mv $@.part $@

test-deepspeed: $(DEEPSPEED_DIR)
	@PYTHONPATH=$(DEEPSPEED_DIR) DS_ACCELERATOR=cpu $(PYTEST) -n 0 --timeout 600 \
	    -m deepspeed tests/parallel $(TEST_ARGS)

# With its dependencies in the versions of .venv; none of them is torch. Workers start in other folders.
RAY := 2.60.0
RAY_DIR := .cache/ray-$(RAY)

$(RAY_DIR): | env
	@rm -rf $@.part && mkdir -p .cache
	@$(PY) -m pip install -q --disable-pip-version-check --only-binary :all: \
	    --constraint constraints.txt --target $@.part "ray[data]==$(RAY)"
	@mv $@.part $@

test-ray: $(RAY_DIR)
	@PYTHONPATH=$(abspath $(RAY_DIR)) $(PYTEST) -n 0 --timeout 900 tests/ray_cluster $(TEST_ARGS)

check: env
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PYTEST) -n 0 tests/test_layering.py
	@echo "check: passed (ruff, mypy, layering)"

bench: data
	@$(PY) -m benchmarks.run --quick $(BENCH_ARGS)

bench-full: data
	@$(PY) -m benchmarks.run $(BENCH_ARGS)

bench-compare: data
	@[ -n "$(BASE)" ] || { echo "bench-compare: failed: BASE=REF names the version, as in" \
	    "make bench-compare BASE=main~1" >&2; exit 2; }
	@$(PY) -m benchmarks.compare "$(BASE)" --quick $(BENCH_ARGS)

convert-report: data
	@$(PY) -m benchmarks.convert_report $(if $(filter-out 0,$(HEAL)),--heal) $(REPORT_ARGS)

plots: env
	@$(PY) -m benchmarks.plot
	@$(PY) -m benchmarks.convert_plots

gpu:
	@$(GPU_PYTHON) -c 'import torch, triton, pytest, hypothesis, einops' || \
	    { echo "gpu: failed: $(GPU_PYTHON) lacks what the line above names" >&2; exit 1; }
	@$(GPU_PYTHON) -m benchmarks.gpu --out "$(OUT)" --commit "$(COMMIT)" \
	    --part "$(PART)" $(GPU_ARGS)

mutants: data
	@$(PY) -m tools.mutants $(MUTANT_ARGS)

sanitize: env
	@tools/sanitize.sh $(PY) $(TEST_ARGS)

thorough: data
	@$(PYTEST) -n $(WORKERS) --timeout 3600 --hypothesis-profile=thorough $(TEST_ARGS)

clean:
	@rm -rf build out *.egg-info mla/_C.* .hypothesis .cache/ruff .cache/mypy .cache/pytest .cache/hypothesis
	@find mla tests tools benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	@echo "clean: done (.venv and $(DATA) are kept)"
