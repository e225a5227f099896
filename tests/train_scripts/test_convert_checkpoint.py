"""The script that converts checkpoints: both ways, and one line for every file that it cannot convert."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from original_network import random_state
from speed_diffusers.errors import InputError
from speed_diffusers.train_scripts import convert_checkpoint, sample

TINY = random_state(width=128, depth=6, rows=1001)


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


class Code:
    """A pickle of this calls a function when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_there_and_back_and_a_picture_from_between(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(TINY, tmp_path / "tiny.pt")
    folder, back = tmp_path / "new" / "tiny", tmp_path / "also_new" / "back.pt"
    convert_checkpoint.main([f"checkpoint={tmp_path / 'tiny.pt'}", f"output={folder}", "vae=embedded"])
    said = capsys.readouterr().out
    assert "6 blocks of width 128 with 4 heads, patches of 2, latents 4x8x8, 1000 classes, learned variance" in said
    assert "The stock DiTPipeline computes other timestep frequencies" in said and said.count("\n") == 2
    options = ["class_labels=207,360", "num_images_per_class=1", "num_inference_steps=2", "guidance_scale=4"]
    sample.main([*options, f"model={folder}", f"output={tmp_path / 'samples.png'}"])
    assert (tmp_path / "samples.png").is_file()
    convert_checkpoint.main([f"checkpoint={folder}", f"output={back}"])
    assert "DiT's own code computes others" not in capsys.readouterr().out
    found = torch.load(back, weights_only=True)["ema"]
    assert found.keys() == TINY.keys() and all(torch.equal(found[name], TINY[name]) for name in TINY)
    convert_checkpoint.main(["checkpoint=embedded", f"output={tmp_path / 'embedded.pt'}"])
    assert "DiT's own code computes others: on noise its predictions differ by " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"ema": without(TINY, "blocks.2.mlp.fc1.bias")},
            "not a DiT: it lacks 1 of its tensors, such as blocks.2.mlp.fc1.bias",
        ),
        (
            {**TINY, "q_norm.weight": torch.ones(2)},
            "not a DiT: 1 of its tensors are none of DiT's, such as q_norm.weight",
        ),
        ({"conv.weight": torch.ones(2)}, "not a DiT: it has no x_embedder.proj.weight, but must have"),
        ({}, "not a DiT: it has no x_embedder.proj.weight"),
        (torch.ones(2), "holds Tensor, but must hold a state dict"),
        ({**TINY, "x_embedder.proj.bias": torch.ones(2)}, r"x_embedder.proj.bias of shape \[2\], but DiT's would"),
        ({**TINY, "x_embedder.proj.bias": "wide"}, "x_embedder.proj.bias is str, but must be a floating-point tensor"),
        ({**TINY, "pos_embed": TINY["pos_embed"] + 0.1}, r"its pos_embed is not DiT's \(sines and cosines\)"),
        ({**TINY, "final_layer.linear.weight": torch.ones(12, 128), "final_layer.linear.bias": torch.ones(12)},
         "3 output channels for 4 input channels"),
        (random_state(width=96, depth=2),
         "No known DiT has 2 blocks of width 96, .* give num_attention_heads=N, which must divide 96"),
        ({"ema": TINY, "diffusers": {"constants": {"freq_shift": 3, "norm_eps": 1e-6}}}, "freq_shift=3: must lie in"),
        ({"ema": TINY, "diffusers": {"scheduler": {"_class_name": "Adam"}}}, "its scheduler is 'Adam', which is none"),
        ({"ema": TINY, "diffusers": {"num_attention_heads": 0}}, "num_attention_heads=0: must be at least 1"),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_one_line(state: Any, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "wrong.pt")
    refuses([f"checkpoint={tmp_path / 'wrong.pt'}", f"output={tmp_path / 'out'}"], message, tmp_path)


def refuses(options: list[str], message: str, folder: Path) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(InputError, match=message) as error:
        convert_checkpoint.main(options)
    assert "\n" not in str(error.value) and sorted(folder.iterdir()) == before


def test_a_file_cut_short_or_with_code_in_it_is_one_line_and_nothing_of_it_runs(tmp_path: Path) -> None:
    path, made = tmp_path / "wrong.pt", tmp_path / "made_by_code"
    options = [f"checkpoint={path}", f"output={tmp_path / 'out'}"]
    refuses(options, "wrong.pt: there is no such file", tmp_path)
    torch.save(TINY, path)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:size])
        refuses(options, "wrong.pt is cut short, or no checkpoint of torch.save", tmp_path)
    place = whole.index(b"data.pkl") + 100
    path.write_bytes(whole[:place] + bytes(50) + whole[place + 50 :])
    refuses(options, "wrong.pt cannot be read as a checkpoint of torch.save", tmp_path)
    for value in ({"ema": TINY, "args": Code(made)}, Code(made)):
        torch.save(value, path)
        refuses(options, r"holds more than weights: it names \w+\.mkdir, which reading it could run; none", tmp_path)
        assert not made.exists()
    torch.save(torch.nn.Linear(2, 2), path)
    refuses(options, "holds more than weights: it names torch.nn.modules.linear.Linear", tmp_path)


def test_options_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    torch.save(random_state(width=96, depth=2), tmp_path / "odd.pt")
    torch.save({"ema": TINY}, tmp_path / "ema.pt")
    torch.save(TINY, tmp_path / "bare.pt")
    odd, new = f"checkpoint={tmp_path / 'odd.pt'}", f"output={tmp_path / 'out'}"
    for options, message in (
        ([], "Give both"),
        ([odd], "Give both"),
        ([odd, f"output={tmp_path / 'there'}"], "there: exists already; give a new name"),
        ([odd, f"output={tmp_path / 'out.pt'}"], "both are .pt files; output must be a folder"),
        ([odd, new, "num_attention_heads=5"], "num_attention_heads=5: must divide the width, 96"),
        ([odd, new, "num_attention_heads=0"], "num_attention_heads=0: must be at least 1"),
        ([odd, new, "weights=emma"], "Unknown weights 'emma'.*Did you mean 'ema'"),
        ([odd, new, "vae=nowhere/vae"], "Could not load the vae 'nowhere/vae'"),
        ([f"checkpoint={tmp_path / 'ema.pt'}", new, "weights=model"], "weights=model: .*ema.pt holds ema alone"),
        ([f"checkpoint={tmp_path / 'bare.pt'}", new, "weights=model"], "bare.pt holds one set of weights"),
        (["checkpoint=embedded", new], "must be a file that ends in .pt"),
        (["checkpoint=embedded", f"{new}.pt", "num_attention_heads=4"], "num_attention_heads=4: only for a checkp"),
        (["checkpoint=embedded", f"{new}.pt", "weights=model"], "weights=model: only for a checkpoint=.pt file"),
        ([f"checkpoint={tmp_path / 'there'}", f"{new}.pt"], "there holds no transformer"),
    ):
        refuses(options, message, tmp_path)
    (tmp_path / "odd.pt").rename(tmp_path / "odd.pth")
    convert_checkpoint.main([f"checkpoint={tmp_path / 'odd.pth'}", new, "num_attention_heads=6"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scheduler", "transformer"]
