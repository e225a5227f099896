"""docs/apply_speed.py: what it makes of many forms of scripts, how the results train, and its answers."""

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel

import diffusers_loops as loops
from script_shapes import HANDLED, REFUSED

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "apply_speed.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("apply_speed", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


APPLY = load()


@pytest.mark.parametrize("shape", HANDLED)
def test_every_known_form_is_rewritten(shape: str) -> None:
    source, wanted = HANDLED[shape]
    result, report = APPLY.apply_speed(source)
    compile(result, shape, "exec")
    lines = [re.sub(r"\s+", " ", line.strip()) for line in result.splitlines()]
    text = re.sub(r"\s+", " ", result)
    for line in (re.sub(r"\s+", " ", line) for line in wanted):
        assert line in lines or line in text, line
        assert text.count(line) == 1 or line not in source
    assert text.count("speed_scheduler(") <= 1
    assert report and all(line.startswith("line ") for line in report)
    with pytest.raises(APPLY.Refused, match="already"):
        APPLY.apply_speed(result)


@pytest.mark.parametrize("shape", REFUSED)
def test_unknown_forms_are_refused_with_a_reason(shape: str) -> None:
    source, reason = REFUSED[shape]
    with pytest.raises(APPLY.Refused, match=reason):
        APPLY.apply_speed(source)


def test_line_endings_and_other_alphabets_are_kept() -> None:
    source = HANDLED["one line"][0].replace("import copy", "import copy  # é 中")
    plain, _ = APPLY.apply_speed(source)
    windows, _ = APPLY.apply_speed(source.replace("\n", "\r\n"))
    assert windows == plain.replace("\n", "\r\n")


IMPORTS = inspect.getsource(loops).partition("@dataclass")[0]
TINY = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
CASES = [
    (loops.text_to_image, {}),
    (loops.dreambooth, {}),
    (loops.dreambooth, {"with_prior_preservation": True}),
    (loops.flow_matching, {}),
    (loops.flow_matching, {"with_prior_preservation": True}),
]


def model_and_batch(flow: bool) -> tuple[Any, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    if flow:
        size = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "pos_embed_max_size": 8}
        heads = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
        model: Any = SD3Transformer2DModel(**size, **heads, joint_attention_dim=8, pooled_projection_dim=8)
        return model, (torch.randn(4, 4, 8, 8), torch.randn(4, 5, 8), torch.randn(4, 8))
    types = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 8}
    types["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    model = UNet2DConditionModel(**TINY, **types, attention_head_dim=4)
    return model, (torch.randn(4, 4, 8, 8), torch.randn(4, 5, 8))


@pytest.mark.parametrize(("loop", "options"), CASES)
def test_what_it_makes_of_a_loop_trains_with_the_weight_of_each_image(
    loop: Callable[..., loops.Trace], options: dict[str, Any], tmp_path: Path
) -> None:
    flow = loop is loops.flow_matching
    host: Any = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else DDPMScheduler()
    host.save_pretrained(tmp_path / "scheduler")
    args = SimpleNamespace(
        pretrained_model_name_or_path=str(tmp_path),
        prediction_type=None,
        snr_gamma=None,
        precondition_outputs=0,
        prior_loss_weight=0.25,
        **({"with_prior_preservation": False} | options),
    )
    result, _ = APPLY.apply_speed(IMPORTS + inspect.getsource(loop))
    names: dict[str, Any] = dict(vars(loops))
    exec(result, names)
    model, batch = model_and_batch(flow)
    torch.manual_seed(1)
    trace = names[loop.__name__](model, [batch], args)
    torch.manual_seed(1)
    noise = torch.randn_like(batch[0])
    target = noise - batch[0] if flow else noise
    error = (trace.predictions[0] - target).square().mean(dim=(1, 2, 3))
    weight = trace.scheduler.loss_weights(trace.timesteps[0])
    assert weight.std() > 0.01
    weighted = weight * error
    expected = weighted.mean()
    if args.with_prior_preservation:
        expected = weighted[:2].mean() + 0.25 * weighted[2:].mean()
    assert trace.losses[0] == pytest.approx(expected.item(), rel=1e-5)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def test_the_command_prints_a_diff_or_writes_a_script(tmp_path: Path) -> None:
    script, output = tmp_path / "train.py", tmp_path / "train_speed.py"
    script.write_text(HANDLED["one line"][0], "utf-8")
    shown = command(script)
    assert shown.returncode == 0
    assert "+    noise_scheduler = speed_scheduler(noise_scheduler)" in shown.stdout
    assert re.search(r"^line \d+: noise_scheduler = speed_scheduler\(noise_scheduler\)$", shown.stderr, re.M)
    assert script.read_text("utf-8") == HANDLED["one line"][0]
    written = command(script, "--output", output)
    assert (written.returncode, written.stdout) == (0, "")
    assert output.read_text("utf-8") == APPLY.apply_speed(HANDLED["one line"][0])[0]


def test_a_script_that_is_not_understood_ends_with_1_and_writes_nothing(tmp_path: Path) -> None:
    script, output = tmp_path / "train.py", tmp_path / "train_speed.py"
    script.write_text(REFUSED["no loss"][0], "utf-8")
    done = command(script, "--output", output)
    assert done.returncode == 1 and not output.exists()
    assert done.stderr.count("\n") == 1 and "no loss after line" in done.stderr


@pytest.mark.parametrize("wrong", ["missing", "a folder", "not Python", "not text", "output exists", "no folder"])
def test_wrong_input_ends_with_2_and_one_line(wrong: str, tmp_path: Path) -> None:
    script, output = tmp_path / "train.py", tmp_path / "result.py"
    if wrong == "a folder":
        script.mkdir()
    elif wrong != "missing":
        content = {"not Python": b"def (:\n", "not text": b"\xff\xfe"}
        script.write_bytes(content.get(wrong, HANDLED["one line"][0].encode()))
    if wrong == "output exists":
        output.write_text("kept", "utf-8")
    if wrong == "no folder":
        output = tmp_path / "nowhere" / "result.py"
    done = command(script, "--output", output)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not output.exists() or output.read_text("utf-8") == "kept"
