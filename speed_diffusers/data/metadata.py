"""`metadata.csv`, `.jsonl` or `.parquet` beside images: one row per image, labels and whatever else in its columns."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ..errors import InputError

CLASS_ID = r"^(0|-?[1-9][0-9]{0,17})$"


def read_metadata(file: Path) -> pa.Table:
    """Reads one of `METADATA_FILES`.

    What a CSV file says stays as it is written: "None", "NA" and "001" are names of classes. A column that holds
    nothing but whole numbers without leading zeros is one of integers, and an empty cell has no value.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        if file.suffix == ".csv":
            return _read_csv(file)
        if file.suffix == ".jsonl":
            # One block, because no line may lie across two.
            options = pyarrow.json.ReadOptions(block_size=max(file.stat().st_size, 1 << 20))
            return pyarrow.json.read_json(file, read_options=options)
        return pyarrow.parquet.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"Cannot read '{file}': {' '.join(str(error).split())}") from error


def image_name_column(columns: list[str]) -> str | None:
    """The column with the images' paths as `datasets` names it: "file_name", or "NAME_file_name"."""
    return next((name for name in columns if name == "file_name" or name.endswith("_file_name")), None)


def _read_csv(file: Path) -> pa.Table:
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(file, parse_options=parse) as reader:
        names = reader.schema.names
    as_written = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    table = pyarrow.csv.read_csv(file, parse_options=parse, convert_options=as_written)
    return pa.table({name: _typed(table[name]) for name in names})


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    filled = pc.if_else(pc.equal(column, ""), None, column)
    are_ids = pc.all(pc.match_substring_regex(filled, CLASS_ID)).as_py()
    return filled.cast(pa.int64()) if are_ids else filled
