PYTHON ?= $(shell command -v python3.11 || echo python3)
PORT ?= 8000
PROFILE ?= demo-cpu
PAGE_PORT ?= 7860
MINUTES ?= 20
EXAMPLES ?= 20000
HOST ?= http://127.0.0.1:8000
RATE ?= 1
DURATION ?= 60
PROCESSES ?= 1
ROUNDS ?= 5
BIN := .venv/bin
CLUSTER := RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1 RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY=1 RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE=1114112 RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response" RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0 RAY_SERVE_CONTROL_LOOP_INTERVAL_S=1 RAY_SERVE_METRICS_EXPORT_INTERVAL_MS=5000
APT := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium redis-server postgresql fonts-dejavu-core $$(command -v npm >/dev/null || echo npm)
HINT := "make setup: .venv is not complete, the next make starts it again. If torch was not found, let pip see PyTorch's index of CPU wheels too."
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help setup system serve chat cluster-demo test test-gpu test-unit check fix bench-overhead overload soak calibrate load compare compare-runs tails peers tenants guesses fairness crosscheck fuzz canary lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

# .venv/cpu.txt, a copy of the lock, is written last: where it differs, the set-up is outdated or was interrupted and is done again.
setup: ## build .venv from requirements/cpu.txt, or do nothing when it is up to date
	@flock --nonblock Makefile true || echo "make setup: waiting for another one in this directory"
	@cmp -s requirements/cpu.txt .venv/cpu.txt || rm -f .venv/cpu.txt
	@flock Makefile $(MAKE) -s .venv/.installed

.venv/cpu.txt:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; v.startswith("3.11.") or sys.exit("make setup: the lock is for Python 3.11, got " + v + ". Name a Python 3.11: make setup PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv --clear .venv && $(BIN)/python -m pip install --quiet pip==25.3
	@$(BIN)/python -m pip install --no-deps -r requirements/cpu.txt && cp requirements/cpu.txt $@ || { echo $(HINT) >&2; exit 1; }

.venv/.installed: .venv/cpu.txt pyproject.toml
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e . && touch $@

serve: setup ## serve a profile: make serve [PORT=8000] [PROFILE=demo-cpu]
	@$(BIN)/borg-serve serve --config configs/$(PROFILE).yaml --set server.port=$(PORT)

# Whatever ends it, what it started ends before it; what it waits for runs in the background, so that a signal is heard at once.
chat: setup ## the chat page, and a server behind it if none answers: make chat [PORT=8000] [PAGE_PORT=7860]
	@pids=; trap 'kill $$pids 2>/dev/null; wait' EXIT; trap 'exit 0' INT TERM; $(BIN)/borg-serve demo-model & pids=$$!; wait $$pids || exit; pids=; \
	if ! $(BIN)/python -c 'import httpx; httpx.get("http://127.0.0.1:$(PORT)/health", timeout=2)' 2>/dev/null; then \
	$(BIN)/borg-serve serve --config configs/$(PROFILE).yaml --set server.port=$(PORT) & pids="$$pids $$!"; fi; \
	$(BIN)/borg-serve ui --api http://127.0.0.1:$(PORT) --port $(PAGE_PORT) & page=$$!; pids="$$pids $$page"; wait $$page

cluster-demo: setup ## two replicas of the demo on a Ray cluster of this machine: make cluster-demo [PORT=8000]
	@$(BIN)/borg-serve demo-model && mkdir -p build && sed 's/port: 8000/port: $(PORT)/' deploy/demo-cpu.yaml > build/demo-cpu.yaml
	@$(CLUSTER) $(BIN)/serve run build/demo-cpu.yaml

# Debian's packages for tests: a browser, the Redis that keeps a cluster's state, PostgreSQL for the usage ledger, and npm for clients of Node.js. Without root or apt those tests are skipped, and say so.
system: ## install chromium, redis-server, postgresql and npm where they are missing and we may
	@command -v chromium >/dev/null && command -v redis-server >/dev/null && command -v npm >/dev/null && { command -v postgres || ls /usr/lib/postgresql/*/bin/postgres; } >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	{ $(APT) || { apt-get update -qq && $(APT); }; }; } || echo "make system: chromium, redis-server, postgresql or npm is missing; the tests that need them are skipped." >&2

test: setup system ## run every test that a CPU can run
	$(BIN)/python -m pytest

test-gpu: ## run the tests of a CUDA device, in an environment with borg-serve[gpu,test]: make test-gpu BORG_GPU_MODEL=DIRECTORY BORG_GPU_DEMO=DIRECTORY BORG_GPU_QWEN=DIRECTORY
	BORG_GPU_MODEL=$(BORG_GPU_MODEL) BORG_GPU_DEMO=$(BORG_GPU_DEMO) BORG_GPU_QWEN=$(BORG_GPU_QWEN) python3 -m pytest -m gpu tests/gpu

test-unit: setup ## run the tests that start nothing and import neither vLLM nor torch
	$(BIN)/python -m pytest tests/unit

check: setup ## format, lint, imports and types; changes nothing
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

fix: setup ## format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-overhead: setup ## compare this server with vLLM's stock server, into docs/results/overhead.md and .json
	$(BIN)/python -m loadtests.experiments.overhead

overload: setup ## ten times more load than fits for a minute, into docs/results/overload.md and .json
	$(BIN)/python -m loadtests.experiments.overload

soak: setup ## mixed load with aborts: make soak [MINUTES=20], into docs/results/soak.md and .json
	$(BIN)/python -m loadtests.experiments.soak --minutes $(MINUTES)

calibrate: setup ## the load generator's own error, into build/calibration.json and docs/results/calibration.md and .json
	$(BIN)/python -m loadtests.experiments.calibrate

load: LOCUST = --rate $(RATE) --duration $(DURATION) $(if $(filter-out 1,$(PROCESSES)),--processes $(PROCESSES)) $(ARGS)
load: setup ## judge a running server: make load PROFILE=steady [HOST= RATE=1 DURATION=60 SLO= PROCESSES=1 WEB=1 ARGS=]; report in build/load
	@$(BIN)/python -m loadtests.load $(patsubst demo-cpu,steady,$(PROFILE)) --host $(HOST) $(if $(SLO),--slo $(SLO)) $(if $(WEB),--web) $(LOCUST)

compare: setup ## our server, vLLM's, Ray Serve LLM and the original app in turn: make compare [ROUNDS=5 ARGS=], into docs/results/compare-cpu.md
	$(BIN)/python -m loadtests.experiments.compare --rounds $(ROUNDS) $(ARGS)

compare-runs: setup ## two load reports beside each other: make compare-runs A=build/load/steady/run.json B=OTHER/run.json
	@$(BIN)/python -m loadtests.report.comparison $(A) $(B) $(ARGS)

tails: setup ## ours beside vLLM's server for identities that end elsewhere in a KV block, into docs/results/tails-cpu.md
	$(BIN)/python -m loadtests.experiments.tails $(ARGS)

peers: setup ## on a GPU: ours beside vLLM with its Rust front end: make peers ARGS="--set model.path=DIRECTORY --peer-site DIRECTORY", into docs/results/peers.md and .json
	$(BIN)/python -m loadtests.experiments.peers $(ARGS)

tenants: setup ## what keys, private KV blocks, fair share and the ledger cost, into docs/results/tenants.md and .json
	$(BIN)/python -m loadtests.experiments.tenants $(ARGS)

guesses: setup ## whether time or usage tells what another key asked, into docs/results/guesses.md and .json
	$(BIN)/python -m loadtests.experiments.guesses $(ARGS)

fairness: setup ## whether one key's flood takes from another key: make fairness [ARGS="--replicas 1"], into docs/results/fairness.md and .json
	$(BIN)/python -m loadtests.experiments.fairness $(ARGS)

crosscheck: setup ## others' benchmarks beside ours on a running server: make crosscheck [HOST= ARGS=], into docs/results/crosscheck.md
	$(BIN)/python -m loadtests.experiments.crosscheck --host $(HOST) $(ARGS)

fuzz: setup ## hostile requests on every route of a real server: make fuzz [EXAMPLES=20000]
	HYPOTHESIS_PROFILE=search EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/engine/test_hypothesis.py

canary: setup ## try another vLLM, into docs/results/canary-VLLM.md: make canary VLLM=0.33.0
	$(BIN)/python -m tests.canary $(VLLM)

lock: ## make requirements/cpu.txt anew from requirements/cpu.in and requirements/cpu-exclude.txt
	$(PYTHON) -m venv --clear .venv-lock && .venv-lock/bin/python -m pip install pip==25.3
	.venv-lock/bin/python -m pip install -r requirements/cpu.in -c requirements/cpu.txt && .venv-lock/bin/python -m pip uninstall -qy -r requirements/cpu-exclude.txt
	.venv-lock/bin/python -m pip freeze --all --exclude pip > .venv-lock/cpu.txt && mv .venv-lock/cpu.txt requirements/cpu.txt && rm -r .venv-lock

clean: ## remove everything that make made, .venv included
	rm -rf .venv .venv-lock build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find borg_serve loadtests tests -name __pycache__ -prune -exec rm -rf {} +
