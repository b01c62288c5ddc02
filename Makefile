# Everything runs in .venv, which is made on first use and again whenever setup.cfg or the interpreter changes.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
EXTRAS ?= test
VENV ?= .venv
RUN := $(VENV)/bin/python
# A test keeps about one core busy. Neighbours stay on one worker: they share what is compiled.
WORKERS ?= 2
PYTEST := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(RUN) -m pytest -n $(WORKERS) --dist=worksteal
READY := $(VENV)/ready-$(EXTRAS)

.PHONY: train test test-slow soak lint benchmark setup clean

train: setup
	$(RUN) -m experiments.train --config=configs/kha_tiny.py --workdir=runs/kha_tiny

test: setup
	$(PYTEST)

# What takes longer: faults on real runs, two processes, variants on meshes.
test-slow: setup
	$(PYTEST) -m slow

soak: setup
	$(RUN) -m tests.soak
	$(RUN) -m tests.soak --processes=2 --kills=10

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

benchmark: EXTRAS = test,interop
benchmark: setup
	$(RUN) -m experiments.benchmark

# The stamp holds the interpreter and a checksum of setup.cfg; nothing happens while it is up to date.
setup:
	@test -n "$(PYTHON)" || { echo "kha_jax needs Python 3.11 or newer; name one with PYTHON=/path/to/python" >&2; exit 2; }
	@want="$$($(PYTHON) -V 2>&1) $$(cksum < setup.cfg)"; \
	if [ -x $(RUN) ] && [ "$$($(RUN) -V 2>&1)" != "$$($(PYTHON) -V 2>&1)" ]; then rm -rf $(VENV); fi; \
	if [ "$$(cat $(READY) 2>/dev/null)" = "$$want" ]; then exit 0; fi; \
	echo "setting up $(VENV) with $$($(PYTHON) -V) and extras [$(EXTRAS)]"; \
	{ [ -x $(RUN) ] || $(PYTHON) -m venv $(VENV); } && \
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]" && \
	echo "$$want" > $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
