# The commands of the project. `make` alone lists them.

CARGO ?= cargo
# Where cargo puts what it builds.
BIN = $(or $(CARGO_TARGET_DIR),target)/release

.DEFAULT_GOAL := help
.PHONY: help build libtorch digits schema test gpu-check fmt lint

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

build: ## build the runner and the candle plugin
	$(CARGO) build --release -p retort -p retort-candle

# LIBTORCH names a libtorch that is there already; without it, and without one in the active Python environment, pip
# installs one into .venv. The link .libtorch remembers which.
libtorch: ## build the libtorch plugin too, and get libtorch first where it is missing (CUDA=1: for GPUs)
	@plugins/libtorch/get-libtorch $(if $(CUDA),cuda)
	env -u LIBTORCH $(CARGO) build --release -p retort-libtorch

digits: build ## distil a small teacher on handwritten digits (minutes; reused when called again)
	$(BIN)/retort run recipes/digits.yaml

# Editors check recipes with it; a test says when it is out of date.
schema: build ## write recipes/retort.schema.json anew
	$(BIN)/retort schema --plugin candle > recipes/retort.schema.json

# The tests run the real binary and load the real plugins, so these are built first.
test: build ## everything the project checks
	$(CARGO) test --release
	@if plugins/libtorch/get-libtorch; then \
	    $(MAKE) --no-print-directory libtorch && env -u LIBTORCH $(CARGO) test --release -p retort-libtorch; \
	else \
	    echo '*** The tests of the libtorch plugin were SKIPPED: there is no libtorch (the reason stands above). ***' >&2; \
	fi

gpu-check: build ## the suites and a short digits recipe on a GPU, with every plugin that was built for one
	@plugins/gpu-check $(BIN)

fmt: ## format the code
	$(CARGO) fmt --all

lint: ## check format and lints, as the tests of a change do
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --all-targets -- -D warnings
	@if [ -e .libtorch ]; then env -u LIBTORCH $(CARGO) clippy --release -p retort-libtorch --all-targets -- -D warnings; \
	else echo 'lint: plugins/libtorch was not looked at (make libtorch)' >&2; fi
