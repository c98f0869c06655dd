# Everything here works on a new machine with Python 3.10 or newer and make. Each target first sets up what it needs in
# .venv: the first run downloads, later ones start at once.
#
#   make demo        compile a real pretrained transformer and compare it with eager
#   make test        the tests, without those marked slow or cuda
#   make test-all    the slow ones too
#   make test-cuda   those that need a GPU
#   make test-browser  those that need Chromium and its driver
#   make test-examples  examples/pretrained, in .venv-examples with the packages that they need
#   make lint        ruff and mypy
#   make api-check   our use of TensorRT's API, against the versions that we support
#   make docs        write what is generated in docs/, and the site in build/site
#   make clean       remove .venv and every generated file

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11,<2.15
PYTEST_ARGS ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all test-cuda test-browser test-examples lint format api-check docs clean

demo: $(VENV)/.demo
	$(RUN) -m trt_dynamo demo

test: $(VENV)/.dev
	$(RUN) -m pytest -n 2 -q -m "not cuda and not slow and not browser and not examples" $(PYTEST_ARGS)

test-all: $(VENV)/.dev
	$(RUN) -m pytest -n 2 -q -m "not cuda and not browser and not examples" $(PYTEST_ARGS)

test-cuda: $(VENV)/.dev
	$(RUN) -m pytest -q -m cuda $(PYTEST_ARGS)

test-browser: $(VENV)/.dev
	$(RUN) -m pytest -q -m browser $(PYTEST_ARGS)

test-examples: .venv-examples/.ready
	.venv-examples/bin/python -m pytest -q -m examples tests/test_real_inputs.py $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --strict

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

api-check: $(VENV)/.dev
	$(RUN) -m scripts.check_api

docs: $(VENV)/.dev
	$(RUN) -m scripts.make_docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) .venv-examples .stubs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A stamp for each set of packages, newer than what names them. torch goes first, so that TORCH decides which one it is.
$(VENV)/.demo: EXTRAS = rtx,demo
$(VENV)/.dev: EXTRAS = rtx,demo,dev
$(VENV)/.demo $(VENV)/.dev: pyproject.toml | $(RUN)
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[$(EXTRAS)]"
	@touch $@

# Apart from $(VENV): two of these packages want older requirements than they work with, and go in without them.
.venv-examples/.ready: pyproject.toml $(wildcard examples/pretrained/*.txt)
	$(PYTHON) -m venv .venv-examples
	.venv-examples/bin/pip install --quiet "$(TORCH)" --requirement examples/pretrained/requirements.txt
	.venv-examples/bin/pip install --quiet --no-deps --requirement examples/pretrained/requirements_alone.txt
	.venv-examples/bin/pip install --quiet --editable ".[rtx]" "pytest>=8.2" "hypothesis>=6.100"
	@.venv-examples/bin/python -c "import torchaudio, torchvision" || { echo "torchaudio or torchvision was not made for \
	    this build of torch: name another, make test-examples TORCH=..." >&2; exit 1; }
	@touch $@

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else \
	    "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
