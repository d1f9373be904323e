# Each command sets up what it needs on a fresh machine with Python 3.11 or later:
#   make demo   trains a small language model, tensor parallel, with 32 to 2 bit collectives
#   make test   lint, types, and the tests that take some seconds at most
#   make test-slow, make test-benchmarks   the other tests; the scripts of benchmarks/, tiny
#   make docs   the pages of docs/, in docs/_build/html, and their Python (warnings are errors)
#   make test-kernels   tests of the generated GPU kernels, without a GPU, in .venv-kernels
#   make test-kernels-slow   those of them that take longer than the others together
#   make test-clients   tests with the real Lightning, transformers and accelerate, in .venv-clients
#   make test-pages   opens pages of reports in Chromium (Debian's package), in .venv-pages
#   make test-zoo   rewrites small models of 288 architectures (an hour); see .cache/zoo.jsonl
#   make test-torchtitan   the same with torchtitan, patched for CPU, in .venv-torchtitan
#   make test-torch TORCH=2.14.1   the tests with another torch, in .venv-torch-2.14.1
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
# What torch 2.13 asks for where it comes with CUDA.
TRITON ?= 3.7.1
TORCH_VENV = .venv-torch-$(TORCH)
KERNELS_VENV = .venv-kernels
CLIENTS_VENV = .venv-clients
TITAN_VENV = .venv-torchtitan
PAGES_VENV = .venv-pages

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
PINS := pyproject.toml constraints.txt

.PHONY: demo test test-slow test-benchmarks test-kernels test-kernels-slow test-clients test-torchtitan test-torch test-zoo test-pages schema pages lint docs clean

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/train_tensor_parallel.py

# The codec's library is built first, for no test to be the one that takes this time. Lint and types
# run beside the tests; what they say comes at the end.
test: $(VENV)/dev.stamp
	@TORCHINDUCTOR_CACHE_DIR=$${TORCHINDUCTOR_CACHE_DIR:-$(CURDIR)/.cache/inductor} \
		$(BIN)/python -c 'from rfcompile.codec import cpu_codec; cpu_codec.load_kernels()'
	@mkdir -p .cache; $(MAKE) --no-print-directory lint > .cache/lint.log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not benchmark and not slow'; tests=$$?; \
	wait $$lint; lint=$$?; cat .cache/lint.log; exit $$((tests || lint))

# Whole models, code generation, pages and examples: CI runs them after make test.
test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not benchmark'

test-benchmarks: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m benchmark

# Stopped, it goes on where it was; other sources start it anew.
test-zoo: $(VENV)/dev.stamp
	$(BIN)/python -m tests.breadth .cache/zoo.jsonl

# A file goes to one process: its tests share what they compile.
KERNELS_TESTS = $(KERNELS_VENV)/bin/python -m pytest -q -n 2 --dist loadfile \
	tests/codec/test_triton.py tests/inductor/test_emitted.py tests/emission

test-kernels: $(KERNELS_VENV)/kernels.stamp
	$(KERNELS_TESTS) -m 'kernels and not slow'

test-kernels-slow: $(KERNELS_VENV)/kernels.stamp
	$(KERNELS_TESTS) -m 'kernels and slow'

# Triton beside the packages of the other environment, whose torch would act otherwise with it.
$(KERNELS_VENV)/kernels.stamp: $(VENV)/dev.stamp
	$(call beside,$(KERNELS_VENV))
	$(KERNELS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet triton==$(TRITON)
	touch $@

test-clients: $(CLIENTS_VENV)/clients.stamp
	$(CLIENTS_VENV)/bin/python -m pytest -q -m clients tests/integrations

$(CLIENTS_VENV)/clients.stamp: $(VENV)/dev.stamp
	$(call beside,$(CLIENTS_VENV))
	$(CLIENTS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet \
		-c constraints.txt lightning
	touch $@

test-torchtitan: $(TITAN_VENV)/torchtitan.stamp
	$(TITAN_VENV)/bin/python -m pytest -q -m torchtitan tests/integrations

# What it asks for contradicts constraints.txt: the list is installed as it is.
$(TITAN_VENV)/torchtitan.stamp: $(VENV)/dev.stamp tests/integrations/torchtitan.txt
	$(call beside,$(TITAN_VENV))
	$(TITAN_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
		-r tests/integrations/torchtitan.txt triton==$(TRITON)
	touch $@

test-pages: $(PAGES_VENV)/pages.stamp
	@command -v chromium > /dev/null || { \
		echo "There is no chromium: apt-get install chromium" >&2; exit 1; }
	$(PAGES_VENV)/bin/python -m pytest -q -m pages tests/report/page

$(PAGES_VENV)/pages.stamp: $(VENV)/dev.stamp
	$(call beside,$(PAGES_VENV))
	$(PAGES_VENV)/bin/python -m pip install --disable-pip-version-check --quiet \
		-c constraints.txt playwright
	touch $@

# An environment that sees the packages of the other one, torch among them, and has some more.
define beside
	$(PYTHON) -m venv $(1)
	$(BIN)/python -c 'import sysconfig; path = sysconfig.get_path("purelib"); \
		print(f"import site; site.addsitedir({path!r})")' \
		> $$($(1)/bin/python -c 'import sysconfig; \
		print(sysconfig.get_path("purelib"))')/with_dev.pth
endef

# A warning is an error, a name without an entry in the reference too.
pages: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs docs/_build/html

# A test says when the page does not say what the reports do.
schema: $(VENV)/dev.stamp
	$(BIN)/python docs/schema.py > docs/reference/schema.md

docs: pages
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_docs_of_ranks.py

# Several GB for a torch that comes with CUDA. The other packages are those of constraints.txt.
test-torch: $(TORCH_VENV)/dev.stamp
	$(TORCH_VENV)/bin/python -m mypy --python-executable $(TORCH_VENV)/bin/python \
		--cache-dir $(TORCH_VENV)/mypy
	$(TORCH_VENV)/bin/python -m pytest -n 2 --dist worksteal -m 'not benchmark'

$(TORCH_VENV)/dev.stamp: $(PINS)
	$(PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --disable-pip-version-check --quiet torch==$(TORCH)
	grep -v '^torch==' constraints.txt > $(TORCH_VENV)/constraints.txt
	$(TORCH_VENV)/bin/python -m pip install --disable-pip-version-check --quiet \
		-c $(TORCH_VENV)/constraints.txt -e '.[dev]'
	touch $@

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-torch-* .venv-kernels .venv-clients .venv-torchtitan .venv-pages .cache .pytest_cache .mypy_cache .ruff_cache build dist docs/_build *.egg-info

# torch comes first and by exact version, so that no later install resolves it anew.
$(VENV)/demo.stamp: $(VENV)/torch.stamp $(PINS)
	$(PIP) -c constraints.txt -e '.[plots]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp $(PINS)
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/dev.stamp
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "rfcompile needs Python 3.11 or later, but '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=..." >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch==2.13.0
	touch $@
