"""Fine-tuning on other classes: where each class begins, and where "no class" goes."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline_parts import pipeline_of, transformer
from speed_diffusers.generation.pretrained import label_rows_of, load_transformer, load_vae
from speed_diffusers.models import NULL_CLASS
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.label_table import fit_label_table
from speed_diffusers.training.parts import make_model


def tables(model: object) -> list[Tensor]:
    return [block.norm1.emb.class_embedder.embedding_table.weight for block in model.transformer_blocks]  # type: ignore[attr-defined]


def fitted(
    rows: int, num_classes: int, names: list[str] | None, known: dict[int, str], null: int | None = None
) -> object:
    """A fitted model, whose tables held the number of their row (and of their block) everywhere."""
    model = transformer(rows=rows)
    for block, table in enumerate(tables(model)):
        table.data = torch.arange(rows + 1.0)[:, None].expand(-1, 16) + 0.5 * block
    fit_label_table(model, num_classes, names, pretrained_names=known, null_row=null)
    for block, table in enumerate(tables(model)):
        assert torch.equal(table, tables(model)[0] + 0.5 * block) and table.requires_grad
    return model


def sources(model: object) -> list[int]:
    """The row that each row of the first table came from."""
    return [int(value) for value in tables(model)[0][:, 0].tolist()]


def test_a_small_table_gets_row_1000_for_no_class_and_new_classes_begin_there() -> None:
    model = fitted(10, 12, None, {})
    assert sources(model) == [*range(10), *[10] * 991]
    assert model.config["num_embeds_ada_norm"] == NULL_CLASS  # type: ignore[attr-defined]
    # Where the pretrained pipeline has "no class" elsewhere, its classes close up.
    assert sources(fitted(10, 10, None, {}, null=3))[:11] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 3]
    assert sources(fitted(10, 10, None, {}, null=3))[NULL_CLASS] == 3


def test_more_than_1000_classes() -> None:
    assert sources(fitted(1000, 1003, None, {})) == [*range(1001), 1000, 1000, 1000]
    assert sources(fitted(1005, 5, None, {})) == [*range(1006)]
    last = sources(fitted(1005, 5, None, {}, null=1005))
    assert last == [*range(1000), 1005, *range(1000, 1005)]


def test_classes_are_found_by_name_and_new_ones_are_told(caplog: pytest.LogCaptureFixture) -> None:
    known = {0: "T-shirt", 3: "Dress", 5: "Sandal, flip-flop", 7: "crane", 9: "crane"}
    with caplog.at_level(logging.WARNING):
        found = sources(fitted(1000, 4, ["Sandal, flip-flop", "Dress", "flip-flop", "T-shirt"], known))
    assert found == [5, 3, 5, 0, *range(4, 1001)] and not caplog.records
    with caplog.at_level(logging.WARNING):
        found = sources(fitted(1000, 3, ["Dress", "Hat", "crane"], known))
    assert found == [3, 1000, 1000, *range(3, 1001)]
    assert "2 of 3 classes are not among the 5 that the pretrained model names, and begin as no class: Hat, crane" in (
        caplog.text
    )
    # Of two cranes each keeps its own row where the classes are the same ones.
    names = [known.get(row, f"class {row}") for row in range(10)]
    assert sources(fitted(1000, 10, names, {row: name for row, name in enumerate(names)})) == [*range(1001)]


def test_numbers_are_no_names() -> None:
    """Data with integers for labels names them "0", "1", ...: fine-tuned on them, a model keeps its classes."""
    numbers, named = ["0", "1", "2"], {0: "cat", 1: "dog", 2: "eel"}
    assert sources(fitted(1000, 3, numbers, named)) == [*range(1001)]
    assert sources(fitted(1000, 3, list(named.values()), dict(enumerate(numbers)))) == [*range(1001)]
    assert sources(fitted(1000, 3, numbers, dict(enumerate(numbers)))) == [*range(1001)]
    # Folders of digits are in the order of their names, so that these do tell something.
    folders = {0: "0", 1: "1", 2: "10", 3: "2"}
    assert sources(fitted(1000, 4, ["0", "1", "2", "3"], folders))[:4] == [0, 1, 2, 3]
    assert sources(fitted(1000, 3, ["0", "10", "2"], folders))[:3] == [0, 2, 3]
    integers = {number: str(number) for number in range(20)}
    assert sources(fitted(1000, 20, sorted(integers.values()), integers))[:4] == [0, 1, 10, 11]
    assert sources(fitted(1000, 3, numbers, dict(enumerate(sorted(integers.values())))))[:3] == [0, 1, 12]


def test_a_table_that_is_right_already_stays_the_same_object() -> None:
    model = transformer(rows=1000)
    before = tables(model)
    fit_label_table(model, 10, ["a", "b"], pretrained_names={0: "a", 1: "b"}, null_row=None)
    assert all(one is other for one, other in zip(before, tables(model), strict=True))


def test_a_run_begins_with_any_pipeline(tmp_path: Path) -> None:
    """A pipeline of 10 classes whose third row is "no class", for data with two of its classes and a new one."""
    model = transformer(rows=10)
    id2label = {0: "cat", 1: "dog", 2: "owl"}
    pipeline_of(model, id2label=id2label, null_class_id=4).save_pretrained(tmp_path)
    assert label_rows_of(str(tmp_path)) == (id2label, 4)
    config = TrainConfig(
        pretrained_model_name_or_path=str(tmp_path), resolution=16, tie_embedders=False, prediction_type="epsilon"
    )
    core = make_model(config, 3, load_vae("embedded"), ["dog", "emu", "cat"]).eval()
    latents, times = torch.randn(3, 4, 4, 4), torch.tensor([10, 400, 900])
    with torch.no_grad():
        found = core(latents, times, torch.tensor([0, 2, NULL_CLASS]))
        expected = load_transformer(str(tmp_path)).eval()(latents, times, torch.tensor([1, 0, 4])).sample
        new, none = (core(latents, times, torch.full((3,), row)) for row in (1, NULL_CLASS))
    assert torch.equal(found, expected) and torch.equal(new, none)
