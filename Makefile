# The commands of the project. `make` alone lists them.

CARGO ?= cargo
# Where cargo puts what it builds.
BIN = $(or $(CARGO_TARGET_DIR),target)/release

.DEFAULT_GOAL := help
.PHONY: help book build libtorch cuda cuda-test digits emoji schema test test-long soak libfuzzer deny gpu-artefacts gpu-check gpu-bench fmt lint

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

build: ## build the runner and the candle plugin
	$(CARGO) build --release -p retort -p retort-candle

# LIBTORCH names an existing libtorch; without it, and without one in the active Python environment, pip installs one into
# .venv. The link .libtorch remembers the choice.
libtorch: ## build the libtorch plugin too; gets libtorch first if it is missing (CUDA=1: for GPUs)
	@plugins/libtorch/get-libtorch $(if $(CUDA),cuda)
	env -u LIBTORCH $(CARGO) build --release -p retort-libtorch

# In a separate target directory, because with other features everything above candle is a different build. CUDA_HOME names an
# existing toolkit; without it, and without an nvcc, pip installs one into .cuda.
CUDA_DIR = $(or $(CARGO_TARGET_DIR),target)/cuda
CUDA_ENV = root=$(abspath $(CUDA_DIR))/toolkit; CUDA_HOME=$$root CUDA_PATH=$$root PATH=$$root/bin:$$PATH \
    NVCC=$(CURDIR)/plugins/candle/nvcc CUDA_COMPUTE_CAP=$(or $(CUDA_COMPUTE_CAP),90)
cuda: build ## build the candle plugin's CUDA variant too; no GPU is needed (CUDA_COMPUTE_CAP=90)
	@plugins/candle/get-cuda $(CUDA_DIR)/toolkit
	$(CUDA_ENV) $(CARGO) build --release -p retort-candle --features cuda --target-dir $(CUDA_DIR)
	install -m 755 $(CUDA_DIR)/release/libretort_candle.so $(BIN)/libretort_candle.cuda.so

# An emulated GPU: the kernels compiled for the host. The variant runs on it unchanged.
cuda-test: cuda ## the checks of gpu-check on an emulated GPU (many minutes; PART=operations: those with that in their name)
	$(CUDA_ENV) $(CARGO) build --release -p retort-tests --features cuda --bin retort-gpu --target-dir $(CUDA_DIR)
	$(CUDA_ENV) $(CARGO) test --release -p retort-candle --features cuda --lib --target-dir $(CUDA_DIR) cuda::
	plugins/candle/emulator/build $(CUDA_DIR)/emulator
	LD_LIBRARY_PATH=$(abspath $(CUDA_DIR))/emulator RETORT_GPU=emulated $(CUDA_DIR)/release/retort-gpu check "$(PART)"

digits: build ## distil a small teacher on handwritten digits (minutes; reused when called again)
	$(BIN)/retort run recipes/digits.yaml

emoji: build ## distil a small teacher on emoji: real colour images (longer; reused when called again)
	$(BIN)/retort run recipes/emoji.yaml

# Editors check recipes with it; a test fails when it is out of date.
schema: build ## regenerate recipes/retort.schema.json
	$(BIN)/retort schema --plugin candle > recipes/retort.schema.json

# The tests run the real binary and load the real plugins, so these are built first. Many spend most of their time waiting for
# Slurm or a process, so twice as many run at once as there are processors.
test: export RUST_TEST_THREADS := $(or $(RUST_TEST_THREADS),$(shell expr 2 \* $$(nproc)))
test: build ## run the tests, except a few that take many minutes (test-long)
	@if plugins/libtorch/get-libtorch; then \
	    env -u LIBTORCH $(CARGO) build --release --workspace --lib --bins --tests && \
	    env -u LIBTORCH $(CARGO) test --release --workspace; \
	else \
	    $(CARGO) test --release || exit 1; \
	    echo '*** The tests of the libtorch plugin were SKIPPED: there is no libtorch (see the reason above). ***' >&2; \
	    test -z "$$RETORT_SKIP_IS_FAILURE"; \
	fi

test-long: build ## the tests that `make test` leaves out: minutes to an hour
	$(CARGO) test --release -p retort-engine --lib -- --ignored --nocapture
	$(CARGO) test --release -p retort-tests --no-fail-fast -- --ignored --nocapture --test-threads 1
	@if [ -e .libtorch ]; then \
	    env -u LIBTORCH $(CARGO) test --release -p retort-libtorch -- --ignored --nocapture --test-threads 1; \
	else \
	    echo '*** The long tests of the libtorch plugin were SKIPPED: make libtorch ***' >&2; \
	    test -z "$$RETORT_SKIP_IS_FAILURE"; \
	fi

# MINUTES=600 for a long run. All choices follow from SEED; inputs that crash something are kept in target/soak.
soak: build ## hostile inputs for all readers, and runs that are killed at random (MINUTES=10 SEED=1)
	$(CARGO) build --release -p retort-soak
	$(BIN)/retort-soak all --minutes $(or $(MINUTES),10) --seed $(or $(SEED),1)

# A fuzzer's flags, for a stable compiler; everything is rebuilt with them. Add the inputs it finds to the corpus.
FUZZ_DIR = $(or $(CARGO_TARGET_DIR),target)/libfuzzer
FUZZ_FLAGS = --cfg fuzzing -Cpasses=sancov-module -Cdebug-assertions -Coverflow-checks \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
libfuzzer: ## the hostile inputs of `make soak`, guided by coverage (SECONDS=60 for each TARGET; all without)
	RUSTFLAGS="$(FUZZ_FLAGS)" $(CARGO) build --release -p retort-soak --features libfuzzer --bin libfuzzer \
	    --target $(HOST) --target-dir $(FUZZ_DIR)
	@for target in $(or $(TARGET),$(filter-out harness,$(notdir $(wildcard tests/soak/corpus/*)))); do \
	    mkdir -p $(FUZZ_DIR)/found/$$target && echo "== $$target" && \
	    TARGET=$$target $(FUZZ_DIR)/$(HOST)/release/libfuzzer $(FUZZ_DIR)/found/$$target tests/soak/corpus/$$target \
	        -max_total_time=$(or $(SECONDS),60) -rss_limit_mb=1024 -timeout=20 -max_len=65536 -print_final_stats=1 \
	        -artifact_prefix=$(FUZZ_DIR)/found/ || exit 1; \
	done

deny: ## licences, sources and known vulnerabilities of the dependencies
	@.ci/deny $(or $(CARGO_TARGET_DIR),target)/tools

book: ## the documentation as HTML pages, in target/book (installs mdbook if it is missing: minutes)
	@docs/book $(or $(CARGO_TARGET_DIR),target)

# Collects everything that the two targets below need in one directory, for GPU machines without cargo. The CUDA variant is the
# plugin there.
GPU = target/gpu
gpu-artefacts: cuda
	$(CUDA_ENV) $(CARGO) build --release -p retort-tests --features cuda --bin retort-gpu --target-dir $(CUDA_DIR)
	mkdir -p $(GPU)
	rm -f $(GPU)/*
	install -s -m 755 $(BIN)/retort $(BIN)/libretort_candle.cuda.so $(GPU)
	install -s -m 755 $(CUDA_DIR)/release/retort-gpu $(GPU)/retort-gpu-candle
	@if [ -e $(BIN)/libretort_libtorch.so ]; then $(MAKE) --no-print-directory gpu-artefacts-libtorch; fi

.PHONY: gpu-artefacts-libtorch
gpu-artefacts-libtorch: libtorch
	env -u LIBTORCH $(CARGO) build --release -p retort-libtorch --example gpu
	install -s -m 755 $(BIN)/libretort_libtorch.so $(GPU)
	install -s -m 755 $(BIN)/examples/gpu $(GPU)/retort-gpu-libtorch

gpu-check: ## golden results, tokens, memory and a short digits recipe on a GPU, with every plugin that drives one
	@if command -v $(CARGO) >/dev/null; then $(MAKE) --no-print-directory gpu-artefacts; fi
	@plugins/gpu check $(GPU)

gpu-bench: ## images, pairs and steps per second on a GPU, beside PyTorch's
	@if command -v $(CARGO) >/dev/null; then $(MAKE) --no-print-directory gpu-artefacts; fi
	@plugins/gpu bench $(GPU)

fmt: ## format the code
	$(CARGO) fmt --all

lint: ## check format and lints, as CI does
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --all-targets --features retort-soak/libfuzzer -- -D warnings
	@if [ -e .libtorch ]; then env -u LIBTORCH $(CARGO) clippy --release -p retort-libtorch --all-targets -- -D warnings; \
	else echo 'lint: plugins/libtorch was not checked (make libtorch)' >&2; fi
	@if [ -e $(CUDA_DIR)/toolkit/bin/nvcc ]; then \
	    $(CUDA_ENV) $(CARGO) clippy --release -p retort-candle --features cuda --all-targets --target-dir $(CUDA_DIR) -- -D warnings && \
	    $(CUDA_ENV) $(CARGO) clippy --release -p retort-tests --features cuda --lib --bins --target-dir $(CUDA_DIR) -- -D warnings; \
	else echo 'lint: the CUDA variant was not checked (make cuda)' >&2; fi
