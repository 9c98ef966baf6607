# make install | demo | test-unit | test | nightly | lint | docs | clean. All output is in .venv and runs/ and is reused.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# With an NVIDIA driver the newest supported torch, without one the tested version; `make install TORCH='torch==...'`
# installs another.
TORCH ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo 'torch>=2.11,<2.15'; else echo 'torch==2.13.0'; fi)

# Processes of the test suite; more than the two cores, because some tests wait for a watchdog or for Slurm. All tests of a
# file run in one process (--dist loadfile), so that their fixtures are built once. Files start in the order of
# tests/conftest.py (--no-loadscope-reorder), longest first.
JOBS ?= 3

# Programs of the environment that are started from Python, such as deepspeed and ninja, are looked up on PATH.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: install demo test test-unit nightly docs lint clean

install: $(STAMP)
	@echo "== $(VENV) is up to date"

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "make: no '$(PYTHON)' here: install Python 3.11 or newer (Debian: apt-get install python3 python3-venv), or set PYTHON=/path/to/python." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$("$(PYTHON)" --version) is too old: W2R2-DS needs Python 3.11 or newer; set PYTHON=/path/to/python." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $$("$(PYTHON)" --version) cannot create virtual environments: install its venv package (Debian: apt-get install python3-venv)." >&2; exit 1; }
	@if "$(BIN)/python" -m pip --version >/dev/null 2>&1; then echo "== environment: reusing $(VENV)"; else echo "== environment: creating $(VENV)"; "$(PYTHON)" -m venv --clear "$(VENV)"; fi
	@echo "== installing $(TORCH)"
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	@echo "== installing W2R2-DS and its dependencies (constraints.txt); this takes minutes the first time"
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch "$@"
	@echo "== installed: $$("$(BIN)/python" -c 'import sys, torch; print("Python", sys.version.split()[0] + ", torch", torch.__version__)')"

demo: $(STAMP)
	@$(RUN) "$(BIN)/python" launchers/demo.py

test: $(STAMP)
	@$(RUN) "$(BIN)/python" -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Without the tests that start processes (distributed) or take long (slow, nightly): under 3 minutes on 2 cores.
test-unit: $(STAMP)
	@$(RUN) "$(BIN)/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not distributed and not slow and not nightly"

nightly: $(STAMP)
	@$(RUN) "$(BIN)/python" -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m nightly

# The documentation, in runs/site; `.venv/bin/mkdocs serve` shows a live preview. The variables are the documented switches
# of two announcements about successors of MkDocs: mkdocs-material's, and that of a dependency of mkdocs-gen-files.
docs: $(STAMP)
	@$(RUN) NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true "$(BIN)/mkdocs" build --strict --quiet
	@echo "== docs: runs/site/index.html"

lint: $(STAMP)
	"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"
	"$(BIN)/python" scripts/check_words.py
	"$(BIN)/shellcheck" -x .ci/run slurm/* tests/cluster/*.sh examples/*.sh docs/research/study/*.sh

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
