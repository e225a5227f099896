"""Classes by name: no class is lost or taken for another, whatever its name shares with others."""

import pytest

from pipeline_parts import pipeline_of, transformer
from speed_diffusers.pipelines.pipeline_dit_speed import find_rows

# Two classes of one name, one whose name is a part of another's, one whose name is another's second name.
IMAGENET = {
    0: "tench, Tinca tinca",
    134: "crane",
    517: "crane",
    638: "maillot",
    639: "maillot, tank suit",
    657: "missile",
    744: "projectile, missile",
}
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("wanted", "names", "rows"),
    [
        ("tench", IMAGENET, [0]),
        ("Tinca tinca", IMAGENET, [0]),
        ("tench, Tinca tinca", IMAGENET, [0]),
        ("tench,Tinca tinca ", IMAGENET, [0]),
        ("crane", IMAGENET, [134, 517]),
        ("maillot", IMAGENET, [638]),
        ("tank suit", IMAGENET, [639]),
        ("maillot, tank suit", IMAGENET, [639]),
        ("missile", IMAGENET, [657]),
        ("projectile", IMAGENET, [744]),
        ("Tench", IMAGENET, []),
        ("", IMAGENET, []),
        (",", IMAGENET, []),
        ("a, b", {0: "a, b", 1: "b, a"}, [0]),
        ("b, a", {0: "a, b", 1: "b, a"}, [1]),
        ("b,a", {0: "a, b", 1: "b, a"}, [1]),
        ("a", {0: "a, b", 1: "b, a"}, [0, 1]),
        ("cat", {0: "cat ", 1: "cat"}, [1]),
        ("cat ", {0: "cat ", 1: "cat"}, [0]),
        (" cat", {0: "cat ", 1: "cat"}, [0, 1]),
        ("cat", {0: "cat ", 1: "cat, feline"}, [0]),
        (COMPOSED, {0: COMPOSED}, [0]),
        (DECOMPOSED, {0: COMPOSED}, [0]),
        (COMPOSED, {0: f"bar, {DECOMPOSED}"}, [0]),
        (COMPOSED, {0: DECOMPOSED, 1: COMPOSED}, [1]),
        (DECOMPOSED, {0: DECOMPOSED, 1: COMPOSED}, [0]),
        ("a", {0: "a, "}, [0]),
        ("", {0: "a, ", 1: ""}, [1]),
        ("a", {}, []),
    ],
)
def test_rows_that_a_name_can_mean(wanted: str, names: dict[int, str], rows: list[int]) -> None:
    assert find_rows(wanted, names) == rows


def test_the_pipeline_takes_what_means_one_class_and_lists_the_rows_of_others() -> None:
    draw = pipeline_of(transformer(rows=1000), id2label=IMAGENET)
    assert draw.class_names == IMAGENET
    assert draw.get_label_ids(["maillot", "missile", "tank suit", "tench"]) == [638, 657, 639, 0]
    with pytest.raises(
        ValueError, match=r"'crane' is ambiguous: rows 134 \('crane'\), 517 \('crane'\).*a row"
    ) as error:
        draw.get_label_ids("crane")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="Unknown class label 'maillots'. Did you mean 'maillot'"):
        draw.get_label_ids("maillots")
