"""A few rows out of many, read from parquet files as they lie: a short run need not convert or copy the rest."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets.table import InMemoryTable
from tqdm import tqdm

from .shards import ParquetShards

FEW_ROWS = 1000
"""At most so many are read by themselves, into memory;"""

OUT_OF = 10
"""and at most one out of so many: for more, all row groups would have to be read anyway."""

READING_THREADS = 8


def are_few(count: int | None, num_rows: int) -> bool:
    """Whether so many out of all rows are to be read by themselves; None stands for all."""
    return count is not None and 0 < count <= FEW_ROWS and count * OUT_OF <= num_rows


def read_rows(
    shards: ParquetShards, rows: Sequence[int] | npt.NDArray[np.int64], columns: list[str]
) -> datasets.Dataset:
    """Some rows and columns, in memory; of each row group that has one of the rows all of these columns are read.

    Args:
        shards: The files.
        rows: Numbers of rows, ascending, among those of all files one behind the other.
        columns: Names of columns.
    """
    groups = shards.row_groups()
    numbers = np.asarray(rows, dtype=np.int64)
    group_of = np.searchsorted([group.first_row for group in groups], numbers, side="right") - 1
    wanted = [(groups[index], numbers[group_of == index]) for index in np.unique(group_of).tolist()]
    with ThreadPoolExecutor(READING_THREADS) as threads:
        found = threads.map(lambda part: shards.take(part[0], part[1], columns), wanted)
        title = f"Reading {len(numbers):,} rows"
        tables = list(tqdm(found, title, len(wanted), unit="row group", leave=False, delay=2.0))
    return _as_dataset(pa.concat_tables(tables), shards, columns)


def read_column(shards: ParquetShards, column: str) -> datasets.Dataset:
    """All of one column, in memory."""
    return _as_dataset(pa.table({column: shards.column(column)}), shards, [column])


def _as_dataset(table: pa.Table, shards: ParquetShards, columns: list[str]) -> datasets.Dataset:
    features = datasets.Features({name: shards.features[name] for name in columns})
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(InMemoryTable(table.cast(features.arrow_schema)), info=info, fingerprint=shards.key()[:32])
