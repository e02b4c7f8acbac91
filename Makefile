# Every target sets up what is missing first. `make` lists the targets.
SHELL := /bin/bash

# A setting comes from make's own command line (`make lab-x QUICK=1`) and goes to the program as
# LABS_QUICK, as it was typed: make expands nothing in it, and it is never part of a shell's text.
# LABS_QUICK in the environment holds for every call; QUICK there is not read, and make says so.
# The names in $2 that come from $1: "command" (line) or "environment".
from = $(strip $(foreach name,$2,$(if $(filter $1,$(firstword $(origin $(name)))),$(name))))
TYPED := $(call from,command,$(.VARIABLES))
# First of all: a call of the shell would have make expand what is exported.
$(foreach name,$(TYPED),$(eval unexport $(name)))
# The settings are the rows of the tables in docs/knobs.md; secrets have one name everywhere.
SETTINGS := $(sort $(shell sed -n 's/^| `\([A-Z_]*\)=.*/\1/p' docs/knobs.md))
SECRETS := GRAFANA_PASSWORD GRAFANA_TOKEN HF_TOKEN
$(foreach name,$(filter $(SETTINGS),$(TYPED)),$(eval export LABS_$(name) := $$(value $(name))))
$(foreach name,$(filter $(SECRETS),$(TYPED)),$(eval override export $(name) := $$(value $(name))))
STRAY := $(call from,environment,$(SETTINGS))
ifneq ($(STRAY),)
$(warning $(STRAY) in the environment: not read. A setting goes behind the target, \
	make $(or $(firstword $(MAKECMDGOALS)),lab-x) $(firstword $(STRAY))=.., and one for every call is \
	called LABS_$(firstword $(STRAY)))
endif
MAKEOVERRIDES :=  # no other make that a program starts has these settings

# Another vLLM has an environment of its own; to `make bundle`, VLLM= says which one to carry.
OTHER_VLLM := $(if $(filter bundle,$(MAKECMDGOALS)),,$(value LABS_VLLM))
# What only reads runs needs neither vLLM nor torch: it does not wait for a set-up of both.
READING := check-results compare diagnose export report score site words
ALL_SET_UP := $(wildcard .venv/bin/labs .unbundled/bin)
LIGHT := $(if $(OTHER_VLLM)$(ALL_SET_UP)$(filter-out $(READING),$(or $(MAKECMDGOALS),help)),,--light)
ENVIRONMENT := $(if $(OTHER_VLLM),".tools/vllm-$$LABS_VLLM/.venv",$(if $(LIGHT),.tools/light/.venv,.venv))
BIN := $(if $(wildcard .unbundled/bin),.unbundled/bin,$(ENVIRONMENT)/bin)
LABS := $(BIN)/labs
DENO := DENO_DIR=.cache/deno DENO_NO_UPDATE_CHECK=1 $(BIN)/deno
PYTHON_HERE := "$${LABS_PYTHON:-python3}"
INSTALL := $(PYTHON_HERE) -m serving.packaging.install $(LIGHT) $(if $(OTHER_VLLM),--vllm "$$LABS_VLLM")
# A target is explained by Python alone, as it is typed: with HELP=1, where no recipe runs, and in the
# place of a command that lacks the setting $1.
EXPLAIN := labs/harness/cli/settings.py --help
with = $(if $(value LABS_$1),$(LABS) $2,$(PYTHON_HERE) $(EXPLAIN) $@ $@ --)
# Pages and messages are UTF-8, whatever the locale.
export PYTHONUTF8 := 1
.DEFAULT_GOAL := help
.PHONY: help setup labs forecast plan judge diagnose drill labs-all derive serve report words site score compare reproduce export check-results readme watch stop import stack grafana-push doctor bundle unbundle test rehearse check bench locks clean distclean

# Before anything starts, one sentence refuses a target or a setting that is not there or went, and
# a setting that no target of this call takes. A make that calls this one may have variables of its own.
TARGETS := $(shell sed -n 's/^\.PHONY://p' $(firstword $(MAKEFILE_LIST)))
GIVEN := $(filter-out $(SECRETS),$(if $(filter 0,$(MAKELEVEL)),$(TYPED),$(filter $(SETTINGS),$(TYPED))))
ifneq ($(strip $(GIVEN) $(filter-out $(TARGETS) lab-%,$(MAKECMDGOALS))),)
quoted = $(foreach word,$1,'$(subst ','\'',$(word))')
REFUSED := $(shell python3 labs/harness/cli/settings.py $(call quoted,$(MAKECMDGOALS)) -- $(call quoted,$(GIVEN)))
ifneq ($(REFUSED),)
$(error $(REFUSED))
endif
endif

ifneq ($(value LABS_HELP),)
SHELL := python3
.SHELLFLAGS = $(EXPLAIN) $@ $(MAKECMDGOALS) --
.ONESHELL:
endif

help: ## List the targets
	@cat docs/targets.txt

setup: ## Install what this machine needs, without running anything
	@$(INSTALL)

doctor: setup ## Check what this machine has and lacks, how to mend it, and which labs can run
	@$(LABS) doctor

labs: setup ## List the labs with the questions they answer
	@$(LABS) list

lab-%: setup ## Run a lab: predict, measure, judge, report
	@$(LABS) run '$*'

forecast: setup ## Forecast labs without running them
	@$(call with,LAB,forecast)

plan: setup ## Plan capacity without a GPU
	@$(call with,MACHINE,plan)

judge: setup ## Hold forecasts against GPU runs that others have published
	@$(call with,DATA,judge)

labs-all: setup ## Run every lab in order, continuing where it stopped
	@$(LABS) all

derive: setup ## Make a derived model or a study by hand
	@$(call with,NAME,derive)

serve: setup ## Start a variant's engine
	@$(LABS) serve

diagnose: setup ## Say what a running server's metrics point to
	@$(call with,$(if $(value LABS_PROMETHEUS_URL),PROMETHEUS_URL,ENDPOINT),diagnose)

drill: setup ## Name what is wrong with an engine that runs here
	@$(LABS) drill

report: setup ## Compute reports again from recorded runs
	@$(LABS) report

words: setup ## Tell a lab's newest runs again after its page.md was edited, and show what changed
	@$(call with,LAB,words)

site: setup ## Write the course and a page for every run as a website, without vLLM where none is installed
	@$(LABS) site

score: setup ## Show what other tools would have reported for a run
	@$(call with,RUN,score)

compare: setup ## Compare two runs, variants (run:variant) or machines: A=.. B=.. [FORCE=1] [OUT=x.md|x.json] [FAIL_IF=worse]
	@$(call with,A,compare)

reproduce: setup ## Repeat a recorded run, or play another tool's benchmark or a published figure here
	@$(if $(value LABS_COMMAND)$(filter PUBLISHED,$(TYPED)),$(LABS) reproduce,$(call with,RUN,reproduce))

export: setup ## Write a run as tables
	@$(call with,RUN,export)

check-results: setup ## Check that recorded runs are readable and complete
	@$(LABS) check

readme: setup ## Write the generated parts of README.md and the pages in results/ again
	@$(LABS) readme
	@$(BIN)/python -m docs.annotated_report

watch: setup ## Start a Prometheus that stays up between labs, with a live page
	@$(LABS) watch

stop: setup ## Stop what `make watch` or `make stack` started; the data are kept
	@$(LABS) stop

import: setup ## Load finished runs into Prometheus at their own times
	@$(LABS) import

stack: setup ## Start Prometheus and Grafana in containers
	@$(LABS) stack

grafana-push: setup ## Send dashboards and runs to a running Grafana: GRAFANA_URL=.. (and GRAFANA_TOKEN)
	@$(call with,GRAFANA_URL,grafana-push)

bundle: setup ## Gather what a GPU machine without internet needs
	@$(LABS) bundle

unbundle: ## On that machine: check and unpack a bundle: FROM=bundle TO=folder
	@$(PYTHON_HERE) -m serving.unbundle --from "$${LABS_FROM:-bundle}" $(if $(value LABS_TO),"$$LABS_TO",--help)

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
test: setup ## Run the tests (unit, programs, weights, committed runs, fake engine, real vLLM on CPU, GPU if there is one)
	@PYTHONDONTWRITEBYTECODE= PYTEST_ADDOPTS="$$PYTEST_ADDOPTS$(if $(SIDE_BY_SIDE),, $$LABS_TESTS)" $(BIN)/pytest $(SIDE_BY_SIDE)

rehearse: setup ## Hold vLLM's CUDA build against the labs without a GPU (4 GB to download)
	@$(BIN)/python -m tests.rehearsal

check: setup ## Lint, check formatting and types, and check the generated pages and results
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(DENO) lint --quiet && $(DENO) check --quiet dashboards/page tests/unit
	@$(LABS) readme --verify && $(LABS) check --committed

bench: setup ## Measure the lab's own instruments
	@$(BIN)/python -m bench

locks: setup ## Write serving/locks/ anew: newer hashes, and versions where those there no longer fit
	@$(BIN)/python -m serving.packaging.lock

clean: ## Remove .cache (models made here, data of `make watch`) and the tools' caches; results and .venv stay
	rm -rf .cache .pytest_cache .ruff_cache .mypy_cache

distclean: clean ## Also remove .venv and .tools, which the next target installs again
	rm -rf .venv .tools
