"""Where streamed rows come from: parquet files, here or on the Hub, or a saved Arrow set, read stretch by stretch.

Nothing is copied to the disk. What is known before anything is read are the numbers of rows: a parquet file has them
in its footer, so that any row of any epoch is found without reading those before it.
"""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem
from tqdm import tqdm

from ..errors import InputError

STRETCH_BYTES = 2**25
"""Row groups side by side are read as one stretch up to so many bytes: one request where they are far away."""

STRETCH_ROWS = 1024
"""And up to so many rows, so that small images are shuffled too."""

WHOLE_BYTES = 2**26
"""Larger stretches, which are single row groups, are not read at once but batch by batch."""

BATCH_ROWS = 64
BATCH_BYTES = 2**24
"""Limits of such a batch."""

TAIL_BYTES = 2**16
"""Read at once of a file's end, which holds its footer."""

FOOTER_END = 8
"""Bytes behind a footer: its length, and the magic number."""

FOOTER_THREADS = 16

NUM_BLOCKS = 1024
BLOCK_BYTES = 2**14
"""Of files on this machine so many blocks of so many bytes, evenly spread, tell one set from another."""

MAGIC = b"PAR1"

_BAR: dict[str, Any] = {"unit": "file", "leave": False, "delay": 2.0}
"""A progress bar for what takes longer than two seconds."""


class Stretch(NamedTuple):
    """Neighbouring rows of a file, which are read in one go.

    Attributes:
        file: Number of the file.
        begin: First row group; of a saved set, first row.
        end: Last row group + 1; of a saved set, last row + 1.
        rows: Number of rows that are used, from the first on.
        num_bytes: Size of all of it where it lies.
    """

    file: int
    begin: int
    end: int
    rows: int
    num_bytes: int


class Shards(ABC):
    """Rows in stretches; a row's number is its place in the stretches one behind the other."""

    stretches: list[Stretch]
    features: datasets.Features
    description: str
    """What it is, for the plan of a run: "3 parquet files"."""

    @abstractmethod
    def read(self, stretch: Stretch, columns: Sequence[str], skip: int = 0) -> Iterator[pa.Table]:
        """Reads a stretch row by row, table by table.

        Args:
            stretch: One of them.
            columns: Names of columns.
            skip: Rows to leave out at the beginning.
        """

    @abstractmethod
    def column(self, name: str) -> pa.ChunkedArray:
        """All of a column, with a progress bar where it takes long; of a parquet file no other is read."""

    @abstractmethod
    def label_range(self, name: str) -> tuple[int, int, int]:
        """Smallest and largest value of a column of integers, and how many rows have none."""

    @abstractmethod
    def place(self, stretch: Stretch) -> str:
        """What holds a stretch, for a message."""

    @abstractmethod
    def key(self) -> str:
        """Changes with the content of any file, and not with where the files lie."""


def stretches_of(rows: Sequence[int], num_bytes: Sequence[int], *, file: int = 0) -> Iterator[Stretch]:
    """Neighbours among a file's row groups put together, as far as the limits allow; empty ones are left out."""
    begin = 0
    while begin < len(rows):
        end, count, size = begin + 1, rows[begin], num_bytes[begin]
        while end < len(rows) and count + rows[end] <= STRETCH_ROWS and size + num_bytes[end] <= STRETCH_BYTES:
            count, size, end = count + rows[end], size + num_bytes[end], end + 1
        if count:
            yield Stretch(file, begin, end, count, size)
        begin = end


class RowGroup(NamedTuple):
    """A row group of a file, and the number of its first row among those of all files."""

    file: int
    number: int
    first_row: int


class _Footer(NamedTuple):
    metadata: pq.FileMetaData
    digest: str


class ParquetShards(Shards):
    """Parquet files, on this machine or on the Hub."""

    def __init__(
        self,
        files: Sequence[str],
        features: datasets.Features | None = None,
        filesystem: HfFileSystem | None = None,
    ) -> None:
        """Reads the footers of the files, several at a time.

        Args:
            files: Their paths, in order.
            features: What is known of their columns; None: what their schema says.
            filesystem: Where they are; None: on this machine.

        Raises:
            InputError: One of them is no parquet file, is damaged, or has other columns than the first.
        """
        self.files = list(files)
        self.filesystem = filesystem
        self._footers: dict[int, _Footer] = {}
        numbers = range(len(self.files))
        with ThreadPoolExecutor(FOOTER_THREADS) as threads:
            found = threads.map(self.footer, numbers)
            footers = list(tqdm(found, "Reading footers", len(numbers), **_BAR))
        schemas = [footer.metadata.schema.to_arrow_schema() for footer in footers]
        for file, schema in zip(self.files, schemas, strict=True):
            if schema.names != schemas[0].names:
                raise InputError(
                    f"'{file}' has the columns {', '.join(schema.names)}, but '{self.files[0]}' has "
                    f"{', '.join(schemas[0].names)}."
                )
        self.features = features or datasets.Features.from_arrow_schema(schemas[0])
        self.stretches = []
        for number, (metadata, _) in enumerate(footers):
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            rows = [group.num_rows for group in groups]
            sizes = [_compressed_size(group) for group in groups]
            self.stretches += stretches_of(rows, sizes, file=number)
        count = len(self.files)
        self.description = f"{count:,} parquet file{'s' * (count != 1)}"

    def __getstate__(self) -> dict[str, Any]:
        # Megabytes for a large set, which a worker of a loader hardly ever needs.
        return self.__dict__ | {"_footers": {}}

    def footer(self, number: int) -> _Footer:
        """The footer of a file, read once; again where this object has come from another process."""
        if number not in self._footers:
            self._footers[number] = self._read_footer(self.files[number])
        return self._footers[number]

    def _read_footer(self, file: str) -> _Footer:
        with self._open(file) as opened:
            num_bytes = opened.seek(0, io.SEEK_END)
            tail = _last_bytes(opened, num_bytes, TAIL_BYTES)
            length = int.from_bytes(tail[-FOOTER_END:-4], "little") + FOOTER_END
            if length > len(tail) and tail[-4:] == MAGIC:
                tail = _last_bytes(opened, num_bytes, length)
        footer = tail[-length:]
        try:
            return _Footer(pq.read_metadata(pa.BufferReader(footer)), hashlib.sha256(footer).hexdigest())
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"Cannot read the parquet data in '{file}': {reason}") from error

    def _open(self, file: str, **options: Any) -> Any:
        if self.filesystem is None:
            return open(file, "rb")  # noqa: SIM115 - the caller closes it
        return self.filesystem.open(file, "rb", **({"cache_type": "none"} | options))

    def read(self, stretch: Stretch, columns: Sequence[str], skip: int = 0) -> Iterator[pa.Table]:
        """See `Shards.read`; a stretch of up to `WHOLE_BYTES` is read at once, and all that is skipped too."""
        file, metadata = self.files[stretch.file], self.footer(stretch.file).metadata
        whole = stretch.num_bytes <= WHOLE_BYTES
        options = {} if whole else {"cache_type": "readahead", "block_size": BATCH_BYTES}
        groups, skip, left = _groups_with(metadata, stretch, skip)
        names = list(columns)
        with ExitStack() as stack:
            opened = stack.enter_context(self._open(file, **options))
            buffer_size = 0 if whole else BATCH_BYTES
            parquet = pq.ParquetFile(opened, metadata=metadata, pre_buffer=whole, buffer_size=buffer_size)
            stack.enter_context(parquet)
            if whole:
                tables = iter([parquet.read_row_groups(groups, columns=names, use_threads=False)])
            else:
                per_row = -(-stretch.num_bytes // sum(metadata.row_group(group).num_rows for group in groups))
                batches = parquet.iter_batches(
                    batch_size=max(1, min(BATCH_ROWS, BATCH_BYTES // per_row)),
                    row_groups=groups,
                    columns=names,
                    use_threads=False,
                )
                tables = (pa.Table.from_batches([batch]) for batch in batches)
            for table in tables:
                used = table.slice(min(skip, table.num_rows), max(0, left - skip))
                skip, left = max(0, skip - table.num_rows), left - table.num_rows
                if used.num_rows:
                    yield used
                if left <= 0:
                    return

    def column(self, name: str) -> pa.ChunkedArray:
        """See `Shards.column`."""

        def read(number: int) -> pa.ChunkedArray:
            with self._open(self.files[number]) as opened:
                metadata = self.footer(number).metadata
                return pq.ParquetFile(opened, metadata=metadata).read(columns=[name], use_threads=False)[name]

        with ThreadPoolExecutor(FOOTER_THREADS) as threads:
            found = threads.map(read, range(len(self.files)))
            title = f"Reading column '{name}'"
            columns = list(tqdm(found, title, len(self.files), **_BAR))
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks])

    def label_range(self, name: str) -> tuple[int, int, int]:
        """See `Shards.label_range`: from the footers' statistics; only where there are none the column is read."""
        smallest, largest, missing = [], [], 0
        for metadata, _ in map(self.footer, range(len(self.files))):
            # Columns of a parquet file are leaves: a struct before it has several.
            leaves = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
            place = leaves.index(name)
            for group in range(metadata.num_row_groups):
                statistics = metadata.row_group(group).column(place).statistics
                has_all = statistics is not None and statistics.has_null_count
                if not has_all or not (statistics.has_min_max or statistics.num_values == 0):
                    return _range_of(self.column(name))
                missing += statistics.null_count
                if statistics.has_min_max:
                    smallest.append(int(statistics.min))
                    largest.append(int(statistics.max))
        return min(smallest, default=0), max(largest, default=0), missing

    @property
    def num_rows(self) -> int:
        """Of all files together."""
        return sum(stretch.rows for stretch in self.stretches)

    def row_groups(self) -> list[RowGroup]:
        """All row groups, in order."""
        found, first = [], 0
        for number in range(len(self.files)):
            metadata = self.footer(number).metadata
            for index in range(metadata.num_row_groups):
                found.append(RowGroup(number, index, first))
                first += metadata.row_group(index).num_rows
        return found

    def take(self, group: RowGroup, rows: npt.NDArray[np.int64], columns: list[str]) -> pa.Table:
        """Some columns of rows that are in one row group, by their rising numbers among those of all files."""
        with self._open(self.files[group.file]) as opened:
            metadata = self.footer(group.file).metadata
            parquet = pq.ParquetFile(opened, metadata=metadata, pre_buffer=True)
            # In parts: pandas writes a million rows a group, and pyarrow reads at most 2 GB of nested columns at once.
            wanted, begin, parts = rows - group.first_row, 0, []
            for batch in parquet.iter_batches(BATCH_ROWS, [group.number], columns, use_threads=False):
                inside = wanted[(begin <= wanted) & (wanted < begin + len(batch))] - begin
                parts.append(batch.take(pa.array(inside)))
                begin += len(batch)
        return pa.Table.from_batches(parts)

    def place(self, stretch: Stretch) -> str:
        """See `Shards.place`: the file."""
        return self.files[stretch.file]

    def key(self) -> str:
        """See `Shards.key`: of the hashes that the Hub has; here of the footers, and of bytes spread over the files.

        Footers have the size and statistics of every part of a file, but labels that changed places leave no trace.
        """
        if self.filesystem is not None:
            return hashlib.sha256(
                repr([self.filesystem.info(file)["blob_id"] for file in self.files]).encode()
            ).hexdigest()
        digest = hashlib.sha256()
        sizes = [os.path.getsize(file) for file in self.files]
        step = max(BLOCK_BYTES, sum(sizes) // NUM_BLOCKS)
        place = 0
        for number, (file, size) in enumerate(zip(self.files, sizes, strict=True)):
            digest.update(self.footer(number).digest.encode())
            with open(file, "rb") as opened:
                while place < size:
                    opened.seek(place)
                    digest.update(opened.read(BLOCK_BYTES))
                    place += step
            place -= size
        return digest.hexdigest()


class ArrowShards(Shards):
    """A saved `datasets.Dataset`, which is mapped into memory; neighbouring rows are read together."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        """Divides the rows into stretches; nothing is read."""
        self.dataset = dataset.with_format("arrow")
        self.features = dataset.features
        per_row = -(-dataset.data.nbytes // max(1, dataset.data.num_rows))
        at_once = max(1, min(STRETCH_ROWS, STRETCH_BYTES // max(1, per_row)))
        spans = [(begin, min(begin + at_once, len(dataset))) for begin in range(0, len(dataset), at_once)]
        self.stretches = [Stretch(0, begin, end, end - begin, (end - begin) * per_row) for begin, end in spans]
        self.description = "a saved set"

    def read(self, stretch: Stretch, columns: Sequence[str], skip: int = 0) -> Iterator[pa.Table]:
        """See `Shards.read`; what is skipped costs nothing."""
        if skip < stretch.rows:
            chosen = self.dataset.select_columns(list(columns))
            yield chosen[stretch.begin + skip : stretch.begin + stretch.rows]

    def column(self, name: str) -> pa.ChunkedArray:
        """See `Shards.column`."""
        return self.dataset.select_columns([name])[:][name]

    def label_range(self, name: str) -> tuple[int, int, int]:
        """See `Shards.label_range`."""
        return _range_of(self.column(name))

    def place(self, stretch: Stretch) -> str:
        """See `Shards.place`: the rows."""
        return f"rows {stretch.begin} to {stretch.begin + stretch.rows - 1} of the saved set"

    def key(self) -> str:
        """See `Shards.key`: what `datasets` has saved with the set."""
        return str(self.dataset._fingerprint)


def _groups_with(metadata: pq.FileMetaData, stretch: Stretch, skip: int) -> tuple[list[int], int, int]:
    """The row groups of a stretch that hold rows from `skip` on; of their rows, how many to skip, and to go up to."""
    groups, first, dropped = [], 0, 0
    for group in range(stretch.begin, stretch.end):
        behind = first + metadata.row_group(group).num_rows
        if behind <= skip:
            dropped = behind
        elif first < stretch.rows:
            groups.append(group)
        first = behind
    return groups, skip - dropped, stretch.rows - dropped


def _compressed_size(group: pq.RowGroupMetaData) -> int:
    return sum(int(group.column(index).total_compressed_size) for index in range(group.num_columns))


def _last_bytes(file: Any, num_bytes: int, count: int) -> bytes:
    file.seek(max(0, num_bytes - count))
    return bytes(file.read(count))


def _range_of(column: pa.ChunkedArray) -> tuple[int, int, int]:
    found: Mapping[str, Any] = pc.min_max(column).as_py()
    return int(found["min"] or 0), int(found["max"] or 0), column.null_count


def first_rows(stretches: Sequence[Stretch]) -> npt.NDArray[np.int64]:
    """Number of each stretch's first row, and behind the last the number of all rows: int64 (len + 1,)."""
    return np.concatenate(([0], np.cumsum([one.rows for one in stretches], dtype=np.int64)))
