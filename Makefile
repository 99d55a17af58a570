# Every target is one script of ci/ (Python >= 3.10, standard library only). The scripts make the
# environments that they need under .venv* and do nothing twice.

PYTHON ?= python3
export TORCH ENV MODEL DEVICE DTYPE ARGS ARCH WHEEL QUICK
export PROMPT TOKENS TEMPERATURE TOP_K TOP_P MIN_P SEED
export REQUESTS PAGES PAGE_SIZE MAX_REQUESTS MAX_BATCH_TOKENS GRAPHS OUT COMPARE

.PHONY: help demo serve test test-gpu bench wheel lint docs clean

help:
	@echo "make demo      set everything up and let a small language model write  (PROMPT= TOKENS= TEMPERATURE= SEED= MODEL= DEVICE=)"
	@echo "make serve     let that model serve many requests at once, and check every token (REQUESTS= PAGES= DEVICE= OUT= COMPARE=)"
	@echo "make test      build the wheel, install it in a fresh environment, test it there     (ARGS= for pytest)"
	@echo "make test-gpu  on a GPU: the GPU tests of every architecture, compute-sanitizer      (ARCH= WHEEL= ARGS=)"
	@echo "make bench     on a GPU: measure every op beside torch's own kernels                 (WHEEL= QUICK=1 ARGS=)"
	@echo "make wheel     dist/*.whl with the kernel packs of five architectures       (TORCH_CUDA_ARCH_LIST= chooses)"
	@echo "make lint      ruff, mypy --strict, clang-format, the rules of the tree                (ARGS=--fix repairs)"
	@echo "make docs      the reference pages in build/docs, every link and example checked"
	@echo "make clean     remove what these targets made"
	@echo "PYTHON= names the interpreter; TORCH= the torch to install (default torch==2.13.0); ENV=own|active chooses"
	@echo "between an environment of our own and the torch >= 2.10 of the active one"

demo:
	@$(PYTHON) ci/demo.py

serve:
	@$(PYTHON) ci/serve.py

test:
	@$(PYTHON) ci/test.py

test-gpu:
	@$(PYTHON) ci/test_gpu.py

bench:
	@$(PYTHON) ci/bench.py

wheel:
	@$(PYTHON) ci/build_wheel.py

lint:
	@$(PYTHON) ci/lint.py $(ARGS)

docs:
	@$(PYTHON) ci/docs.py

clean:
	rm -rf .venv .venv-test build dist *.egg-info torch_ops/libridgeline.so torch_ops/packs
