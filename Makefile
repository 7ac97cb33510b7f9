# Two commands from a fresh clone: `make quickstart` runs a job, `make test` passes the tests.
# Both make .venv and install what they need. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SGLANG := .venv-sglang
RUN := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# As many test files at a time as there are cores: most tests wait more than they compute. Each worker has
# servers and processes of its own, so more than eight would rather get in each other's way.
WORKERS := --numprocesses logical --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help quickstart test unit fuzz e2e contract-sglang contract-sglang-before-sessions sglang lint crd docs \
	constraints kube-tools gpu-bundle gpu-check clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-34s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(STAMP) ## Run examples/quickstart.yaml: a tiny transformer learns to add (about five minutes).
	$(BIN)/asyncrl run examples/quickstart.yaml --out $(RUN)

# In order, since the quick ones stand last. Then, alone on the machine, a few tests whose pods run.
test: lint docs $(STAMP) ## Run linters, types, docs and every test that this machine can run (about 25 minutes on two cores).
	$(BIN)/pytest $(WORKERS) --no-loadscope-reorder --durations 10 --ignore tests/e2e
	$(BIN)/pytest tests/e2e -m 'not slow'

unit: $(STAMP) ## Run the unit tests (under a minute).
	$(BIN)/pytest tests/unit --quiet $(WORKERS)

fuzz: $(STAMP) ## Hand every parser of foreign data a million cases (hours; CASES=1000 for a look).
	cd tests && ../$(BIN)/python -m support.fuzz --cases $(or $(CASES),1000000)

e2e: $(STAMP) ## Run all tests in pods, from built images: as root, with KUBEUP (about 35 minutes).
	ASYNCRL_E2E_IMAGES=1 $(BIN)/pytest tests/e2e --durations 10

contract-sglang: $(STAMP) sglang ## Run the contract of engines on SGLang itself.
	ASYNCRL_SGLANG_PYTHON=$(CURDIR)/$(SGLANG)/bin/python $(BIN)/pytest tests/contract

# The last SGLang whose updates have no session, which shares the other requirements.
contract-sglang-before-sessions: $(STAMP) sglang ## Run a job on the SGLang before weight update sessions.
	rm -rf $(SGLANG)-0.5.20 && cp -a $(SGLANG) $(SGLANG)-0.5.20
	$(SGLANG)-0.5.20/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.20
	ASYNCRL_SGLANG_PYTHON=$(CURDIR)/$(SGLANG)-0.5.20/bin/python $(BIN)/pytest tests/contract/test_job.py -k a_policy_is_trained

# In an environment of its own, for its pins are others than DeepSpeed's (3.5 GB). Its own requirements would
# bring CUDA, so they are listed here, and it comes without any.
sglang: $(SGLANG)/.installed ## Install SGLang for CPUs into an environment of its own.
$(SGLANG)/.installed: images/sglang-cpu/requirements.txt images/sglang-cpu/without-requirements.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check -r images/sglang-cpu/requirements.txt
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		-r images/sglang-cpu/without-requirements.txt
	touch $@

gpu-bundle: $(STAMP) ## Pack what gpu-check needs on a machine without a network into .gpu-bundle (with the repository under 64 MB).
	$(BIN)/python scripts/gpu_bundle.py .gpu-bundle

gpu-check: ## Measure the trainer on one GPU, without a network (ten minutes); says so where there is none.
	scripts/gpu_check.sh

lint: $(STAMP) ## Check style, format, types and the boundaries between packages.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

crd: $(STAMP) ## Write the CRD, the chart's copy of it, the spec's views and parts of the docs from the types.
	$(BIN)/python -m asyncrl_api.crdgen
	$(BIN)/python -m asyncrl_operator.docgen

docs: $(STAMP) ## Build the documentation as a site, strictly: a broken link is an error.
	$(BIN)/mkdocs build --strict --site-dir $(VENV)/site

constraints: | $(BIN)/python ## Write constraints.txt from the newest versions that pyproject.toml allows.
	$(BIN)/pip install --dry-run --ignore-installed --quiet --report $(VENV)/report.json torch==2.13.0 \
		--editable '.[local,dev,docs,hub]'
	$(BIN)/python scripts/write_constraints.py $(VENV)/report.json > constraints.txt

kube-tools: ## Say how tests find a control plane without the kit.
	@$(PYTHON) scripts/kubeup.py tools

# torch first and pinned: any other spec may pull gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[local,dev,docs]'
	touch $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean: ## Remove the virtual environments.
	rm -rf $(VENV) $(SGLANG) $(SGLANG)-0.5.20
