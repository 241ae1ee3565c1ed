# make help says what there is.

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install
# One torch for everybody: any other version may bring gigabytes of CUDA. It is named in every install, so that none changes it.
TORCH  := torch==2.13.0
JOBS   ?= 2
PYTHON ?=
# The rows of benchmarks/tasks.py.
TASKS  := mnist-mlp fashion-mnist-mlp mnist-conv fashion-mnist-conv nmnist braille

.DELETE_ON_ERROR:
.PHONY: help demo test check benchmarks data clean

help:
	@echo "make demo    install everything into $(VENV), then train, inspect and run a network on Lava (runs/demo/report.html)"
	@echo "make test    run the whole test suite ($(JOBS) processes; JOBS=n changes that)"
	@echo "make check   lint, types, import contracts"
	@echo "make benchmarks DATA=...   accuracies and dead neurons on real data, hours: docs/results.md; goes on where it was stopped,"
	@echo "                           and in several terminals shares the work. DATA or SPIKEPROP_DATA: folder of the data files"
	@echo "make clean   remove $(VENV) and what builds and tools left behind; runs/ stays"
	@echo
	@echo "PYTHON=...       the Python to use, 3.10 to 3.13; otherwise the first that works of python3, python3.13 ... python3.10"
	@echo "TORCH_INDEX=...  where to get torch, e.g. https://download.pytorch.org/whl/cpu for the small build without CUDA"

demo: $(VENV)/run.stamp
	$(BIN)/spikeprop demo

# One torch thread per process: the tests' networks are small, and the processes share the cores.
test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

check: $(VENV)/check.stamp
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread each, so that the same command in several terminals has a core for each; they never make the same cell.
benchmarks: export SPIKEPROP_DATA := $(or $(DATA),$(SPIKEPROP_DATA))
benchmarks: export OMP_NUM_THREADS := 1
benchmarks: data $(VENV)/run.stamp
	@set -e; for task in $(TASKS); do $(BIN)/python benchmarks/evidence.py --task $$task; done
	@set -e; for data in digits fashion-mnist; do $(BIN)/python benchmarks/stress.py --data $$data; done
	$(BIN)/python benchmarks/results_page.py

data:
	@test -d "$$SPIKEPROP_DATA" || { echo "no data in '$$SPIKEPROP_DATA'; name their folder: make benchmarks DATA=..."; exit 1; }

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# A stamp stands for a finished install: a recipe that fails or is interrupted leaves none.
$(VENV)/run.stamp: pyproject.toml Makefile | $(BIN)/pip
	@echo "installing torch (about 200 MB; on Linux some GB with CUDA, see TORCH_INDEX in make help) ..."
	@$(PIP) --quiet "pip>=25.1"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "installing spikeprop, Lava and what they need (about 100 MB) ..."
	@PYTHONWARNINGS=ignore $(PIP) --quiet $(TORCH) --editable ".[report,lava,fast,formats]"
	@$(PIP) --quiet --no-deps --ignore-requires-python lava-nc==0.10.0
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	@echo "installing what the tests need: pytest, snnTorch, NIR, Norse, SpikingJelly ..."
	@$(PIP) --quiet $(TORCH) --group test
	@$(PIP) --quiet --no-deps --no-build-isolation norse==1.1.0 spikingjelly==2.0.0 loguru==0.7.3
	@touch $@

$(VENV)/check.stamp: $(VENV)/run.stamp
	@echo "installing ruff, mypy and import-linter ..."
	@$(PIP) --quiet $(TORCH) --group check
	@touch $@

# A name on the PATH proves nothing (it may be a version manager's empty shim), so each candidate is run.
define PROBE
import importlib.util as u, sys
usable = u.find_spec("ensurepip")
print(sys.version.split()[0] + ("" if usable else " without ensurepip (on Debian and Ubuntu: apt install python3-venv)"))
sys.exit(not (usable and (3, 10) <= sys.version_info[:2] < (3, 14)))
endef
export PROBE

$(BIN)/pip:
	@for name in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
		if version=$$($$name -c "$$PROBE" 2>/dev/null); then \
			echo "creating $(VENV) with $$name ($$version) ..."; exec $$name -m venv --clear $(VENV); \
		fi; \
		found="$$found$$(printf '\n  %s: %s' $$name "$${version:-missing, or does not run}")"; \
	done; \
	printf 'spikeprop needs Python 3.10, 3.11, 3.12 or 3.13. Found:%s\n' "$$found"; \
	echo "Install one of them, or name it: make PYTHON=/path/to/python3.12"; exit 1
