# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
# a file's tests in one process, which makes what they share once
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
READY = $(VENV)/.installed

.PHONY: demo test check kernels bench gpu sanitize fuzz soak clean

# torch first, so that a machine without a CUDA device can choose the CPU build: make TORCH="torch==2.13.0+cpu"
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,test,bench]"
	# for the tests of its networks, without what its trainings need
	$(BIN)/python -m pip install --quiet --no-deps denoising-diffusion-pytorch==2.3.4
	touch $(READY)

demo: $(READY)
	$(BIN)/fastdiff demo --out out

test: $(READY)
	$(PYTEST) tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) tests -q -m "not slow"

# after a change of kernels/: every case and target of the compiled kernels, of which `make test` takes a part
kernels: $(READY)
	$(PYTEST) tests/test_triton.py tests/test_aot.py tests/test_ptx.py --all-kernels

# every operation and run against its opponents, 40 minutes to an hour; SCORE_SDE_PYTORCH may name a checkout of score_sde_pytorch,
# and EDM2 one of edm2
bench: $(VENV)/.peers
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --benchmark-quiet --save-results -rs
	$(BIN)/python benchmarks/report.py

$(VENV)/.peers: benchmarks/peers.txt $(READY)
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/peers.txt
	touch $(VENV)/.peers

# on a CUDA machine, whose own python3 has torch: the GPU's tests and benchmarks, under ten minutes, with a verdict; installs
# nothing. ONLY=bits,tests names parts, OUT= a folder for results and log, COMMIT= the commit where there is no repository
gpu:
	$(PYTHON) benchmarks/gpu.py$(if $(OUT), --out "$(OUT)")$(if $(COMMIT), --commit "$(COMMIT)")$(if $(ONLY), --only "$(ONLY)")

# the C++ code under the address and undefined-behaviour sanitizers
SANITIZED = $(CURDIR)/build/sanitize/libfastdiff.so
sanitize: $(READY)
	$(BIN)/python -c "import setup, pathlib; p = pathlib.Path('$(SANITIZED)'); \
	    setup.compile_library(p.parent, p, '-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all')"
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 FASTDIFF_LIBRARY=$(SANITIZED) $(BIN)/python -m pytest tests/test_cpu.py -m "not slow"

# a hundred thousand mutants of files and ten thousand odd calls: only fastdiff's own errors, in bounded memory
fuzz: $(READY)
	$(BIN)/python tests/fuzz.py $(FUZZ)

# a thousand kills of trainings at any instant, or SOAK=n: each goes on to the weights of an unbroken one; some twenty minutes
SOAK ?= 1000
soak: $(READY)
	$(BIN)/python tests/soak.py --kills $(SOAK)

clean:
	rm -rf $(VENV) out build *.egg-info
