"""Images that do not depend on their batch, and classes as people name them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

from speed_diffusers import InputError, SpeeDDDPMScheduler
from speed_diffusers.generation.export import inference_pipeline, save_pipeline
from speed_diffusers.generation.generate import (
    GenerationSettings,
    choose_classes,
    class_samples,
    generate,
    lost_rows,
    row_names_of,
    speed_pipeline,
)
from speed_diffusers.generation.pretrained import load_pipeline
from speed_diffusers.models import NULL_CLASS, build_dit, export_transformer
from speed_diffusers.randomness import keyed_generator
from tiny_run import DIT

ROWS = [3, 1, 4, 1, 5]
NAMES = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "crane", 3: "crane", 4: "T-shirt/top"}
OWN = {**NAMES, 3: "crane bird"}
"""The same, but each class has a name of its own."""


@pytest.fixture(scope="module")
def pipeline(tiny_vae: Path) -> DiTPipeline:
    generator = torch.Generator().manual_seed(0)
    model = build_dit(DIT, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    transformer = export_transformer(model.transformer.config, model.state_dict())
    vae = AutoencoderKL.from_pretrained(tiny_vae)
    pipeline = inference_pipeline(transformer, vae, SpeeDDDPMScheduler(), None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline: DiTPipeline, rows: list[int], *, first_image: int = 0, **options: object) -> np.ndarray:
    settings = GenerationSettings(num_inference_steps=3, **options)  # type: ignore[arg-type]
    return np.concatenate(list(generate(pipeline, rows, settings, first_image=first_image)))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_does_not_depend_on_its_batch(pipeline: DiTPipeline, guidance_scale: float) -> None:
    together = images(pipeline, ROWS, batch_size=5, guidance_scale=guidance_scale)
    assert together.shape == (5, 16, 16, 3) and together.dtype == np.float32
    assert together.min() >= 0 and together.max() <= 1
    for batch_size in (1, 2, 64):
        # Matrix products of other sizes may round otherwise.
        others = images(pipeline, ROWS, batch_size=batch_size, guidance_scale=guidance_scale)
        np.testing.assert_allclose(others, together, atol=1e-4)
    differences = [np.abs(a - b).mean() for i, a in enumerate(together) for b in together[i + 1 :]]
    assert min(differences) > 1e-3, "all images differ, those of one class too"


@pytest.mark.parametrize("sampler", ["ddpm", "dpmsolver++", "euler"])
def test_an_image_of_any_sampler_is_its_own(pipeline: DiTPipeline, sampler: str) -> None:
    together = images(pipeline, ROWS, sampler=sampler, guidance_scale=2.0)
    np.testing.assert_allclose(
        images(pipeline, ROWS, sampler=sampler, guidance_scale=2.0, batch_size=2), together, atol=1e-4
    )
    assert np.abs(together - images(pipeline, ROWS, guidance_scale=2.0)).max() > 1e-3
    assert type(pipeline.scheduler) is DDIMScheduler, "the pipeline keeps its own"


def test_guidance_is_passed_on(pipeline: DiTPipeline) -> None:
    options = {"guidance_scale": 4.0, "guidance_channels": 3, "guidance_interval": (0.0, 0.4)}
    found = images(pipeline, ROWS, **options)
    generators = [keyed_generator(0, "image", index) for index in range(5)]
    again = speed_pipeline(pipeline)(ROWS, generator=generators, num_inference_steps=3, output_type="np", **options)
    assert np.array_equal(found, again.images)
    for name in ("guidance_channels", "guidance_interval"):
        others = images(pipeline, ROWS, **{key: value for key, value in options.items() if key != name})
        assert np.abs(found - others).max() > 1e-4


def test_a_stock_pipeline_is_wrapped_with_its_names(pipeline: DiTPipeline) -> None:
    named = DiTPipeline(**pipeline.components, id2label=OWN)
    wrapped = speed_pipeline(named)
    assert wrapped.labels == named.labels and list(row_names_of(wrapped)) == [0, 1, 2, 3, 4]
    assert wrapped.transformer is named.transformer and wrapped.scheduler is named.scheduler
    assert speed_pipeline(wrapped) is wrapped
    ours = speed_pipeline(wrapped, "ddpm")
    assert ours.scheduler is not wrapped.scheduler and row_names_of(ours) == row_names_of(wrapped)


def test_no_class_is_lost_because_another_has_its_name(
    pipeline: DiTPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = DiTPipeline(**pipeline.components, id2label=NAMES)
    kept.register_to_config(id2label={str(row): name for row, name in NAMES.items()})
    save_pipeline(kept, tmp_path / "pipeline", {})
    for each in (kept, DiTPipeline.from_pretrained(tmp_path / "pipeline"), load_pipeline(str(tmp_path / "pipeline"))):
        assert row_names_of(each) == NAMES == row_names_of(speed_pipeline(each, "ddpm")) and lost_rows(each) == []
    assert "label table" not in caplog.text
    # Of two classes with one name a stock pipeline keeps the last; what it was loaded from may be gone.
    lossy = DiTPipeline(**pipeline.components, id2label=NAMES)
    assert list(row_names_of(lossy)) == [0, 1, 3, 4] and lost_rows(lossy) == [2]
    assert "names classes, but not rows 2 of its label table" in caplog.text
    partly = speed_pipeline(pipeline)
    partly.register_to_config(id2label={"1": "a", "7": "b"})
    assert row_names_of(partly) == {1: "a", 7: "b"} and lost_rows(partly) == [], "nothing is lost, nothing more named"


def test_a_model_that_diverged_is_named_as_the_cause(pipeline: DiTPipeline) -> None:
    broken = copy.deepcopy(pipeline.transformer)
    with torch.no_grad():
        broken.proj_out_2.bias.fill_(float("nan"))
    diverged = DiTPipeline(**{**pipeline.components, "transformer": broken})
    with pytest.raises(FloatingPointError, match="The model generated NaN or infinite values in 5 of 5 images"):
        images(diverged, ROWS)


def test_unknown_sampler_is_an_input_error(pipeline: DiTPipeline) -> None:
    with pytest.raises(InputError, match="Unknown sampler 'dimm'. Did you mean 'ddim'"):
        images(pipeline, ROWS, sampler="dimm")


def test_processes_share_a_set(pipeline: DiTPipeline) -> None:
    whole = images(pipeline, ROWS)
    np.testing.assert_allclose(images(pipeline, ROWS[2:], first_image=2), whole[2:], atol=1e-4)
    np.testing.assert_allclose(images(pipeline, ROWS[:2]), whole[:2], atol=1e-4)


def test_class_guidance_and_seed_matter(pipeline: DiTPipeline) -> None:
    base = images(pipeline, [3])
    for other in (images(pipeline, [4]), images(pipeline, [3], guidance_scale=3.0), images(pipeline, [3], seed=1)):
        assert np.abs(other - base).max() > 1e-3
    torch.manual_seed(123)
    assert np.array_equal(images(pipeline, [3]), base)


def test_images_are_made_when_asked_for(pipeline: DiTPipeline) -> None:
    batches = generate(pipeline, [*ROWS, -1, -1], GenerationSettings(batch_size=5, num_inference_steps=1))
    assert next(batches).shape == (5, 16, 16, 3)
    with pytest.raises(ValueError, match="class_labels=-1: allowed is rows of the label table, 0 to 1000"):
        next(batches)  # the rows of the second batch do not exist


def test_no_rows_no_images(pipeline: DiTPipeline) -> None:
    assert list(generate(pipeline, [])) == []


def test_samples_come_class_by_class(pipeline: DiTPipeline) -> None:
    grid = class_samples(pipeline, [3, 1], 2, GenerationSettings(num_inference_steps=3, batch_size=3))
    np.testing.assert_allclose(grid, images(pipeline, [3, 3, 1, 1]), atol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        (["tench, Tinca tinca"], {0: "tench, Tinca tinca"}),
        (["tench"], {0: "tench, Tinca tinca"}),
        (["Carassius auratus", "0"], {1: "goldfish, Carassius auratus", 0: "tench, Tinca tinca"}),
        (["T-shirt/top"], {4: "T-shirt/top"}),
        (["crane"], {2: "crane"}),
        (["3"], {3: "crane bird"}),
        (["4", "1"], {4: "T-shirt/top", 1: "goldfish, Carassius auratus"}),
    ],
)
def test_classes_by_name_part_of_a_name_or_row(wanted: list[str], rows: dict[int, str]) -> None:
    chosen = choose_classes(wanted, OWN)
    assert list(chosen.items()) == list(rows.items()), "in the order asked for"


def test_names_that_are_numbers_win_over_rows() -> None:
    # Folders named 0 to 11 sort as text: row 2 is called "10", row 3 is called "11", row 4 is called "2".
    names = dict(enumerate(sorted(str(number) for number in range(12))))
    assert names[2] == "10" and names[4] == "2"
    assert choose_classes(["2", "10", "11"], names) == {4: "2", 2: "10", 3: "11"}


def test_a_name_of_two_classes_lists_their_rows() -> None:
    with pytest.raises(InputError, match=r"'crane' is ambiguous: rows 2 \('crane'\), 3 \('crane'\)") as error:
        choose_classes(["tench", "crane"], NAMES)
    assert "\n" not in str(error.value)
    assert choose_classes(["2", "3"], NAMES) == {2: "crane", 3: "crane"}


def test_rows_without_a_name_are_taken_within_the_table() -> None:
    assert choose_classes(["7", "1000", "tench"], NAMES, last_row=1000) == {7: "7", 1000: "1000", 0: NAMES[0]}
    assert choose_classes(["7"], {}, last_row=10) == {7: "7"} == choose_classes(["7"], {})
    for names in (NAMES, {}):
        with pytest.raises(InputError, match="class_labels=1001: the model has rows 0 to 1000"):
            choose_classes(["1001"], names, last_row=1000)
    # A whole name beats a row, a row beats a part of a name.
    assert choose_classes(["3", "4"], {0: "3", 1: "area, 4"}, last_row=10) == {0: "3", 4: "4"}


def test_nothing_asked_for_gives_the_first_ten() -> None:
    names = {row: f"class {row}" for row in range(25)}
    assert choose_classes([], names) == {row: f"class {row}" for row in range(10)}
    assert choose_classes([], NAMES) == NAMES
    assert choose_classes([], {}) == {NULL_CLASS: "no class"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("goldfisch", "Unknown class label 'goldfisch'. Did you mean 'goldfish"),
        ("5", "Unknown class label '5'."),
        ("-1", "Unknown class label '-1'."),
        ("", "Unknown class label ''."),
    ],
)
def test_class_that_is_not_there(wanted: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        choose_classes(["tench", wanted], NAMES)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert "Allowed: " in str(error.value)
