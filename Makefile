# Everything a change must pass: `make quality test`. Set up with `pip install -e ".[dev]"`.
.PHONY: quality format test build docs

# Where `make docs` writes.
SITE ?= site

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

# The pages as a site, from `pip install -e ".[docs]"`; a warning is an error (with --quiet it
# would not be one). The variable hides an advertisement.
docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir "$(SITE)"
