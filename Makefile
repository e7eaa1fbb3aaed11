# The commands of the project. `make` alone lists them.

CARGO ?= cargo
# Where cargo puts what it builds.
BIN = $(or $(CARGO_TARGET_DIR),target)/release

.DEFAULT_GOAL := help
.PHONY: help build digits test fmt lint

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

build: ## build the runner and the candle plugin
	$(CARGO) build --release -p retort -p retort-candle

digits: build ## distil a small teacher on handwritten digits (minutes; reused when called again)
	$(BIN)/retort run recipes/digits.yaml

# The tests run the real binary and load the real plugin, so both are built first.
test: build ## everything the project checks
	$(CARGO) test --release --workspace

fmt: ## format the code
	$(CARGO) fmt --all

lint: ## check format and lints, as the tests of a change do
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
