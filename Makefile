# `make demo` and `make test` do all the set-up on a fresh clone; `make install` is the set-up alone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test lint docs bench triton-sanitizer clean

install: $(VENV)/.installed

# torch comes first and alone, so that nothing below pulls another build of it.
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q numpy triton "pybind11>=2.13" "cmake>=3.25" ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --no-build-isolation -e ".[train,dev,bench,docs]"
	touch $@

demo: install
	$(BIN)/effkern demo

# Also the slow tests, which plain pytest leaves out. One process per core, so one thread each; a file stays in one
# process.
test: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "slow or not slow" -n logical --maxprocesses=8 --dist loadscope --no-loadscope-reorder

# The site, in build/docs: half a minute, no network.
docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

# Minutes. `effkern bench --help` has the rest: full runs, targets, baselines, one op.
bench: install
	$(BIN)/python -m benchmarks run --json runs/bench/suite.jsonl
	$(BIN)/python -m benchmarks report runs/bench/suite.jsonl --out runs/bench

# Into dist: the sdist; wheels for this Python, for every Python (no _data), and for every machine (nothing compiled).
.PHONY: wheel
wheel: install
	$(BIN)/pip install -q build
	rm -rf build/lib build/lib.*
	$(BIN)/python -m build --sdist --no-isolation
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --wheel --no-isolation
	PATH="$(CURDIR)/$(BIN):$$PATH" EFFKERN_ABI3=1 $(BIN)/python -m build --wheel --no-isolation
	EFFKERN_PURE=1 $(BIN)/python -m build --wheel --no-isolation

# Runs the Triton kernels on the CPU and stops at accesses out of bounds and races. The tool's metadata ask for a newer
# Python than it needs. Half-precision products exist on a GPU only.
triton-sanitizer: install
	$(BIN)/pip install -q --no-deps --ignore-requires-python ttsem==0.1.0
	TRITON_INTERPRET=0 $(BIN)/python -m ttsem.sanitize pytest -q tests/ops/test_distill.py tests/ops/test_distill_triton_rows.py \
		tests/ops/test_laurel_triton.py \
		-k "triton and not half and not bfloat16 and not interprets"
	TRITON_INTERPRET=0 $(BIN)/python -m ttsem.sanitize pytest -q tests/ops/test_loop_step_triton.py \
		tests/ops/test_looped_linear_attention_triton.py \
		-k "not half and not bfloat16 and not interprets and not compile and not operators and not covered"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf build dist *.egg-info effkern/*.so $(VENV)/.installed
