# Two commands matter: `make demo` and `make test`. Each installs what it needs into .venv first.
PY := .venv/bin/python
STAMP := .venv/.installed

# Many processes of the tests import the same modules: each is compiled once.
unexport PYTHONDONTWRITEBYTECODE
# Of the installed plugins, only these are imported by each process of the tests.
PLUGINS := --disable-plugin-autoload -p xdist -p _hypothesis_pytestplugin

.PHONY: docs demo postgres demo-adapters check quick test suite test-all test-oldest coverage lint install dist proof gpu contracts mutants parity page story fields settings reference licences release soak bench bench-peers starter clean

$(STAMP): pyproject.toml constraints.txt starter/pyproject.toml tools/install.sh
	sh tools/install.sh
	touch $@

install: $(STAMP)

demo: $(STAMP) ## the same prompt by each starter, then by the first again
	.venv/bin/safelight demo --out out/demo

demo-adapters: $(STAMP) ## the same prompt plain, with each starter adapter, with both, and plain again
	.venv/bin/safelight demo --adapters --out out/demo-adapters

lint: $(STAMP) ## ruff, its format, pyright strict, the import rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/lint-imports

check: $(STAMP) ## what a change needs at once: lint, types, and the tests that draw no image
	$(MAKE) --no-print-directory -j2 lint quick

QUICK := tests/families/test_tables.py tests/families/test_only_here.py tests/memory tests/pictures tests/queue tests/request tests/weights \
	tests/test_errors.py tests/test_settings.py tests/test_structure.py tests/test_tools.py

quick: $(STAMP) ## the tests that draw no image, in one process
	$(PY) -m pytest $(PLUGINS) $(QUICK) --ignore tests/memory/test_beside.py --ignore tests/request/test_added_field.py \
		-m "not proof and not full" --no-header -q

test: $(STAMP) ## what CI runs: lint, types and import rules beside the tests
	$(MAKE) --no-print-directory -j2 lint suite

suite: $(STAMP) ## the tests alone, and the ten slowest of them
	$(PY) -m pytest $(PLUGINS) -n 2 --dist worksteal -m "not proof and not full" --durations=10 --no-header -q

# The programs that wrote tests/data/packed_weights.json. They are large, so `make test` does without.
WRITERS := .venv/.writers
$(WRITERS): $(STAMP) constraints.txt
	$(PY) -m pip --disable-pip-version-check install --quiet --no-deps -c constraints.txt bitsandbytes comfy-kitchen
	touch $@

test-all: lint $(WRITERS) ## every case of every matrix, and longer sequences
	TEST_SCALE=all $(PY) -m pytest $(PLUGINS) -n 2 --dist worksteal -m "not proof" --durations=20 --no-header -q

postgres: $(STAMP) ## the tests of servers, with PostgreSQL in place of SQLite
	SAFELIGHT_TEST_POSTGRES=1 $(PY) -m pytest $(PLUGINS) -n 2 --dist worksteal -m "not proof and not full and not sqlite" tests/server tests/clients --no-header -q

test-oldest: ## the core of the tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	sh tools/test_oldest.sh

coverage: $(STAMP) ## the same tests, and which lines they run; a quarter slower
	.venv/bin/coverage erase
	$(PY) -m pytest -n 2 --dist worksteal -m "not proof" --cov --cov-report= --no-header -q
	.venv/bin/coverage report --fail-under=90 --skip-covered

proof: $(STAMP) ## the long versions of the checks; writes their figures to docs/proof.md
	$(PY) tools/proof.py docs/proof.md

gpu: $(if $(filter .venv/%,$(PY)),$(STAMP)) ## everything that a GPU could do wrong, and how fast it is: make gpu DEVICE=cuda
	$(PY) tools/gpu.py --device $(or $(DEVICE),auto)

contracts: $(STAMP) ## the devices' suite on one device: make contracts DEVICE=mps
	SAFELIGHT_CONTRACTS_DEVICE=$(DEVICE) $(PY) -m pytest tests/contracts --no-header -q

mutants: $(STAMP) ## protections are removed one at a time: their tests must go red
	$(PY) tools/mutants.py

parity: $(STAMP) ## the tests that compare with other programs, as a page
	$(PY) tools/parity.py docs/parity.md

docs: ## the documentation as a site that can be searched, in build/site
	python3 -m venv build/docs-venv
	build/docs-venv/bin/python -m pip install -q -r tools/docs-requirements.txt
	build/docs-venv/bin/python -m mkdocs build -f mkdocs.yml

page: $(STAMP) ## the types of the page's scripts, and all its tests in a browser
	$(PY) tools/check_page.py
	$(PY) -m pytest -q -m "not proof" tests/server/page

story: $(STAMP) ## each suspect of the reports injected into the running program, with pictures
	$(PY) tools/story.py docs/the-story.md

fields: $(STAMP) ## the documentation's table of a request's fields
	$(PY) tools/fields.py docs/fields.md

settings: $(STAMP) ## the documentation's table of settings
	$(PY) tools/settings.py docs/settings.md

reference: $(STAMP) ## the documentation's pages of commands, routes and errors
	$(PY) tools/reference.py docs

licences: $(STAMP) ## the licence of every package that Safelight needs
	$(PY) tools/licences.py docs/licences.md

release: $(STAMP) ## a release: make release VERSION=0.2.0; OPTIONS=--dry-run prints its steps
	$(PY) tools/release.py $(VERSION) $(OPTIONS)

soak: $(STAMP) ## a thousand random combinations, twice; then sequences of switches and failures for an hour
	$(PY) -m pytest tests/stateful/test_combinations.py -m proof -s -q --no-header
	PYTHONPATH=tests $(PY) tools/soak.py 3600

bench: $(STAMP) ## switching and memory, side by side with plain diffusers; needs about 12 GB of disk and 12 GB of memory
	$(PY) benchmarks/switching.py
	$(PY) benchmarks/memory.py

bench-peers: $(STAMP) ## switching beside InvokeAI and stable-diffusion.cpp, each in an environment of its own
	$(PY) benchmarks/peers.py

starter: $(STAMP) ## train the starter checkpoints anew (hours), from the registry's image packages
	cd starter && ../$(PY) -m recipe.judge && ../$(PY) -m recipe.train && ../$(PY) -m recipe.export && ../$(PY) -m recipe.measure
	cd starter && ../$(PY) -m recipe.adapters && ../$(PY) -m recipe.control
	cd starter && ../$(PY) -m recipe.flux.train && ../$(PY) -m recipe.flux.export && ../$(PY) -m recipe.flux.measure

# build makes the wheel from the source archive, so an archive that lacks a file fails here.
HELP := src/safelight/server/page/help
dist: $(STAMP) docs ## a wheel and a source archive of Safelight and of the starters, in dist/
	rm -rf dist $(HELP)
	cp -r build/site $(HELP)
	$(PY) -m build --outdir dist --wheel $(if $(shell command -v uv),--installer uv) .
	rm -rf $(HELP)
	$(PY) -m build --outdir dist --sdist $(if $(shell command -v uv),--installer uv) .
	$(PY) -m build --outdir dist $(if $(shell command -v uv),--installer uv) starter

clean:
	rm -rf .venv .venv-oldest out build dist .coverage .pytest_cache .ruff_cache
