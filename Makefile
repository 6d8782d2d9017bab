# Two commands for a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BENCH ?= .benchmarks/latest.json
JOBS ?= 2
ENVIRONMENTS ?= .versions
RUN ?= runs/digits-$(shell date +%Y%m%d-%H%M%S)
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

SOURCES := $(shell find csrc -type f)
READY := $(VENV)/.ready
CUDA := $(if $(shell command -v nvcc),$(VENV)/.cuda)

.PHONY: run test lint format docs bench bench-all gpu gpu-static versions install clean

run: $(READY)  ## train RT-ER on the embedded digits and write a report
	$(BIN)/rter demo --out $(RUN)

# Two threads in each process, so that work is split between threads; none spins while it waits.
test: export OMP_NUM_THREADS := 2
test: export OMP_WAIT_POLICY := passive
test: $(READY) $(CUDA)  ## all tests, JOBS at a time
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(READY)  ## style, types, layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard tests/simt/*.cpp tests/simt/*.h)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard tests/simt/*.cpp tests/simt/*.h)

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)  ## the documentation site, into site/
	$(BIN)/mkdocs build --strict

# Huge pages for the large tensors of every contender, ours and the others.
bench bench-all: export THP_MEM_ALLOC_ENABLE := 1
bench: ROWS := -m core
bench bench-all: $(READY)  ## speed against plain PyTorch, as ratios within one run: the core in 5 minutes; bench-all: every row, and memory
	@mkdir -p $(dir $(BENCH))
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' $(ROWS) --benchmark-enable --benchmark-json=$(BENCH) \
	    --benchmark-columns=median
	$(BIN)/python benchmarks/ratios.py $(BENCH)
ifneq ($(filter bench-all,$(MAKECMDGOALS)),)
	$(BIN)/python benchmarks/saved_bytes.py
	$(BIN)/python benchmarks/peak_memory.py
endif

gpu-static: $(READY)  ## every GPU kernel compiled for every architecture: registers, shared memory, spills, tensor cores
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python checks/gpu_static.py

versions: $(READY)  ## build, load, test and compile with each supported torch, into docs/versions.md
	$(BIN)/python checks/versions.py --environments $(ENVIRONMENTS)

# Uses the machine's own Python, which must have a CUDA torch, setuptools, ninja and pybind11; results go to RESULTS=DIR.
gpu:  ## on a machine with a GPU, in six minutes: build, smoke test, speed, all cases, graphs, compute-sanitizer
	$(PYTHON) checks/gpu.py $(if $(RESULTS),--results $(RESULTS))

install: $(READY)

# An isolated build would unpack torch a second time, and the pins of the attack libraries would replace it.
$(READY): constraints.txt pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch numpy "setuptools>=77" pybind11 ninja
	$(BIN)/python setup.py -q build_ext --inplace  # here, since pip would hide its output
	$(BIN)/pip install -q --no-build-isolation -e '.[rter,test,lint,transformers,docs]'
	$(BIN)/pip install -q --no-deps torchattacks foolbox eagerpy  # ours are timed and tested against them
	@touch $@

# With a CPU build of torch, needed only by the tests that inspect the library.
$(VENV)/.cuda: $(READY)
	MOE_KERNELS_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info moe_kernels/*.so
