"""The script that generates images: every option acts, and wrong values are one line with nothing written."""

from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from pipeline_parts import pipeline_of, transformer
from speed_diffusers.errors import InputError
from speed_diffusers.train_scripts import sample

FEW = ["class_labels=Sneaker,Dress", "num_images_per_class=1", "num_inference_steps=3"]


def test_options_of_guidance_and_sampler_change_the_picture(tmp_path: Path) -> None:
    pictures = {}
    for options in ([], ["sampler=ddpm"], ["guidance_channels=1"], ["guidance_interval=0.5,0.6"], ["sampler=heun"]):
        output = tmp_path / f"{len(pictures)}.png"
        sample.main([*FEW, *options, "guidance_scale=4", f"output={output}"])
        pictures[output.read_bytes()] = options
    assert len(pictures) == 5
    again = tmp_path / "again.png"
    sample.main(
        [*FEW, "sampler=None", "guidance_channels=4", "guidance_interval=[0,1]", "guidance_scale=4", f"output={again}"]
    )
    assert pictures[again.read_bytes()] == [], "what is the default anyhow"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("sampler=dimm", "Unknown sampler 'dimm'. Did you mean 'ddim'"),
        ("guidance_channels=0", "guidance_channels=0: must be at least 1"),
        ("guidance_channels=5", r"guidance_channels=5: must lie in \[1, 4\]"),
        ("guidance_channels=two", "guidance_channels.*'two'.*whole number"),
        ("guidance_interval=0.5", r"guidance_interval=\[0.5\]: must be two numbers in \[0, 1\], the lower one first"),
        ("guidance_interval=0.6,0.5", r"guidance_interval=\[0.6, 0.5\]: must be two numbers"),
        ("guidance_interval=0,300", r"guidance_interval=300.0: must lie in \[0, 1\]"),
        ("guidance_interval=0,nan", "guidance_interval: 'nan' is not a finite number"),
        ("num_inference_steps=1001", "num_inference_steps=1001: the model has 1000 timesteps"),
    ],
)
def test_wrong_values_are_one_line(wrong: str, message: str, tmp_path: Path) -> None:
    output = tmp_path / "samples.png"
    with pytest.raises(InputError, match=message) as error:
        sample.main([*FEW[:2], wrong, f"output={output}"])
    assert "\n" not in str(error.value) and not output.exists()


def test_models_without_class_names_and_of_few_rows(tmp_path: Path) -> None:
    pipeline_of(transformer(rows=10), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "flow")
    options = [f"model={tmp_path / 'flow'}", "num_inference_steps=2", f"output={tmp_path / 'flow.png'}"]
    sample.main(options)
    sample.main([*options, "class_labels=3,10", "sampler=heun"])
    assert (tmp_path / "flow.png").is_file()
    with pytest.raises(InputError, match="class_labels=11: the model has rows 0 to 10"):
        sample.main([*options, "class_labels=11"])
    with pytest.raises(InputError, match="sampler=ddim: the model was trained for flow matching"):
        sample.main([*options, "sampler=ddim"])
