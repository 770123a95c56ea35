# `make demo` and `make test` each do all of their own set-up in .venv.
.PHONY: demo test lint format clean
PYTHON ?= python3
BIN := .venv/bin

demo: .venv
	$(BIN)/dfq demo

test: .venv
	$(BIN)/python -m pytest -q

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

# torch first: the build of dfq compiles against the torch that is installed
.venv: pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel ninja pybind11
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[torch,cli,demo,dev]'
	touch .venv

clean:
	rm -rf .venv build dist *.egg-info dfq_kernels/*.so
