# Everything runs in .venv, which the first target that needs it sets up from the ordinary package index and which is
# brought up to date when the metadata change.
PYTHON ?= python3
RECIPE ?= cjepa_scenes
ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help pretrain smoke demo test check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

pretrain: $(INSTALLED) ## pre-train with RECIPE (a name or a file), e.g. ARGS="--max_steps 5"
	$(BIN)/cjepa pretrain $(RECIPE) $(ARGS)

smoke: $(INSTALLED) ## pre-train for a few steps on a few images, into runs/smoke
	rm -rf runs/smoke
	$(BIN)/cjepa pretrain cjepa_scenes --max_steps 4 --num_train_images 256 --num_eval_images 128 --output_dir runs/smoke

demo: smoke ## with the model of smoke count objects, segment, carry masks through clips and fine-tune
	$(BIN)/cjepa evaluate runs/smoke/final --label_column count --num_train_images 512 --num_eval_images 256
	$(BIN)/cjepa probe segmentation runs/smoke/final --num_train_images 256 --num_eval_images 128 --num_probe_epochs 2
	$(BIN)/cjepa probe propagation runs/smoke/final --num_clips 8
	$(BIN)/cjepa finetune runs/smoke/final --num_train_images 256 --num_eval_images 128 --num_train_epochs 1 \
		--output_dir runs/smoke/classifier

test: $(INSTALLED) ## run the tests in WORKERS processes, e.g. ARGS="-k packaging"
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

check: $(INSTALLED) ## check style and formatting, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## mend what ruff can mend, then format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove build products, caches and runs/smoke; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache runs/smoke
	find modeling_cjepa trainers scripts tests -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp comes last, so the next call takes up an interrupted installation; a .venv that works is kept.
$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "cjepa needs Python 3.10 or newer, and '$(PYTHON)' is not: name one, e.g. make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@
