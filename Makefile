# `make run` and `make test` do all of their own set-up in .venv; again in seconds when nothing changed.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r
CODE := webapp tests wsgi.py .github
EXAMPLES := .github/docs/examples/deploy-site.yml
LINTS := lint-python lint-types lint-templates lint-workflows lint-provisioning
WORKERS ?= 6# three for each core: most tests wait
# What one process compiles of the tests and of Milepost, hundreds read.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal

.PHONY: help run test check quick-tests test-provisioning lint $(LINTS) coverage fuzz mutations torture bench screenshots lock browser
.DELETE_ON_ERROR:

run: .venv/runtime ## serve; on an empty database with a rehearsal to look at
	@exec $(BIN)/python -m webapp

test: lint browser ## everything that CI checks: lint, both databases, the browser, the workflow
	$(PYTEST) --database=both

check: .venv/development ## the work in between: lint, pure tests and servers on SQLite; no browser, no slow starts, kills or waits
	@$(MAKE) --no-print-directory --jobs=6 --output-sync=target WORKERS=4 $(LINTS) quick-tests

quick-tests:
	@$(PYTEST) --quiet --tb=no -m "not browser and not workflow and not slow and not fuzz"

test-provisioning: .venv/development ## the playbook in a chroot: needs root and debootstrap
	$(BIN)/python -m pytest tests/provisioning --chroot

lint: .venv/development ## style, types, templates, workflows, playbook: side by side
	@$(MAKE) --no-print-directory --jobs=4 --output-sync=target $(LINTS)

lint-python:
	@$(BIN)/ruff check --quiet $(CODE)
	@$(BIN)/ruff format --quiet --check $(CODE)

lint-types:
	@$(BIN)/mypy --no-error-summary webapp tests wsgi.py
	@$(BIN)/mypy --no-error-summary .github

lint-templates:
	@$(BIN)/djlint --quiet --lint templates

lint-workflows:
	@$(BIN)/zizmor --quiet --offline --persona=auditor .github $(EXAMPLES)
	@$(BIN)/actionlint -shellcheck=$(BIN)/shellcheck .github/workflows/*.yml $(EXAMPLES)
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml $(EXAMPLES)
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-actions .github/actions/*/action.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec .github/deploy/compose.yml

lint-provisioning:
	@PATH="$(CURDIR)/$(BIN):$$PATH" ansible-lint -q --offline --profile=production .github/provisioning

help: ## list these targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' Makefile | expand -t 20

coverage: .venv/development browser ## which lines of webapp the tests run, those of servers and commands included
	@rm -rf .coverage && mkdir .coverage
	-$(BIN)/coverage run -m pytest --numprocesses=$(WORKERS) --dist=worksteal --quiet --database=both
	@$(BIN)/coverage combine --quiet && $(BIN)/coverage report

fuzz: .venv/development ## whatever hypothesis thinks up is sent to the doors; EXAMPLES=20000 for each
	EXAMPLES=$(or $(EXAMPLES),20000) $(PYTEST) -m fuzz --hypothesis-profile=long

mutations: .venv/development browser ## break the code on purpose, fault by fault; ONLY=name for one
	$(BIN)/python -m tests.mutations $(ONLY)

torture: .venv/development ## kills, restarts and want of memory under load, for a minute each
	TORTURE=60 $(PYTEST) --database=both tests/test_torture.py

bench: .venv/development ## measure; SCALE=0.1 for a small run, PEERS=folder to compare with healthchecks
	$(BIN)/python -m tests.bench --scale $(or $(SCALE),1) $(if $(PEERS),--peers $(PEERS))

screenshots: .venv/development browser ## the pages in every state, into .screenshots
	$(BIN)/python -m tests.screenshots

lock: .venv/development ## take the newest versions that fit
	$(BIN)/uv pip compile --upgrade --generate-hashes --universal --no-header -q pyproject.toml -o requirements.txt
	$(BIN)/uv pip compile --upgrade --generate-hashes --universal --no-header -q pyproject.toml --group dev -o requirements-dev.txt
	for group in provisioning configuration; do $(BIN)/uv pip compile --generate-hashes --universal --no-header -q --group $$group -c requirements-dev.txt -o .github/provisioning/requirements-$$group.txt; done

browser: .venv/development ## install the tests' browser and proxies where root and apt are at hand
	@$(BIN)/python -m tests.support.browser

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Milepost needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv --clear .venv

.venv/runtime: requirements.txt | .venv/bin/pip
	$(INSTALL) requirements.txt
	@touch $@

.venv/development: requirements-dev.txt | .venv/bin/pip
	$(INSTALL) requirements-dev.txt
	@touch $@ .venv/runtime
