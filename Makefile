# Everything runs in .venv, which the first target makes; a second run reuses it.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup extras demo test test-all lab notebooks figures lint benchmark

setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

extras: .venv/extras  ## what `pip install captionlib[ray]` adds

.venv/extras: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[ray]'
	@touch $@

demo: setup  ## the main job on drawn scenes: about 6 minutes on 2 CPU cores
	$(BIN)/captionlib demo

test: setup lint  ## the core tests; lists what was skipped and why
	$(BIN)/pytest -m "not slow and not gpu"

test-all: extras  ## all of them, the slow ones and those of extras too
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: setup  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

notebooks: setup  ## run the five notebooks in place, from nothing, and clean what git would see
	rm -rf data/scenes runs/scenes
	for name in processdata_01 processdata_02 processdata_03 train_encoder_decoder infer_encoder_decoder; do \
		TQDM_DISABLE=1 $(BIN)/jupyter execute --inplace --timeout=900 notebooks/$$name.ipynb || exit 1; done
	$(BIN)/nbstripout --keep-output notebooks/*.ipynb

figures:  ## images/ from the pictures that the notebooks drew
	cp $(foreach name,captions labels loss truth heat_maps,runs/scenes/figures/$(name).png) images/

benchmark: setup  ## how fast the data comes, beside its peers: about an hour
	$(BIN)/python benchmarks/data.py
