# Each target does all of its own set-up: `make demo` in a fresh checkout works.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
CODE := src tests benchmarks scripts

.PHONY: help venv demo test soak fuzz check docs man bench bench-all clean

help:
	@echo "make demo   a running guest moves, and you watch; make demo WATCH=1: in a browser"
	@echo "make test   the whole test suite (installs what it needs when root)"
	@echo "make soak   break migrations at random for MINUTES=10, one line a minute"
	@echo "make fuzz   mutate what is read from peers and files until stopped, or MUTATIONS=1000000 times"
	@echo "make check  format, lint, types, layers, spelling"
	@echo "make docs   the documentation site, in build/site; make man: the man pages, in build/man"
	@echo "make bench  measure, side by side with a real QEMU; bench-all: that and all that follows"
	@echo "make bench-snapshots, bench-snapshotting, bench-restores, bench-receives, bench-working_sets, bench-recoveries, bench-block_reads, bench-back_ends, bench-inspecting, bench-waking, bench-linux, bench-links, bench-watching, bench-felt   a part each"

venv: $(VENV)/.ready

# Made again only when the settings change.
$(VENV)/.ready: pyproject.toml scripts/requirements.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/requirements.py > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
		-r $(VENV)/requirements.txt -e .
	$(BIN)/python -m compileall -q src
	touch $@

demo: venv
	$(BIN)/postcopy demo $(if $(WATCH),--watch)

# The picture in the README, of a run made for it.
.PHONY: picture
picture: venv
	.ci/install-browser
	$(BIN)/python scripts/draw_watch.py

# Processes that tests run in, side by side; 0: pytest's own alone.  Two take 17 minutes on two CPUs in place
# of about 30, but each guest and each QEMU then has half a CPU, on which one test in 5000 has been late.
WORKERS ?= 0

test: venv
	.ci/install-tools --if-root
	.ci/install-qemu --if-possible
	.ci/install-peers --if-possible
	.ci/install-headers --if-possible
	.ci/install-browser --if-possible
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

MINUTES ?= 10

soak: venv
	PYTHONPATH=tests:. $(BIN)/python -m faults.soak --minutes $(MINUTES) $(SOAK)

MUTATIONS ?= 0

# READERS="precopy pack" chooses; SEED=1 begins there, and else at random.
fuzz: venv
	PYTHONPATH=src:tests $(BIN)/python -m fuzzing --mutations $(MUTATIONS) $(if $(SEED),--seed $(SEED)) $(READERS)

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell $(CODE) docs *.md changelog.d .ci Makefile pyproject.toml

# A warning is an error: a link that leads nowhere, a page that no table of contents has.
docs: venv
	$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/site
	@echo "build/site/index.html"

man: venv
	$(BIN)/python scripts/make_man.py build/man
	@echo "man -l build/man/postcopy.1"

# What benchmarks run beside; where .ci/install-qemu unpacks it.
CACHES := $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)
QEMU := $(if $(POSTCOPY_QEMU),$(POSTCOPY_QEMU),$(CACHES)/postcopy/qemu)/10.0/bin

bench: venv
	.ci/install-qemu --if-possible
	PATH="$(QEMU):$$PATH" $(BIN)/python -m benchmarks $(BENCH)

# One after the other, whichever fails: make -k bench-all.
bench-all: bench bench-snapshots bench-snapshotting bench-restores bench-receives bench-working_sets bench-recoveries bench-block_reads bench-back_ends bench-inspecting bench-waking bench-linux

bench-all: bench-watching bench-felt bench-links

# bench-recoveries and so on: the other commands in benchmarks/.
bench-%: venv
	.ci/install-qemu --if-possible
	PATH="$(QEMU):$$PATH" PYTHONPATH=tests $(BIN)/python -m benchmarks.$* $(BENCH)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
