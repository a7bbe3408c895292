# Every target sets up what it needs: a virtual environment with this package in .venv.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: install install-browser quickstart test check format exchange faults faults-long

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Chromium, of this system or else of Playwright; it stands outside the repository. axe-core comes
# with the packages of `make install`.
install-browser: install
	command -v chromium || command -v chromium-browser || \
	  (apt-get update -q && apt-get install -y -q --no-install-recommends chromium) || \
	  $(RUN) -m playwright install chromium

quickstart: install
	$(RUN) scripts/quickstart.py

test: install
	$(RUN) -m pytest -n 2

exchange: install
	$(RUN) scripts/exchange.py

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
