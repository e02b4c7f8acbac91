# Every target sets up what is missing first. `make` lists the targets.
SHELL := /bin/bash

# A setting comes from make's own command line (`make lab-x QUICK=1`) and goes to the program as
# LABS_QUICK, as it was typed: make expands nothing in it, and it is never part of a shell's text.
# LABS_QUICK in the environment holds for every call; QUICK there is not read, and make says so.
SETTINGS := A AA AGAIN API_PRICE ARCHIVE AS B BASELINE DISTURBED DOCUMENTS DP ENDPOINT \
	ENDPOINT_METRICS ENGINE_COMMAND FORCE FRESH FROM GRAFANA_PORT GRAFANA_URL HAVE HELP JSON LAB LEAN LENGTHS \
	KEY LISTEN LOAD_WORKERS MACHINE MASTER METHOD MODEL ONLY OUT PART PLATFORM PORT PP PRECISION PREVIEW_PORT PRICE_PER_HOUR \
	PROFILING PROMETHEUS_DATA PROMETHEUS_PORT PROMETHEUS_URL PYTHON PYTHON_VERSION QUICK RATE \
	REPLICAS RESULTS RESUME ROUTER RUN SCRATCH SECONDS SEED SET SLO TESTS THRESHOLDS TO TP TRACE UNSAFE_FLAGS VARIANT \
	VLLM WEB_PORT WEIGHTS WITH_TREE WORKLOAD
SECRETS := GRAFANA_PASSWORD GRAFANA_TOKEN HF_TOKEN  # have one name, here as in the environment
# The names in $2 that come from $1: "command" (line) or "environment".
from = $(strip $(foreach name,$2,$(if $(filter $1,$(firstword $(origin $(name)))),$(name))))
$(foreach name,$(call from,command,$(SETTINGS)),\
	$(eval export LABS_$(name) := $$(value $(name)))$(eval unexport $(name)))
$(foreach name,$(call from,command,$(SECRETS)),$(eval override export $(name) := $$(value $(name))))
UNKNOWN := $(filter-out $(SETTINGS) $(SECRETS),$(call from,command,$(.VARIABLES)))
ifneq ($(and $(UNKNOWN),$(filter 0,$(MAKELEVEL))),)  # a make that calls this one may have its own
$(error there is no setting $(UNKNOWN), there are $(SETTINGS). A variable for another program goes \
	before make: NAME=.. make ..)
endif
STRAY := $(call from,environment,$(SETTINGS))
ifneq ($(STRAY),)
$(warning $(STRAY) in the environment: not read. A setting goes behind the target, \
	make $(or $(firstword $(MAKECMDGOALS)),lab-x) $(firstword $(STRAY))=.., and one for every call is \
	called LABS_$(firstword $(STRAY)))
endif
MAKEOVERRIDES :=  # no other make that a program starts has these settings

# Another vLLM has an environment of its own; to `make bundle`, VLLM= says which one to carry.
OTHER_VLLM := $(if $(filter bundle,$(MAKECMDGOALS)),,$(value LABS_VLLM))
ENVIRONMENT := $(if $(OTHER_VLLM),".tools/vllm-$$LABS_VLLM/.venv",.venv)
BIN := $(if $(wildcard .unbundled/bin),.unbundled/bin,$(ENVIRONMENT)/bin)
# It is told which settings were given behind the target, and refuses those that it does not take.
LABS := MAKE_SETTINGS="$(call from,command,$(SETTINGS))" $(BIN)/labs
DENO := DENO_DIR=.cache/deno DENO_NO_UPDATE_CHECK=1 $(BIN)/deno
PYTHON_HERE := "$${LABS_PYTHON:-python3}"
INSTALL := $(PYTHON_HERE) -m serving.install $(if $(OTHER_VLLM),--vllm "$$LABS_VLLM")
# Without the setting $1 a command shows what it takes.
or_help = $(if $(value LABS_$1),,--help)
# Pages and messages are UTF-8, whatever the locale.
export PYTHONUTF8 := 1
.DEFAULT_GOAL := help
.PHONY: help setup labs forecast plan diagnose labs-all draft adapters outliers sparsity quantize serve locust load-worker report words site score compare reproduce gate manifest-diff export leaderboard check-results readme watch watch-stop import dashboards stack stack-stop grafana-push preview preview-check doctor bundle unbundle test rehearse check bench locks clean distclean

help: ## List the targets
	@echo "Labs, in the order of the course (what is missing is installed first):"
	@sed -n 's/^ *_lab("\(.*\)"),$$/  make lab-\1/p' labs/__init__.py | tr _ -
	@echo "Targets:"
	@sed -n 's/^\([a-z -]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22
	@echo "Settings: QUICK=1  SET=\"field=value\"  AA=1  MODEL=  WEIGHTS=dummy  ENDPOINT=  SEED=  RESUME=1  AGAIN=1"
	@echo "          RESULTS=  TP=  PP=  DP=  PRICE_PER_HOUR=  VLLM=0.31.0 (in an environment of its own)"
	@echo "          PLATFORM=cpu|cuda  PYTHON=   (make lab-<name> HELP=1 explains)"

setup: ## Install what this machine needs, without running anything
	@$(INSTALL)

doctor: setup ## Check what this machine has and lacks, how to mend it, and which labs can run
	@$(LABS) doctor

labs: setup ## List the labs with the questions they answer
	@$(LABS) list

lab-%: setup ## Run a lab: predict, measure, judge, report
	@$(LABS) run $(if $(value LABS_HELP),--help,'$*')

forecast: setup ## Forecast labs without running them: LAB=..[,..]|all [MACHINE=h100 [TP=..]] [MODEL=..] [TRACE=..] [SLO=..] [REPLICAS=.. [ROUTER=..]] [OUT=x.md]
	@$(LABS) forecast $(call or_help,LAB)

plan: setup ## Plan capacity without a GPU: MACHINE=h100 [MODEL=..] [TP=..] [RATE=..|TRACE=..] [SLO=..] [REPLICAS=..]
	@$(LABS) plan $(call or_help,MACHINE)

labs-all: setup ## Run every lab in order, continuing where it stopped: [ONLY=a,b] [SECONDS=530] [ARCHIVE=x.tar.gz] [FRESH=1]
	@$(LABS) all

draft adapters outliers sparsity: setup ## Make the draft model, the LoRA adapters, the studies of outliers and zeros: [AGAIN=1]
	@$(LABS) make $@

quantize: setup ## Make quantized weights: METHOD=w8a8|w4a16-gptq|.. (make quantize lists them)
	@$(LABS) make "$${LABS_METHOD:---help}"

serve: setup ## Start a variant's engine: LAB=.. [VARIANT=..] [PORT=..]
	@$(LABS) serve

locust: setup ## Open Locust's web UI on a lab's workload: LAB=.. [WORKLOAD=..] [ENDPOINT=..] [WEB_PORT=..]
	@$(LABS) locust

load-worker: setup ## Send load for a run on another machine: MASTER=host:port [KEY=..]
	@$(LABS) load-worker $(call or_help,MASTER)

diagnose: setup ## Say what a running server's metrics point to: ENDPOINT=.. [ENDPOINT_METRICS=url,url] [SECONDS=30] or PROMETHEUS_URL=.. FROM=.. TO=.. [MODEL=..]; [BASELINE=x.json] [OUT=x.json]
	@$(LABS) diagnose $(if $(value LABS_PROMETHEUS_URL),,$(call or_help,ENDPOINT))

report: setup ## Compute reports again from recorded runs: [RUN=..]
	@$(LABS) report

words: setup ## Tell a lab's newest runs again after its page.md was edited, and show what changed: LAB=.. [OUT=site]
	@$(LABS) words $(call or_help,LAB)

site: setup ## Write the course and a page for every run as a website: [OUT=site]
	@$(LABS) site

score: setup ## Show what other tools would have reported for a run: RUN=..
	@$(LABS) score $(call or_help,RUN)

compare: setup ## Compare two runs, variants (run:variant) or machines: A=.. B=.. [FORCE=1] [OUT=x.html|x.md] [JSON=1]
	@$(LABS) compare $(call or_help,A)

reproduce: setup ## Repeat a recorded run and compare the two: RUN=..
	@$(LABS) reproduce $(call or_help,RUN)

gate: setup ## Fail if a run is worse than another: RUN=.. BASELINE=.. [THRESHOLDS=x.toml]
	@$(LABS) gate $(call or_help,RUN)

manifest-diff: setup ## Show what differs in how two runs were made: A=.. B=..
	@$(LABS) manifest-diff $(call or_help,A)

export: setup ## Write a run as tables, or in the format of vllm bench serve: RUN=.. AS=csv|parquet|vllm [OUT=..]
	@$(if $(filter parquet,$(value LABS_AS)),$(BIN)/python -c 'import pyarrow' 2> /dev/null || $(BIN)/python -m pip install --quiet 'pyarrow>=17')
	@$(LABS) export $(call or_help,RUN)

leaderboard: setup ## Show the claims of every lab on every machine: effect, interval, verdict, prediction
	@$(LABS) leaderboard

check-results: setup ## Check that recorded runs are readable and complete
	@$(LABS) check

readme: setup ## Write the generated parts of README.md and the pages in results/ again
	@$(LABS) readme

watch: setup ## Start a Prometheus that stays up between labs, with a live page: [PORT=..]
	@$(LABS) watch

watch-stop: setup ## Stop that Prometheus; its data are kept
	@$(LABS) watch-stop

import: setup ## Load finished runs into Prometheus at their own times: [RUN=".. .."]
	@$(LABS) import

dashboards: setup ## Write dashboards/grafana/*.json again from dashboards/boards.py
	@$(LABS) dashboards

stack: setup ## Start Prometheus and Grafana in containers: [GRAFANA_PORT=..] [PROFILING=1]
	@$(LABS) stack

stack-stop: setup ## Stop the containers; their data are kept
	@$(LABS) stack-stop

grafana-push: setup ## Send dashboards and runs to a running Grafana: GRAFANA_URL=.. (and GRAFANA_TOKEN)
	@$(LABS) grafana-push $(call or_help,GRAFANA_URL)

COMPONENTS := dashboards/preview/node_modules/.whole
$(COMPONENTS):
	@command -v npm >/dev/null || { echo "error: npm is not installed: the preview needs Node 20 or later" >&2; exit 1; }
	@cd dashboards/preview && npm install --no-audit --no-fund --no-package-lock && touch node_modules/.whole

preview: $(COMPONENTS) ## Draw the dashboards in a browser without Grafana: [PROMETHEUS_URL=..]
	@cd dashboards/preview && npm run --silent preview

preview-check: setup $(COMPONENTS) ## Draw the dashboards from a run, and check that no panel is empty
	@$(BIN)/pytest tests/fake/test_preview.py

bundle: setup ## Gather what a GPU machine without internet needs: [PYTHON_VERSION=3.12] [HAVE=pip-list.txt] [WITH_TREE=64M] [LEAN=1]
	@$(LABS) bundle

unbundle: ## On that machine: check and unpack a bundle: FROM=bundle TO=folder
	@$(PYTHON_HERE) -m serving.unbundle --from "$${LABS_FROM:-bundle}" "$$LABS_TO"

# The tests of one file stay in one process, in the order of tests/conftest.py: two processes begin
# with the labs on real engines, and two have the rest meanwhile. They are more than a small machine's
# cores, since each often waits for a window to end. Chosen folders run in two, another choice in one.
TOGETHER := --dist loadfile --no-loadscope-reorder
FOLDERS := $(wildcard tests/*/)
CHOSEN := $(value LABS_TESTS)
# folders alone may stand in a command: further processes are not told of PYTEST_ADDOPTS
SIDE_BY_SIDE := $(if $(filter-out $(FOLDERS) $(FOLDERS:/=),$(CHOSEN)),,-n $(if $(strip $(CHOSEN)),2,4) $(TOGETHER) $(CHOSEN))
# The tests start some hundred processes of these modules: each would compile them anew, which takes
# it a second or two, where PYTHONDONTWRITEBYTECODE is set, as it is in many containers.
test: setup ## Run the tests (unit, programs, weights, committed runs, fake engine, real vLLM on CPU, GPU if there is one): [TESTS=tests/unit]
	@PYTHONDONTWRITEBYTECODE= PYTEST_ADDOPTS="$$PYTEST_ADDOPTS$(if $(SIDE_BY_SIDE),, $$LABS_TESTS)" $(BIN)/pytest $(SIDE_BY_SIDE)

rehearse: setup ## Hold vLLM's CUDA build against the labs without a GPU (4 GB to download): [MACHINE=h100|l4|..|all]
	@$(BIN)/python -m tests.rehearsal

check: setup ## Lint, check formatting and types, and check the generated pages and results
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(DENO) lint --quiet && $(DENO) check --quiet dashboards/page tests/unit
	@$(LABS) readme --verify && $(LABS) check --committed

bench: setup ## Measure the lab's own instruments: [PART=streams|engine|neighbour|recording|overhead|aa|twins|soak|fleet|server]
	@$(BIN)/python -m bench

locks: setup ## Write serving/locks/ anew: newer hashes, and versions where those there no longer fit
	@$(BIN)/python -m serving.lock

clean: ## Remove .cache (models made here, data of `make watch`) and the tools' caches; results and .venv stay
	rm -rf .cache .pytest_cache .ruff_cache .mypy_cache

distclean: clean ## Also remove .venv and .tools, which the next target installs again
	rm -rf .venv .tools *.egg-info
