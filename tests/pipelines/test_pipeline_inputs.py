"""What the pipeline takes for classes, and what it refuses before any work."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
)

from pipeline_parts import SCHEDULE, generators, noise_of, pipeline_of, transformer
from speed_diffusers.pipelines import SpeeDDiTPipeline

NAMES = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 3: "crane", 7: "crane", 9: "T-shirt/top"}


class NoNumber:
    """Says what it is over two lines."""

    def __str__(self) -> str:
        return "no\nnumber"


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, clip_sample=False)


@pytest.fixture(scope="module")
def pipeline() -> SpeeDDiTPipeline:
    return pipeline_of(transformer(), ddim(), id2label=NAMES)


def rows_of(pipeline: SpeeDDiTPipeline, *arguments: Any, **options: Any) -> list[int]:
    """The rows of the label table that a call asks the transformer for."""
    seen: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, positional, named: seen.extend(named["class_labels"].tolist()), with_kwargs=True
    )
    pipeline(*arguments, num_inference_steps=1, output_type="latent", **options)
    hook.remove()
    return seen


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        (7, [7]),
        ([7, 0], [7, 0]),
        ((7, 0), [7, 0]),
        ([[7], [0]], [7, 0]),
        ([(7,), "goldfish"], [7, 1]),
        ([torch.tensor([7, 0]), 3], [7, 0, 3]),
        (np.array(7), [7]),
        (np.array(["goldfish", "tench"]), [1, 0]),
        (range(3), [0, 1, 2]),
        (torch.tensor(7), [7]),
        (torch.tensor([7, 0]), [7, 0]),
        (torch.tensor([[7], [0]]), [7, 0]),
        (np.array([7, 0]), [7, 0]),
        ([np.int64(7), torch.tensor(0)], [7, 0]),
        ("goldfish", [1]),
        ("goldfish, Carassius auratus", [1]),
        (["T-shirt/top", "Tinca tinca", 5], [9, 0, 5]),
        (None, [10]),
        ([10, 10], [10, 10]),
    ],
)
def test_labels_of_every_kind(pipeline: SpeeDDiTPipeline, labels: Any, rows: list[int]) -> None:
    assert rows_of(pipeline, labels, 1.0) == rows


def test_one_label_or_none_stands_for_all_images(pipeline: SpeeDDiTPipeline) -> None:
    assert rows_of(pipeline, "goldfish", 1.0, num_images=3) == [1, 1, 1]
    assert rows_of(pipeline, 4, 1.0, generators(2)) == [4, 4]
    assert rows_of(pipeline, None, 1.0, num_images=3) == [10, 10, 10]
    assert rows_of(pipeline, None, 1.0, generators(2)) == [10, 10]
    assert rows_of(pipeline, None, 1.0, latents=noise_of(generators(4))) == [10] * 4
    assert rows_of(pipeline, [3, 4], 1.0, num_images=2) == [3, 4]


@pytest.mark.parametrize(
    ("rows", "given", "null"),
    [(10, None, 10), (999, None, 999), (1000, None, 1000), (1200, None, 1000), (1200, 1200, 1200)],
)
def test_any_number_of_classes_has_its_null_row(rows: int, given: int | None, null: int) -> None:
    draw = pipeline_of(transformer(rows=rows), ddim(), null_class_id=given)
    assert draw.null_class_id == null
    # Every row is allowed, the last one too; with more than 1000 classes ids from 1000 up have moved by one.
    assert rows_of(draw, [0, rows], 2.0) == [0, rows, null, null]
    with pytest.raises(ValueError, match=f"class_labels={rows + 1}: allowed is rows of the label table, 0 to {rows}"):
        draw([0, rows + 1])


def test_a_null_row_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="null_class_id=11: allowed is rows of the label table, 0 to 10"):
        pipeline_of(transformer(), ddim(), null_class_id=11)


def test_numpys_numbers_and_no_output_type_are_taken(pipeline: SpeeDDiTPipeline) -> None:
    plain: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 2, "guidance_channels": 3}
    numpys = {"guidance_scale": np.float32(2), "num_inference_steps": np.int64(2), "guidance_channels": np.int32(3)}
    images = [
        pipeline(1, generator=generators(1), output_type=kind, **options).images
        for kind, options in (("np", plain), (None, numpys))
    ]
    assert np.array_equal(*images)


def test_a_callback_that_returns_nothing_is_one_line(pipeline: SpeeDDiTPipeline) -> None:
    with pytest.raises(ValueError, match="what callback_on_step_end returns=None: allowed is a dict"):
        pipeline(1, num_inference_steps=2, callback_on_step_end=lambda *given: None)  # type: ignore[arg-type]


def test_rows_are_not_class_ids_beyond_a_thousand_classes() -> None:
    draw = pipeline_of(transformer(rows=1200), ddim(), id2label={999: "a", 1001: "b", 1100: "class 1099"})
    assert draw.rows_of_class_ids([0, 999, 1000, 1099, 1199]) == [0, 999, 1001, 1100, 1200]
    assert draw.rows_of_class_ids(1000) == [1001]
    # Numbers are rows, as in the stock pipeline: 1100 is the row of class 1099.
    assert rows_of(draw, 1100, 1.0) == [1100] == draw.get_label_ids("class 1099")
    assert pipeline_of(transformer(rows=10), ddim()).rows_of_class_ids([0, 9]) == [0, 9]
    for wrong in (1200, -1, 2.5, "a"):
        with pytest.raises(ValueError, match=f"class_ids={wrong}: allowed is class ids, 0 to 1199"):
            draw.rows_of_class_ids(wrong)  # type: ignore[arg-type]


def test_get_label_ids_takes_one_name_or_many(pipeline: SpeeDDiTPipeline) -> None:
    assert pipeline.get_label_ids("goldfish") == [1]
    assert pipeline.get_label_ids(["goldfish", "tench"]) == [1, 0]
    assert pipeline.get_label_ids([7, "tench"]) == [7, 0], "rows are rows"
    with pytest.raises(ValueError, match="The model names no classes"):
        pipeline_of(transformer(), ddim()).get_label_ids("tench")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"class_labels": 11}, "class_labels=11: allowed is rows of the label table, 0 to 10"),
    ({"class_labels": [3, -1]}, "class_labels=-1: allowed is rows of the label table, 0 to 10"),
    ({"class_labels": 2.0}, r"class_labels=2\.0: allowed is rows"),
    ({"class_labels": [True]}, "class_labels=True: allowed is rows"),
    ({"class_labels": []}, r"class_labels=\[\]: allowed is one or more, or None"),
    ({"class_labels": "goldfisch"}, "Unknown class label 'goldfisch'. Did you mean 'goldfish'"),
    ({"class_labels": ["tench", "zzz"]}, "Unknown class label 'zzz'. Allowed: .*tench"),
    ({"class_labels": [1, 2], "num_images": 3}, "num_images=3: allowed is 2, one for each label"),
    ({"num_images": 0}, "num_images=0: allowed is 1 or more"),
    ({"guidance_scale": -1.0}, r"guidance_scale=-1\.0: allowed is a number of at least 0"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
    ({"guidance_scale": "2"}, "guidance_scale=2: allowed is a number"),
    ({"guidance_channels": 0}, "guidance_channels=0: allowed is 1 to 4, or None for all"),
    ({"guidance_channels": 5}, "guidance_channels=5: allowed is 1 to 4"),
    ({"guidance_channels": 1.5}, r"guidance_channels=1\.5: allowed is 1 to 4"),
    ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval=\(0\.5, 0\.2\): allowed is two numbers from 0 to 1"),
    ({"guidance_interval": (0.0, 300)}, "guidance_interval=.*300.*two numbers from 0 to 1"),
    ({"guidance_interval": (0.5,)}, "guidance_interval=.*two numbers"),
    ({"guidance_interval": 0.5}, r"guidance_interval=0\.5: .*two numbers"),
    ({"num_inference_steps": 0}, "num_inference_steps=0: allowed is 1 to 1000"),
    ({"num_inference_steps": 1001}, "num_inference_steps=1001: allowed is 1 to 1000"),
    ({"num_inference_steps": 2.5}, r"num_inference_steps=2\.5: allowed is 1 to 1000"),
    ({"output_type": "png"}, "output_type=png: allowed is pil, np, pt, latent"),
    ({"eta": 1.5}, r"eta=1\.5: allowed is a number from 0 to 1"),
    ({"generator": 3}, "generator=3: allowed is a torch.Generator or a list of them"),
    ({"generator": 0}, "generator=0: allowed is a torch.Generator"),
    ({"generator": [torch.Generator()], "class_labels": [1, 2]}, "number of generators=1: allowed is 2, one per im"),
    ({"generator": [torch.Generator(), 7], "class_labels": [1, 2]}, "generator=.*7.*: allowed is a torch.Generator"),
    ({"latents": torch.zeros(2, 4, 4, 4), "class_labels": [1]}, r"latents=.*\[2, 4, 4, 4\].*shape \(1, 4, 4, 4\)"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents=.*\[1, 4, 8, 8\].*shape \(1, 4, 4, 4\)"),
    ({"latents": [1.0]}, r"latents=\[1\.0\]: allowed is a float tensor of shape"),
    ({"latents": torch.zeros(4, 4, 4)}, r"latents=\[4, 4, 4\].*shape \(N, C, S, S\)"),
    ({"latents": torch.zeros(0, 4, 4, 4)}, r"latents=\[0, 4, 4, 4\].*shape \(N, C, S, S\)"),
    ({"latents": torch.zeros(1, 4, 4, 4, dtype=torch.int64)}, "latents=.*torch.int64 on cpu: allowed is a float"),
    ({"latents": torch.zeros(1, 4, 4, 4, dtype=torch.complex64)}, "latents=.*torch.complex64 on cpu: allowed is a"),
    ({"latents": torch.zeros(1, 4, 4, 4, device="meta")}, "latents=.*on meta: allowed is a float tensor"),
    ({"latents": torch.full((1, 4, 4, 4), float("nan"))}, "latents=NaN or infinite values: allowed is finite noise"),
    ({"latents": np.zeros((1, 4, 4, 4), np.float32)}, "latents=.*: allowed is a float tensor"),
    ({"generator": []}, r"generator=\[\]: allowed is a torch.Generator or a list"),
    ({"generator": [None], "class_labels": [1]}, r"generator=\[None\]: allowed is a torch.Generator"),
    ({"generator": (torch.Generator(),)}, "generator=.*: allowed is a torch.Generator or a list"),
    ({"num_images": True}, "num_images=True: allowed is 1 or more"),
    ({"num_images": "2"}, "num_images=2: allowed is 1 or more"),
    ({"num_inference_steps": True}, "num_inference_steps=True: allowed is 1 to 1000"),
    ({"num_inference_steps": "5"}, "num_inference_steps=5: allowed is 1 to 1000"),
    ({"num_inference_steps": None}, "num_inference_steps=None: allowed is 1 to 1000"),
    ({"guidance_scale": True}, "guidance_scale=True: allowed is a number"),
    ({"guidance_scale": None}, "guidance_scale=None: allowed is a number"),
    ({"guidance_scale": NoNumber()}, "guidance_scale=no number: allowed is a number"),
    ({"guidance_interval": "01"}, "guidance_interval=01: .*two numbers"),
    ({"guidance_interval": ("0", "1")}, "guidance_interval=.*two numbers"),
    ({"guidance_interval": (False, True)}, "guidance_interval=.*two numbers"),
    ({"guidance_interval": (0.0, float("nan"))}, "guidance_interval=.*nan.*two numbers"),
    ({"guidance_interval": None}, "guidance_interval=None: .*two numbers"),
    ({"guidance_channels": True}, "guidance_channels=True: allowed is 1 to 4"),
    ({"class_labels": [[]]}, r"class_labels=\[\[\]\]: allowed is one or more, or None"),
    ({"class_labels": {"tench": 1}}, "class_labels=.*: allowed is rows of the label table"),
    ({"class_labels": {1, 2}}, "class_labels=.*: allowed is rows of the label table"),
    ({"class_labels": b"tench"}, "class_labels=.*: allowed is rows of the label table"),
    ({"class_labels": [None]}, "class_labels=None: allowed is rows of the label table"),
    ({"class_labels": torch.tensor([1.0])}, r"class_labels=1\.0: allowed is rows of the label table"),
    ({"class_labels": ""}, "Unknown class label ''"),
    ({"class_labels": "crane"}, r"Class label 'crane' is ambiguous: rows 3 \('crane'\), 7 \('crane'\)"),
    ({"output_type": ["pil"]}, "output_type=.*: allowed is pil, np, pt, latent, or None"),
    ({"eta": "0"}, "eta=0: allowed is a number from 0 to 1"),
    ({"eta": float("nan")}, "eta=nan: allowed is a number from 0 to 1"),
    ({"eta": True}, "eta=True: allowed is a number from 0 to 1"),
    ({"callback_on_step_end": 3}, "callback_on_step_end=3: allowed is a function"),
    (
        {"callback_on_step_end_tensor_inputs": "latents"},
        "callback_on_step_end_tensor_inputs=latents: allowed is a list",
    ),
    ({"callback_on_step_end_tensor_inputs": None}, "callback_on_step_end_tensor_inputs=None: allowed is a list"),
    ({"callback_on_step_end_tensor_inputs": [[]]}, "callback_on_step_end_tensor_inputs=.*: allowed is a list"),
    (
        {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
        "callback_on_step_end_tensor_inputs=.*prompt_embeds.*: allowed is a list out of: latents",
    ),
]


@pytest.mark.parametrize(
    ("wrong", "message"), WRONG, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_wrong_input_is_one_line_before_any_work(
    pipeline: SpeeDDiTPipeline, wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the transformer was asked")

    monkeypatch.setattr(pipeline.transformer, "forward", work)
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**({"class_labels": None} | wrong))
    assert "\n" not in str(error.value)


SPACED = {**SCHEDULE, "clip_sample": False}


@pytest.mark.parametrize(
    ("scheduler", "out_channels", "message"),
    [
        (
            lambda: DDPMScheduler(**SPACED, variance_type="learned_range"),
            4,
            "variance_type=learned_range.*fixed_small",
        ),
        (
            lambda: DDPMScheduler(**SPACED, variance_type="learned"),
            8,
            "variance_type=learned: allowed is learned_range",
        ),
        (
            lambda: DDPMParallelScheduler(**SPACED, variance_type="learned_range"),
            4,
            "variance_type=learned_range.*fixed_small",
        ),
        (UnCLIPScheduler, 4, "does not sample with UnCLIPScheduler: its step must be told the next timestep"),
        (ddim, 6, "out_channels=6: allowed is 4 or 8"),
        (lambda: PNDMScheduler(**SCHEDULE), 4, "num_inference_steps=3: allowed is 4 or more without skip_prk_steps"),
        (lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4, "use_dynamic_shifting=True"),
    ],
)
def test_parts_that_do_not_fit_are_refused(scheduler: Callable[[], Any], out_channels: int, message: str) -> None:
    draw = pipeline_of(transformer(out_channels=out_channels), scheduler())
    with pytest.raises(ValueError, match=message) as error:
        draw(1, num_inference_steps=3)
    assert "\n" not in str(error.value)


def test_eta_is_for_ddim() -> None:
    with pytest.raises(ValueError, match=r"eta=0\.5: EulerDiscreteScheduler has no eta"):
        pipeline_of(transformer(), EulerDiscreteScheduler(**SCHEDULE))(1, eta=0.5)


def test_output_channels_may_be_left_open() -> None:
    model = transformer(out_channels=None)  # type: ignore[arg-type]
    assert model.config.out_channels is None
    images = pipeline_of(model, ddim())(1, num_inference_steps=2, output_type="latent").images
    assert images.shape == (1, 4, 4, 4)
