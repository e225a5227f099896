"""The label table of a pretrained transformer, fitted to the classes of other data."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ..models import NULL_CLASS, label_to_embedding_row
from ..pipelines.pipeline_dit_speed import find_rows

logger = logging.getLogger(__name__)


@torch.no_grad()
def fit_label_table(
    transformer: DiTTransformer2DModel,
    num_classes: int,
    label_names: Sequence[str] | None,
    *,
    pretrained_names: Mapping[int, str],
    null_row: int | None,
) -> None:
    """Puts the rows of a transformer's label table where the training looks for the classes of its data.

    Where both sides name their classes, a class begins with the row of the pretrained class of its name, and one that
    the pretrained model does not know begins as "no class", with a warning. Where one of them names none, or has but
    their numbers for names, classes keep their numbers, and numbers that are new begin as "no class". "No class"
    becomes row 1000, and the table grows if it has no such row or too few. A table that is already as it must be stays
    the very same.

    Args:
        transformer: Changed in place: the tables of all its blocks, and `num_embeds_ada_norm` in its config.
        num_classes: Classes that the model is to know, at least those of the data.
        label_names: Names of the data's classes by number, or None.
        pretrained_names: Rows of the table to names, as `generation.pretrained.label_rows_of` has them.
        null_row: The table's row for "no class"; None: row 1000, or the last one if there are fewer.
    """
    num_known = int(transformer.config["num_embeds_ada_norm"])
    if null_row is None:
        null_row = min(NULL_CLASS, num_known)
    num_rows = max(num_classes, num_known, NULL_CLASS) + 1
    sources = torch.full((num_rows,), null_row)
    known = torch.arange(num_known)
    sources[label_to_embedding_row(known)] = known + (known >= null_row)
    if label_names and pretrained_names and _both_name(label_names, pretrained_names):
        _find_by_name(sources, label_names, pretrained_names, null_row)
    if torch.equal(sources, torch.arange(num_known + 1)):
        return
    transformer.register_to_config(num_embeds_ada_norm=num_rows - 1)
    for block in transformer.transformer_blocks:
        embedder = cast(Any, block).norm1.emb.class_embedder
        table: Tensor = embedder.embedding_table.weight
        embedder.embedding_table = nn.Embedding.from_pretrained(table[sources], freeze=False)
        embedder.num_classes = num_rows - 1


def _both_name(label_names: Sequence[str], pretrained_names: Mapping[int, str]) -> bool:
    """Whether names of both sides mean something: data with plain integers for labels have their numbers for names.

    Folders of digits lie in the order of their names, so there a name is more than a number where both sides know it.
    """
    ours = all(name == str(number) for number, name in enumerate(label_names))
    theirs = all(name == str(row - (row > NULL_CLASS)) for row, name in pretrained_names.items())
    return ours == theirs or set(label_names) <= set(pretrained_names.values())


def _find_by_name(
    sources: Tensor, label_names: Sequence[str], pretrained_names: Mapping[int, str], null_row: int
) -> None:
    """Writes into `sources` the pretrained row of each class of the data, at the row that the class has here."""
    rows = label_to_embedding_row(torch.arange(len(label_names)))
    unknown = []
    for row, name in zip(rows, label_names, strict=True):
        found = find_rows(name, pretrained_names)
        if int(sources[row]) in found:
            continue  # ImageNet has two cranes; with the same classes in the same order each is where it was
        if len(found) != 1:
            unknown.append(name)
        sources[row] = found[0] if len(found) == 1 else null_row
    if unknown:
        listed = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        logger.warning(
            "%d of %d classes are not among the %d that the pretrained model names, and begin as no class: %s.",
            len(unknown),
            len(label_names),
            len(pretrained_names),
            listed,
        )
