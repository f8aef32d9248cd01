# Everything from a bare clone; each target makes the environment it needs. `make help` lists the targets.
# make PYTHON=/path/to/python ... picks the interpreter; make CONFIG=configs/x.py demo another run.

CONFIG ?= configs/demo.py
WORKDIR ?= runs/demo
WORKERS ?= 2
# whole files: a fixture of a module may cost minutes, and would be made by both workers
# and a worker that dies ends the run: pytest-xdist may wait for ever for what the dead one had been given
PARALLEL = -n $(WORKERS) --dist loadfile --max-worker-restart=0
VENV := .venv
QUICK := not slow and not fuzz and not tfds and not seqio and not lm_eval and not transformers and not tpu

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export TF_CPP_MIN_LOG_LEVEL ?= 2
# with CI=true a missing Python is an error, elsewhere a reason to skip
NO_PYTHON = if [ "$$CI" = true ]; then echo "FAILED: $@ needs Python $(1)" >&2; exit 1; else echo "SKIPPED: $@ needs Python $(1)"; fi

.PHONY: help demo sft-demo rl-demo swarm-demo plan experiments-smoke setup test lint quick test-slow test-long test-tfds test-lm-eval test-tpu test-py312 fuzz run-tfds run-lm-eval run-py312 clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          train the whole model on text, images and video, evaluate it, write $(WORKDIR)/report.html"
	@echo "make sft-demo      fine-tune the demo on conversations; held-out image questions before and after"
	@echo "make rl-demo       a small model learns to count what is in images by reward; held-out images before and after"
	@echo "make swarm-demo    one agent and a swarm answer a wide question over real documents; a small orchestrator learns by reward"
	@echo "make plan          what Kimi K2.5 needs of three TPU pods: memory, predicted time and traffic (no TPU needed)"
	@echo "make test          style, types and the quick tests"
	@echo "make test-slow     long proofs, TFDS and seqio sources, lm-eval, transformers, the TPU compiler, Python 3.12"
	@echo "make fuzz          hostile files, requests and settings at random, many of each"
	@echo "make experiments-smoke   every experiment from data to README, two short runs of each"
	@echo "make lint          ruff and mypy only;   make quick    the quick tests only"
	@echo "make clean         forget environments and caches (runs/ is kept)"

# ------------------------------------------------------------------------------------------------------ environments

setup: $(VENV)/.ready-demo-test

$(VENV)/.ready-demo-test: setup.py constraints/py311.txt constraints/py312.txt
	@.ci/venv $(VENV) "3.11 3.12" demo,test

.venv312/.ready-demo-test: setup.py constraints/py312.txt
	@.ci/venv .venv312 "3.12" demo,test

.venv-tfds/.ready-demo-test-tfds-seqio: setup.py constraints/py311-tfds.txt
	@.ci/venv .venv-tfds "3.11" demo,test,tfds,seqio constraints/py311-tfds.txt

# torch first: the plain requirement of lm-eval would bring the CUDA build. The extra is `lm_eval`; pip 23 finds it only
# by its normalised name
.venv-lm-eval/.ready-demo-test-lm-eval-transformers: setup.py constraints/py311-lm-eval.txt
	@.ci/venv .venv-lm-eval "3.11" demo,test,lm-eval,transformers constraints/py311-lm-eval.txt torch==2.13.0

# -------------------------------------------------------------------------------------------------------------- demo

demo: setup
	@$(VENV)/bin/python -m kimi_jax.data tokenizer --config=$(CONFIG)
	@$(VENV)/bin/python -m kimi_jax.train --config=$(CONFIG)
	@$(VENV)/bin/python -m kimi_jax.report --workdir=$(WORKDIR)

# the demo model before and after SFT on conversations; `make demo` comes first, where it has not been run
sft-demo: setup
	@test -d $(WORKDIR)/checkpoints || $(MAKE) --no-print-directory demo
	@$(VENV)/bin/python -m kimi_jax.train --config=configs/sft/demo.py --config.init_from.path=$(WORKDIR)
	@$(VENV)/bin/python -m kimi_jax.eval.conversations --before=$(WORKDIR) --after=runs/sft_demo

# a small model that counts discs in images badly learns to do it by reward
rl-demo: setup
	@$(VENV)/bin/python -m kimi_jax.data tokenizer --config=configs/rl/count_sft.py
	@$(VENV)/bin/python -m kimi_jax.train --config=configs/rl/count_sft.py
	@$(VENV)/bin/python -m kimi_jax.rl --config=configs/rl/count.py
	@$(VENV)/bin/python -m kimi_jax.rl.page

# a script in the place of a model searches and reads by the real runtime, alone and as a swarm; then a small model learns
# by reward to be the orchestrator
swarm-demo: setup
	@$(VENV)/bin/python -m kimi_jax.agents.demo
	@$(VENV)/bin/python -m kimi_jax.agents.orchestration --out=runs/orchestrator
	@$(VENV)/bin/python -m kimi_jax.data tokenizer --config=configs/rl/orchestrate_sft.py
	@$(VENV)/bin/python -m kimi_jax.train --config=configs/rl/orchestrate_sft.py
	@$(VENV)/bin/python -m kimi_jax.rl --config=configs/rl/orchestrate.py
	@$(VENV)/bin/python -m kimi_jax.rl.orchestrator_page

# -------------------------------------------------------------------------------------------------------------- plan

# The TPU compiler has an environment of its own: where it is installed, jax looks for a TPU first.
.venv-plan/.ready-demo-test-tpu: setup.py constraints/py311.txt constraints/py312.txt
	@.ci/venv .venv-plan "3.11 3.12" demo,test,tpu

plan: .venv-plan/.ready-demo-test-tpu
	@.venv-plan/bin/python -m benchmarks.plan

# ------------------------------------------------------------------------------------------------------- experiments

# two runs of each, a few steps long, from data to README, in a folder of their own
experiments-smoke: setup
	@rm -rf runs/smoke
	@for name in $$($(VENV)/bin/python -c "from experiments.run import NAMES; print(*NAMES)"); do \
		$(VENV)/bin/python -m experiments $$name --scale=smoke --limit=2 --runs=runs/smoke || exit 1; done

# ------------------------------------------------------------------------------------------------------------- tests

test: lint quick

lint: setup
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

quick: setup
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "$(QUICK)"

test-slow:
	@$(MAKE) --no-print-directory test-long
	@$(MAKE) --no-print-directory test-tfds
	@$(MAKE) --no-print-directory test-lm-eval
	@$(MAKE) --no-print-directory test-tpu
	@$(MAKE) --no-print-directory test-py312

test-long: setup
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "slow and not fuzz and not tfds and not seqio and not lm_eval and not transformers and not tpu"

fuzz: setup
	$(VENV)/bin/python -m pytest $(PARALLEL) -m fuzz

test-tfds:
	@if .ci/find_python 3.11 >/dev/null; then $(MAKE) --no-print-directory run-tfds; else $(call NO_PYTHON,3.11); fi

test-lm-eval:
	@if .ci/find_python 3.11 >/dev/null; then $(MAKE) --no-print-directory run-lm-eval; else $(call NO_PYTHON,3.11); fi

test-tpu: .venv-plan/.ready-demo-test-tpu
	.venv-plan/bin/python -m pytest -m tpu

test-py312:
	@if .ci/find_python 3.12 >/dev/null; then $(MAKE) --no-print-directory run-py312; else $(call NO_PYTHON,3.12); fi

run-tfds: .venv-tfds/.ready-demo-test-tfds-seqio
	KIMI_SLOW=tfds .venv-tfds/bin/python -m pytest -m "tfds or seqio"

run-lm-eval: .venv-lm-eval/.ready-demo-test-lm-eval-transformers
	KIMI_SLOW=lm_eval .venv-lm-eval/bin/python -m pytest -m "lm_eval or transformers"

# what stands on jax, flax, Orbax, Grain and the interpreter itself, whose versions differ; the rest is code above these
STACK := $(addprefix tests/,data kernels nn optim parity sandbox train test_import.py)
run-py312: .venv312/.ready-demo-test
	.venv312/bin/python -m pytest $(PARALLEL) -m "$(QUICK)" $(STACK)

clean:
	rm -rf .venv .venv312 .venv-plan .venv-tfds .venv-lm-eval .cache build dist *.egg-info
