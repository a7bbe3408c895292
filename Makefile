# Every target sets up what it needs: a virtual environment with this package in .venv.
PYTHON ?= python3
RUN = .venv/bin/python
# Where the environments of other tools' packages are, or are made.
PEERS ?= .peers

.PHONY: install install-browser quickstart test check format exchange dashboards faults faults-long

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# What the tests of the pages need: Playwright and axe-core, into .venv, and Chromium, of this system
# (Debian's, where root may install it) or else of Playwright, which keeps it outside the repository.
install-browser: .venv/browser-installed

.venv/browser-installed: .venv/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	command -v chromium || command -v chromium-browser || \
	  (apt-get update -q && apt-get install -y -q --no-install-recommends chromium) || \
	  $(RUN) -m playwright install chromium
	touch $@

quickstart: install
	$(RUN) scripts/quickstart.py

test: install
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

exchange: install
	$(RUN) scripts/exchange.py --peers $(PEERS)
	$(RUN) scripts/other_tools.py --peers $(PEERS)

dashboards: install
	OMP_NUM_THREADS=1 $(RUN) scripts/neuronpedia.py --peers $(PEERS)

faults: install
	PYTHONPATH=tests $(RUN) -m faults

faults-long: install
	PYTHONPATH=tests $(RUN) -m faults --long

check: install
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright

format: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .
