# make tour   the whole system on the tiny models, one HTML report (tour/report.html)
# make test   the tests          make test-fast   without the slow ones      make test-all   the long ones, too
# make lint   ruff and mypy
# make tiny-omni, make tiny-rewriter   train what recipes/tiny says, on two cores: hours; goes on where it was stopped
#
# All create the environment first (.venv, once). torch is installed alone and first, so that nothing else can pull
# another build. Choose the build with TORCH_ARGS, which goes to pip as it is, for example
#   make tour TORCH_ARGS="--index-url <the index of a CPU or CUDA build, see pytorch.org/get-started/locally>"
# To change the build later: make clean-venv first.

VENV ?= .venv
PIN := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
TORCH_ARGS ?= $(PIN)
TEST_ARGS ?=
TOUR_ARGS ?=

# The first interpreter that runs and is new enough; `make PYTHON=...` overrules.
ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c "$(ENOUGH)" >/dev/null 2>&1 && { echo $$p; break; }; done)
# Options alone (an index) still need the requirement itself.
TORCH := $(if $(filter torch% %.whl,$(TORCH_ARGS)),,$(PIN)) $(TORCH_ARGS)
STAMP := $(VENV)/.weft-installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

TRAIN := OMP_NUM_THREADS=1 $(VENV)/bin/python -m torch.distributed.run --standalone --nproc_per_node=2 -m weft.train

.PHONY: tiny-omni tiny-rewriter venv tour test test-fast test-all lint pins clean-venv
.DEFAULT_GOAL := venv

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c "$(ENOUGH)" 2>/dev/null || { \
		echo "weft needs Python 3.11 or newer (found: $$($(or $(PYTHON),python3) --version 2>&1 | head -n 1));" \
			"name one with make PYTHON=/path/to/python3.12" >&2; \
		exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "$(PYTHON) cannot create a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2; \
		exit 2; }
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

tour: venv
	$(VENV)/bin/weft tour $(TOUR_ARGS)

# One worker a core, one thread a worker; a file stays with its worker, so that its fixtures are made once.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: venv
	$(PYTEST) $(TEST_ARGS)

test-fast: venv
	$(PYTEST) -m 'not slow' $(TEST_ARGS)

test-all: venv
	$(PYTEST) -m '' $(TEST_ARGS)

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

tiny-omni: venv
	test -d runs/tiny/omni_init || \
		$(VENV)/bin/python -m weft.models.build_flux recipes/tiny/omni.yaml tiny-kontext runs/tiny/omni_init
	$(TRAIN) recipes/tiny/omni_base.yaml
	$(TRAIN) recipes/tiny/omni_edit.yaml
	$(TRAIN) recipes/tiny/omni_generation.yaml
	$(VENV)/bin/python -m weft.models.share runs/tiny/omni_base/export tiny-kontext src/weft/zoo/tiny-omni \
		--adapter edit=runs/tiny/omni_edit/export --adapter generation=runs/tiny/omni_generation/export \
		--steps 12 --guidance 1

tiny-rewriter: venv
	test -d runs/tiny/rewriter_init || \
		$(VENV)/bin/python -m weft.models.build_vlm recipes/tiny/rewriter_model.yaml runs/tiny/rewriter_init
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m weft.train recipes/tiny/rewriter.yaml

# After a deliberate upgrade in a fresh environment: write what was installed, without the local part of a build (+cpu).
pins: venv
	{ sed '/^[^#]/,$$d' constraints.txt; $(PIP) freeze --exclude-editable | sed 's/+[^ ]*$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean-venv:
	rm -rf $(VENV)
