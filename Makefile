# Every target makes what it needs: the active virtual environment or .venv, torch unless it is there already, the build.
PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.fastseq-ready
# The pip of a new environment is the one bundled with Python, so nothing is upgraded; pip 23.0 knows no -C. An editable
# import runs cmake. --no-compile: the first import compiles the modules that it needs in 1 s; all of them take 22.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
export PATH := $(BIN):$(PATH)

# The local version +cpu is the build without CUDA, 20 times smaller. TORCH_INDEX names an index that has it, where the
# one pip is set up for has not; without either, pip's default torch serves as well.
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?=

# build/editable is kept by the rebuilding import; a wheel built from the same tree uses another folder.
TOOLS := "scikit-build-core>=0.11" "cython>=3.1" "cython-cmake>=0.2" "cmake>=3.20" ninja
EXTRAS := cli,test,bench,lint
INSTALL := $(PIP_INSTALL) --no-build-isolation -e ".[$(EXTRAS)]" \
	--config-settings=build-dir=build/editable --config-settings=editable.rebuild=true --config-settings=editable.verbose=false
CXX_SOURCES := $(filter-out csrc/dlpack.h,$(wildcard $(foreach d,csrc csrc/* csrc/cpu/*,$d/*.h $d/*.cpp $d/*.cu*))) \
	$(wildcard tests/cuda_on_host/*.h)

.PHONY: build demo test test-long bench lint format cuda asan clean
build: $(READY)

demo: $(READY)
	$(BIN)/fastseq demo

# A fixed sample: 7 minutes on two cores.
test: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

# All of what `make test` takes a sample of, with every instruction set of this machine, with the tools and models of
# others, and the sanitizers: hours.
test-long: $(READY)
	$(PIP_INSTALL) -q opacus torchviz transformers
	isas=$$($(BIN)/python -c 'from fastseq.backends import native; print(*native.isas())') && for isa in $$isas; do \
		echo "FASTSEQ_ISA=$$isa"; \
		FASTSEQ_LONG=1 FASTSEQ_ISA=$$isa OMP_NUM_THREADS=2 $(BIN)/python -m pytest || exit; \
	done
	$(MAKE) asan

bench: $(READY)
	$(BIN)/python -m pytest bench --benchmark-json=fastseq-bench.json
	$(BIN)/fastseq report fastseq-bench.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The build with the CUDA kernels, compiled anew for every target, and what registers they take. One target at a time
# for each source: what ptxas says of several would be mixed.
cuda: $(READY)
	@if ! command -v "$${CUDACXX:-nvcc}" >/dev/null; then echo 'CUDA: skipped, as no nvcc was found'; \
	elif rm -rf build/editable/csrc/cuda && FASTSEQ_BUILD_CUDA=on $(INSTALL) -v --config-settings=cmake.define.CMAKE_CUDA_FLAGS=-Xptxas=-v \
		--config-settings=cmake.define.FASTSEQ_CUDA_THREADS=1 >build/cuda.log 2>&1; then $(BIN)/python .ci/cuda build/cuda.log; \
	else cat build/cuda.log; exit 1; fi

# A build of its own beside the editable one. `python -P -S` on the whole of sys.path skips the hook of the editable
# install and the source tree, which would answer first; libstdc++ has to be there before the sanitizer looks into it.
ASAN := build/asan
asan: $(READY)
	$(PIP_INSTALL) -q --no-build-isolation --no-deps --upgrade --target $(ASAN)/site . \
		--config-settings=build-dir=$(ASAN)/cmake --config-settings=cmake.define.FASTSEQ_SANITIZE=address,undefined
	path=$$($(BIN)/python -c 'import sys; print(":".join(p for p in sys.path if p))') && \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=2 \
	PYTHONPATH=$(ASAN)/site:$$path $(BIN)/python -P -S -m pytest --capture=sys

clean:
	rm -rf build dist $(READY) $(if $(VIRTUAL_ENV),,.venv)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'fastseq needs Python 3.11 or later; PYTHON=... names another' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo 'this Python has no venv module; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml CMakeLists.txt | $(BIN)/python
	@$(BIN)/python -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' 2>/dev/null || \
		$(PIP_INSTALL) "$(TORCH)" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) || \
		{ echo 'No CPU build of torch on this index: taking the default one. TORCH_INDEX=... names an index that has it.' >&2; \
		$(PIP_INSTALL) "torch>=2.10"; }
	$(PIP_INSTALL) -q $(TOOLS)
	$(INSTALL) -q
	@touch $@
