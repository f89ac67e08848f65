# Everything is installed into .venv/; `build/` holds the editable install's links and the stamps.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The strict editable install links each file, so a new file needs the install again.
FILES := $(shell ls runtime/*.py backends/*.py exporters/*.py integrations/*.py models/* 2>/dev/null | cksum | cut -d' ' -f1)
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
INSTALL = $(PIP) install --quiet -c constraints.txt --config-settings editable_mode=strict

.PHONY: demo test coverage check dev bench bench-performance bench-streaming bench-styles bench-diffusion
.PHONY: bench-architectures reliability acceptance train eval-model docs locked lock audit clean

demo: build/.openvino-$(FILES)
	$(BIN)/python benchmarks/demo.py out

test: build/.dev-$(FILES)
	$(PYTEST)

# In a run of its own: tracing lines makes exports half as slow again.
coverage: build/.dev-$(FILES)
	$(PYTEST) --cov --cov-report=term --cov-fail-under=90

check: build/.dev-$(FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dev: build/.dev-$(FILES)
	$(BIN)/pre-commit install

bench: build/.dev-$(FILES)
	$(BIN)/anysize bench --quick

# Throughput, start-up, random sizes, cost by size; needs ../shared/assets. Writes docs/performance.md.
bench-performance: build/.dev-$(FILES)
	$(BIN)/python benchmarks/performance.py $(PARTS)

# Streaming against the whole picture, tiles and the raw engine; needs ../shared/assets.
bench-streaming: build/.dev-$(FILES)
	$(BIN)/python benchmarks/streaming.py $(PARTS)

# AnimeGANv2: engines, batches, exact tiles, memory, sizes; needs ../shared/assets. Writes docs/animegan-measured.md.
bench-styles: build/.dev-$(FILES)
	$(BIN)/python benchmarks/styles.py

# Parts of diffusers' models against eager PyTorch; needs ../shared/assets. Writes docs/diffusion-measured.md.
bench-diffusion: build/.dev-$(FILES)
	$(BIN)/python benchmarks/diffusion.py

# Architectures that spandrel knows, on each engine. Writes docs/architectures.md.
bench-architectures: build/.dev-$(FILES)
	$(BIN)/python benchmarks/architectures.py

# Thousands of faults, kills and hostile inputs, an hour or two. Writes docs/reliability.md.
reliability: build/.dev-$(FILES)
	$(BIN)/python benchmarks/reliability.py $(PARTS)

# The figures that need ../shared/assets: engines against each other, tiles against the whole.
acceptance: build/.dev-$(FILES)
	$(BIN)/python benchmarks/acceptance.py

# The bundled models, from nothing or from where they stopped, then models/ and training/NAME.md; -j2: side by side.
MODELS = default default-x2
train: $(MODELS:%=train-%)
	for name in $(MODELS); do $(BIN)/python -m training.publish $$name || exit 1; done

train-%: build/.dev-$(FILES)
	$(BIN)/python -m training.train $*

# The bundled models' figures; needs ../shared/assets. Writes docs/bundled-models.md and out/eval-NAME.png.
eval-model: build/.dev-$(FILES)
	$(BIN)/python -m training.evaluate

# The setting silences Material's notice of its own end of life.
docs: build/.docs-$(FILES)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The environment from requirements-locked.txt: each file by its digest, PyTorch by its version.
locked: .venv
	$(BIN)/pip install --require-hashes --no-deps -r requirements-locked.txt
	$(BIN)/pip install --no-deps "$$(grep ^torch== constraints.txt)"
	PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 $(MAKE) dev

# constraints.txt with the digest of every file that an index may give, the same for Linux, macOS and Windows; without
# PyTorch, whose build differs. For Windows, because elsewhere PyTorch may ask for CUDA.
lock: build/.dev-$(FILES)
	$(PIP) install --quiet uv==0.13.9
	printf 'spandrel\neinops\n' | $(BIN)/uv pip compile --quiet pyproject.toml - --extra dev -c constraints.txt \
		--generate-hashes --no-header --no-annotate --python-version 3.11.9 --python-platform windows \
		--no-emit-package torch --no-emit-package torchvision -o requirements-locked.txt

# Known vulnerabilities of what the tests run with; needs an index that tells them.
audit: build/.dev-$(FILES)
	$(PIP) install --quiet pip-audit==2.10.1
	$(BIN)/pip-audit --strict --disable-pip --no-deps -r constraints.txt

build/.%-$(FILES): pyproject.toml constraints.txt | .venv
	$(INSTALL) -e ".[$*]"
# spandrel asks for torchvision, which does not load beside every build of PyTorch, and then breaks others too
	@test $* != dev || $(INSTALL) --no-deps spandrel einops
	@mkdir -p build && touch $@

.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "anysize needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

clean:
	rm -rf build dist out .venv .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
