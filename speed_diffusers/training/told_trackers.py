"""What W&B and trackio know of a run already: both write behind the run's back, so a kill may have cost them steps."""

import logging
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Told = Container[tuple[str, int]]
"""Names of numbers or pictures, each with its optimizer step."""


@dataclass(frozen=True)
class ToldUntil:
    """Everything of some names until a step."""

    names: frozenset[str]
    last: int

    def __contains__(self, told: object) -> bool:
        return isinstance(told, tuple) and told[0] in self.names and told[1] <= self.last


_BLOCK = 32 * 1024
_FILE_HEADER, _RECORD_HEADER = 7, struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4
"""Kinds of a part: all of a record, and the end of one."""


def told_wandb(run: Any, folder: Path, step_name: str) -> Told:
    """What W&B has of a run: the server says it where the run is online, the files of earlier starts where it is not.

    Args:
        run: The run, just started.
        folder: Where its files are.
        step_name: The name under which steps are told.
    """
    if not run.offline:
        # The server tells the last value of each name, and takes what comes in order.
        last = run.summary.get(step_name) or 0
        return ToldUntil(frozenset(run.summary.keys()), int(last))
    told: set[tuple[str, int]] = set()
    for path in sorted(folder.glob(f"wandb/*-{run.id}/run-{run.id}.wandb")):
        for row in _wandb_rows(path):
            if (step := row.get(step_name, "")).isdigit():
                told |= {(name.split("/_type")[0], int(step)) for name in row}
    return told


def _wandb_rows(path: Path) -> Iterator[dict[str, str]]:
    """Names and values, as JSON, of the rows of a file of W&B, up to where a kill cut it short.

    The file is a log as LevelDB has it (leveldb/doc/log_format.md) of W&B's own messages.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for content in _log_records(path.read_bytes()):
        record = Record()
        try:
            record.ParseFromString(content)
        except Exception as error:  # protobuf's own DecodeError has another place in each of its versions
            logger.warning("%s: a damaged record is passed over (%s).", path, error)
            continue
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def _log_records(data: bytes) -> Iterator[bytes]:
    at, record = _FILE_HEADER, b""
    while at + _RECORD_HEADER.size <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _RECORD_HEADER.size:  # no header fits before the end of the block
            at += left
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(data, at)
        at += _RECORD_HEADER.size
        if at + length > len(data):
            return
        record += data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""


def told_trackio(run: Any) -> Told:
    """What trackio has of a run on this machine; nothing where it keeps it elsewhere.

    Args:
        run: The run, just started.
    """
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs(run.project, run.name)
    return {(name, int(row["step"])) for row in rows if row.get("step") is not None for name in row}
