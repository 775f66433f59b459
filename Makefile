# `make demo` and `make test` do all their set-up and can be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find cmake csrc -type f)

# Only where nvcc was found; asked when a recipe runs, after the build.
CUDA_MODULE = $(shell ls pipex/_cuda.*.so >/dev/null 2>&1 && echo pipex._cuda)

# Tests start hundreds of processes; what these import is compiled once.
unexport PYTHONDONTWRITEBYTECODE

# One worker more than processors, as tests of several ranks wait more than they compute. Tests that look at times or at
# the whole machine come last, one by one.
WORKERS = -n $$(($$(nproc) + 1)) --dist worksteal

.PHONY: demo test test-long test-nightly test-torch test-triton36 gpu-check lint format clean

demo: $(VENV)/installed ## train a language model through a pipeline of 4 processes
	$(BIN)/pipex train --ranks 4 --schedule zb-h1 --steps 300 --check

test: $(VENV)/tested ## all tests but the long sweeps; needs no GPU
	$(BIN)/python -m pytest -m "not long and not nightly and not timing" $(WORKERS)
	$(BIN)/python -m pytest -m "not long and not nightly and timing"

test-long: $(VENV)/tested ## the long sweeps, sampled; PIPEX_TEST_SEED=... draws other samples
	$(BIN)/python -m pytest -m "long and not nightly and not timing" --timeout 1200 $(WORKERS)
	$(BIN)/python -m pytest -m "long and not nightly and timing" --timeout 1200

# Drawn once, for both lines.
test-nightly: export PIPEX_TEST_SEED := $(or $(PIPEX_TEST_SEED),$(shell date +%s))
test-nightly: $(VENV)/tested ## all tests, every case of every sweep, and new random inputs; takes hours
	$(BIN)/python -m pytest -m "not timing" --timeout 1200 $(WORKERS)
	$(BIN)/python -m pytest -m timing --timeout 1200

test-triton36: $(VENV)-triton36/installed ## the kernels with the oldest Triton that the package accepts
	$(VENV)-triton36/bin/python -m pytest tests/triton_kernels

TORCH ?= 2.15.0
TORCH_VENV = $(VENV)-torch$(TORCH)
test-torch: $(TORCH_VENV)/installed ## what depends on torch, with another version (TORCH=2.15.0); writes docs/torch-versions.md
	$(TORCH_VENV)/bin/python tests/torch_versions.py docs/torch-versions.md -m "not (long or nightly or timing or gpu)" $(WORKERS) \
		$(addprefix tests/,backward interop plan runtime partition)

REPORT ?= gpu-check.json
gpu-check: ## build, test and measure with $(PYTHON) as it is, on a machine with a GPU, into one file; STEPS=p2p,... for some
	$(PYTHON) -m pipex.bench.gpu_check --out $(REPORT)$(if $(STEPS), --steps $(STEPS))

lint: $(VENV)/linted ## formats, types, and whether the native stubs are those of the built modules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest pipex._native $(CUDA_MODULE) --ignore-missing-stub --concise --mypy-config-file pyproject.toml
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc tests -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/linted ## put everything into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf $(VENV) build *.egg-info pipex/*.so

# An editable install, since the package stands in the folder from which tests run.
define INSTALL
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
PIPEX_CUDA=$(1) $(BIN)/pip install --quiet --constraint constraints.txt --editable .
endef

$(VENV)/installed: $(BUILD_INPUTS)
	$(call INSTALL,$(or $(PIPEX_CUDA),AUTO))
	touch $@

# Tests ask for the CUDA kernels for all GPUs, wherever CMake finds an nvcc. Whoever needs no more than the above has it.
FOR_TESTS = $(or $(PIPEX_CUDA),$(if $(CUDACXX)$(shell command -v nvcc),ON,OFF))
$(VENV)/installed-for-tests: $(BUILD_INPUTS)
	$(call INSTALL,$(FOR_TESTS))
	touch $(VENV)/installed $@

$(VENV)/tested: $(VENV)/installed-for-tests tests/requirements.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement tests/requirements.txt
	touch $@

# Triton 3.6 breaks under NumPy 2.4. The package itself is imported from this folder: the kernels need nothing compiled.
$(VENV)-triton36/installed: Makefile constraints.txt
	test -x $(VENV)-triton36/bin/python || $(PYTHON) -m venv $(VENV)-triton36
	$(VENV)-triton36/bin/pip install --quiet $$(grep ^torch constraints.txt) triton==3.6.0 'numpy<2.4' pytest pytest-timeout
	touch $@

# Gigabytes, where the version has no build for the CPU alone. torch's own wish decides about Triton. The native modules
# stand in this folder, so those of $(VENV) are made anew: the same ones, or its tests would miss some.
$(VENV)-torch%/installed: $(BUILD_INPUTS) tests/requirements.txt
	test -x $(VENV)-torch$*/bin/python || $(PYTHON) -m venv $(VENV)-torch$*
	PIPEX_CUDA=$(FOR_TESTS) $(VENV)-torch$*/bin/pip install --quiet torch==$* --requirement tests/requirements.txt --editable .
	touch $@

$(VENV)/linted: $(VENV)/tested
	$(BIN)/pip install --quiet --constraint constraints.txt clang-format mypy ruff
	touch $@
