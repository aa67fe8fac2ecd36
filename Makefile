# Everything runs on one virtual environment, .venv, with an editable install of pyattr.
PYTHON ?= python3
# The release that the tests are run with. Its CPU build where the index in use has one.
TORCH ?= torch==2.13.0
# The one made for that release: another would replace it.
TORCHVISION ?= torchvision==0.28.0
BIN := .venv/bin
# One CUDA target is enough to know that the kernels compile.
CUDA_TEST_TARGET ?= 80
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*) CMakeLists.txt setup.py pyproject.toml

# The peers that `make compat` runs; all of ci/compat/peers by default.
PEERS ?=

.PHONY: demo test compat bench bench-compare lint wheel sanitize cuda clean

export PATH := $(CURDIR)/$(BIN):$(PATH)

define install
	PYATTR_CUDA=$(1) PYATTR_CUDA_ARCHITECTURES=$(2) $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
endef

# Dependencies change rarely and install slowly; the extension changes often and builds incrementally. So neither brings the
# other.
.venv/.dependencies: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'pyattr needs Python 3.10 or newer')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=26.3"
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --only-deps ".[dev,models,demo]"
	touch $@

# A GPU decides whether the demo waits for nvcc. An extension built for the tests or by `make cuda` serves the demo as well.
.venv/.demo: .venv/.dependencies $(SOURCES)
	rm -f .venv/.test
	$(if $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep GPU),$(call install,auto,native),$(call install,off,))
	touch $@

.venv/.test: .venv/.dependencies $(SOURCES)
	$(call install,auto,$(CUDA_TEST_TARGET))
	touch $@ .venv/.demo

# Not among the other packages: beside torch's CPU build the registry's torchvision, made for CUDA, does not load, and then
# diffusers, which imports it where it is, would not either. The tests declare what is missing (tests/evaluation/conftest.py).
.venv/.vision: .venv/.dependencies
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/vision "$(TORCHVISION)" "torchmetrics>=1.8" lightning-utilities
	touch $@

demo: .venv/.demo
	$(BIN)/pyattr demo

# A process for each core, of one thread unless a test asks for more; the tests of one file share its fixtures in one of them.
test: .venv/.test .venv/.vision
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

compat: .venv/.test
	$(BIN)/python -m ci.compat $(PEERS)

bench: .venv/.test
	$(BIN)/python -m bench

bench-compare: .venv/.test
	$(BIN)/python -m bench.compare

lint: .venv/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: .venv/.dependencies
	sh ci/wheel.sh

# Some tests start a Python in the root, which finds the extension there.
sanitize: .venv/.demo
	sh ci/sanitize.sh

cuda: .venv/.dependencies
	$(call install,on,all)
	touch .venv/.test .venv/.demo

clean:
	rm -rf build dist .venv .venv-compat
