# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.installed

.PHONY: demo test check bench sanitize clean

# torch first, so that a machine without a CUDA device can choose the CPU build: make TORCH="torch==2.13.0+cpu"
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,test,bench]"
	touch $(READY)

demo: $(READY)
	$(BIN)/fastdiff demo --out out

test: $(READY)
	$(BIN)/python -m pytest tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests -q -m "not slow"

bench: $(READY)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# the C++ code under the address and undefined-behaviour sanitizers
SANITIZED = $(CURDIR)/build/sanitize/libfastdiff.so
sanitize: $(READY)
	$(BIN)/python -c "import setup, pathlib; p = pathlib.Path('$(SANITIZED)'); \
	    setup.compile_library(p.parent, p, '-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all')"
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 FASTDIFF_LIBRARY=$(SANITIZED) $(BIN)/python -m pytest tests/test_native.py -m "not slow"

clean:
	rm -rf $(VENV) out build *.egg-info
