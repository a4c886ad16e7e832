# `make run` and `make test` do all of their own set-up in .venv; again in seconds when nothing changed.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r
CODE := webapp tests wsgi.py .github

.PHONY: run test test-provisioning lint bench screenshots lock browser
.DELETE_ON_ERROR:

run: .venv/runtime ## serve; on an empty database with a rehearsal to look at
	@exec $(BIN)/python -m webapp

test: lint browser ## everything that CI checks, on SQLite and on PostgreSQL
	$(BIN)/python -m pytest --database=sqlite
	$(BIN)/python -m pytest --database=postgresql -m doors

test-provisioning: .venv/development ## the playbook in a chroot: needs root and debootstrap
	$(BIN)/python -m pytest tests/provisioning --chroot

lint: .venv/development
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy webapp wsgi.py
	$(BIN)/djlint --quiet --lint templates
	$(BIN)/zizmor --quiet --offline --persona=auditor .github
	$(BIN)/actionlint -shellcheck=$(BIN)/shellcheck
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-actions .github/actions/*/action.yml
	PATH="$(CURDIR)/$(BIN):$$PATH" ansible-lint -q --offline --profile=production .github/provisioning

bench: .venv/development ## measure; SCALE=0.1 for a small run
	$(BIN)/python -m tests.bench --scale $(or $(SCALE),1)

screenshots: .venv/development browser ## the pages in every state, into .screenshots
	$(BIN)/python -m tests.screenshots

lock: .venv/development ## take the newest versions that fit
	$(BIN)/uv pip compile --upgrade --generate-hashes --universal --no-header -q pyproject.toml -o requirements.txt
	$(BIN)/uv pip compile --upgrade --generate-hashes --universal --no-header -q pyproject.toml --group dev -o requirements-dev.txt
	for group in provisioning configuration; do $(BIN)/uv pip compile --generate-hashes --universal --no-header -q --group $$group -c requirements-dev.txt -o .github/provisioning/requirements-$$group.txt; done

browser: .venv/development
	@$(BIN)/python -m tests.browser

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Milepost needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv --clear .venv

.venv/runtime: requirements.txt | .venv/bin/pip
	$(INSTALL) requirements.txt
	@touch $@

.venv/development: requirements-dev.txt | .venv/bin/pip
	$(INSTALL) requirements-dev.txt
	@touch $@ .venv/runtime
