# Everything a change must pass: `make quality test`. Set up with `pip install -e ".[dev]"`.
.PHONY: quality format test build

quality:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

# One torch thread a worker: two workers with a thread for each core slow each other down many times over.
test:
	OMP_NUM_THREADS=1 pytest -n auto

build:
	python -m build
