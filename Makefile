# Two commands from a fresh clone: `make quickstart` runs a job, `make test` passes the tests.
# Both make .venv and install what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SGLANG := .venv-sglang
RUN := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: quickstart test unit e2e contract-sglang contract-sglang-before-sessions sglang lint crd clean

quickstart: $(STAMP)
	$(BIN)/asyncrl run examples/quickstart.yaml --out $(RUN)

# Two files at a time: most tests wait more than they compute. In order, since the quick ones stand last.
# Then, alone on the machine, a few tests whose pods run.
test: lint $(STAMP)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10 --ignore tests/e2e
	$(BIN)/pytest tests/e2e -m 'not slow'

unit: $(STAMP)
	$(BIN)/pytest tests/unit

# All tests whose pods run, on real nodes and from images of the Dockerfiles: as root, with KUBEUP.
e2e: $(STAMP)
	ASYNCRL_E2E_IMAGES=1 $(BIN)/pytest tests/e2e --durations 10

# What worker and weight sync rely on in an engine, tried on SGLang itself.
contract-sglang: $(STAMP) sglang
	ASYNCRL_SGLANG_PYTHON=$(CURDIR)/$(SGLANG)/bin/python $(BIN)/pytest tests/contract

# A job on the last SGLang whose updates have no session, which shares the other requirements.
contract-sglang-before-sessions: $(STAMP) sglang
	rm -rf $(SGLANG)-0.5.20 && cp -a $(SGLANG) $(SGLANG)-0.5.20
	$(SGLANG)-0.5.20/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.20
	ASYNCRL_SGLANG_PYTHON=$(CURDIR)/$(SGLANG)-0.5.20/bin/python $(BIN)/pytest tests/contract/test_job.py -k a_policy_is_trained

# SGLang for CPUs, in an environment of its own, for its pins are others than DeepSpeed's (3.5 GB). Its own
# requirements would bring CUDA, so they are listed here, and it comes without any.
sglang: $(SGLANG)/.installed
$(SGLANG)/.installed: images/sglang-cpu/requirements.txt images/sglang-cpu/without-requirements.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check -r images/sglang-cpu/requirements.txt
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		-r images/sglang-cpu/without-requirements.txt
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The CRD, the chart's copy of it and docs/reference.md, from the types.
crd: $(STAMP)
	$(BIN)/python -m asyncrl_api.crdgen
	$(BIN)/python -m asyncrl_operator.docgen

# torch first and pinned: any other spec may pull gigabytes of CUDA.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[local,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(SGLANG) $(SGLANG)-0.5.20
