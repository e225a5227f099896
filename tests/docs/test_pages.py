"""Every command and every Python example of the README and the pages in docs/ runs, in small.

The pages are found, not listed: a new command or example is run without anybody's doing, and one that no test knows
how to run fails.
"""

import functools
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, UNet2DModel

from loopback_hub import LoopbackHub
from original_network import random_state
from quality_estimator import SHARES, Curve, Ratio, load_curves, step_ratio
from quality_report import BASELINES, FACTOR_SHARES
from speed_diffusers.config.load import load_config
from speed_diffusers.metrics import METRICS
from speed_diffusers.pipelines import SpeeDDiTPipeline
from speed_diffusers.train_scripts import push_to_hub, train_dit_speed

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LAUNCHED = re.compile(r"(\w+=\S+ )*(accelerate launch|python|torchrun) ")
"""How a command in running text begins; environment variables may stand before it."""

LEAVES = {
    "sample": "samples.png",
    "plan": "plan.png",
    "compare_errors": "errors.png",
    "report": "report.html",
    "make_reference_statistics": "reference/reference_features.safetensors",
    "evaluate": "**/scores/**/*.json",
    "generate_samples": "samples/generated.json",
    "cache_latents": "cache/speed_diffusers_latents/*/shard-00000.safetensors",
}
"""What a script writes where no output= says otherwise."""

TINY_RUN = [
    "max_train_steps=2",
    "train_batch_size=4",
    "max_train_samples=16",
    "logging_steps=1",
    "num_validation_images=1",
    "num_inference_steps=2",
    "num_score_images=None",
    "report_to=[]",
]


OWN_TESTS = {
    "docs/kohya_and_others.md": "test_kohya_and_others.py",
    "docs/upstream.md": "test_upstream.py",
    "docs/apply_speed.py": "test_apply_speed.py",
    "demo/app.py": "../demo/test_app.py",
}
"""Pages whose examples need stand-ins or fail on purpose, and scripts outside the package: who runs them."""


def test_who_runs_the_others_is_there() -> None:
    folder = Path(__file__).resolve().parent
    assert all((folder / name).is_file() and (ROOT / page).is_file() for page, name in OWN_TESTS.items())


def blocks(language: str) -> list[Any]:
    """The code blocks of a language on all pages without tests of their own, as test parameters: page and text."""
    return [
        pytest.param(page, code, id=f"{page}-{index}")
        for page, text in TEXTS.items()
        if page not in OWN_TESTS
        for index, (found, code) in enumerate(FENCE.findall(text))
        if found == language
    ]


def commands() -> list[Any]:
    """Every command of all pages, as test parameters: those of a block together, those in running text one by one."""
    found: list[tuple[str, list[str]]] = []
    for page, text in TEXTS.items():
        found += [(page, joined(code)) for language, code in FENCE.findall(text) if language == "bash"]
        spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
        found += [(page, [span]) for span in spans if LAUNCHED.match(span)]
    return [pytest.param(lines, id=f"{page}: {lines[0]}"[:90]) for page, lines in found]


def joined(code: str) -> list[str]:
    """The commands of a block, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_only_known_kinds_of_blocks_are_on_the_pages() -> None:
    # Diffs are run by test_other_trainers.py; a block without a language is a drawing.
    kinds = {language for text in TEXTS.values() for language, _ in FENCE.findall(text)}
    assert kinds == {"bash", "python", "diff", ""}
    assert all(text.count("```") == 2 * len(FENCE.findall(text)) for text in TEXTS.values())


@functools.cache
def tiny_run(folder: Path) -> Path:
    """A run of two steps of the default configuration."""
    train_dit_speed.main([*TINY_RUN, f"output_dir={folder / 'quickstart'}", f"cache_dir={folder / 'cache'}"])
    return folder / "quickstart"


@pytest.fixture
def place(
    fresh_accelerate: Callable[[], None],
    cache_dir: Path,
    image_folder: Path,
    hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The working folder in which the pages' commands run: with the runs, images and module that they name."""
    hub.tokens["hf_write"] = ("your-name", "write")
    run = tiny_run(cache_dir / "pages")
    fresh_accelerate()
    for name in ("quickstart", "mine", "speed", "uniform"):
        shutil.copytree(run, tmp_path / "runs" / name)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    (tmp_path / "cache").symlink_to(run.parent / "cache")
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name in ("images", "held_out"):
        (tmp_path / "path" / "to" / name).symlink_to(image_folder)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "features.py").write_text(
        "extractor = lambda: lambda images: images.mean(dim=(2, 3))\n"
    )
    torch.save(random_state(width=128, depth=6, rows=1001), tmp_path / "DiT-XL-2-256x256.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def release_what_is_named(code: str, hub: LoopbackHub) -> None:
    """Releases the run on the Hub under the name by which an example or a command takes it from there."""
    if named := re.search(r"(?:model|model_name_or_path)=(your-name/[\w-]+)|\"(your-name/[\w-]+)\"", code):
        push_to_hub.main(["model=runs/quickstart", f"hub_model_id={named[1] or named[2]}"])
        assert hub.repositories


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_an_example_runs(page: str, code: str, place: Path, hub: LoopbackHub) -> None:
    release_what_is_named(code, hub)
    names: dict[str, Any] = {}
    exec(compile(code, page, "exec"), names)
    if "images" in names:
        assert len(names["images"]) == 2
    if "image" in names:
        assert names["image"].size == (32, 32) and type(names["pipeline"]).__name__ == "SpeeDDiTPipeline"
    if "make_sampler" in names:
        assert type(names["pipeline"].scheduler) is DDPMScheduler
    if "timesteps" in names:
        assert names["timesteps"].dtype == torch.int64


@pytest.mark.parametrize("lines", commands())
def test_commands_run(
    lines: list[str], place: Path, hub: LoopbackHub, fresh_accelerate: Callable[[], None], tiny_vae: Path
) -> None:
    release_what_is_named("\n".join(lines), hub)
    for part in [part for line in lines for part in line.split("&&")]:
        words = [word for word in shlex.split(part, comments=True) if not re.match(r"[A-Z_]+=", word)]
        if words[:3] == ["pip", "install", "-e"]:
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", words[3])
            assert extra and (extra[1] is None or f'"{extra[1]}": ' in (ROOT / "setup.py").read_text("utf-8"))
        elif words != ["pytest"]:  # this very run
            launch(words, place, tiny_vae)
            fresh_accelerate()
            assert "train_scripts/push_to_hub.py" not in words or "dry_run=true" in words or hub.repositories


def launch(words: list[str], place: Path, tiny_vae: Path) -> None:
    """Runs a script as a command names it, in this process and in small."""
    assert words[0] in ("python", "torchrun") or words[:2] == ["accelerate", "launch"]
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    at = next(index for index, word in enumerate(words) if word.endswith(".py") or words[index - 1] == "-m")
    if words[at] in OWN_TESTS:
        return
    module, options = script(words[at]), words[at + 1 :]
    if words[at].startswith("benchmarks/") or asks_for_published_scores(options):
        # They take hours; tests/benchmarks runs them in small, and tests/metrics/test_published.py such scores, with
        # the packages that they need. Here their options are read.
        read_options(module, options)
        return
    name = module.__name__.rpartition(".")[2]
    module.main(in_small(name, options, tiny_vae))
    output = next((option.partition("=")[2] for option in options if option.startswith("output=")), LEAVES.get(name))
    assert output is None or any(path.stat().st_size > 0 for path in place.glob(output))


def asks_for_published_scores(options: list[str]) -> bool:
    """Whether a command measures what only the extra `eval` can."""
    asked = [option.partition("=")[2].split(",") for option in options if option.startswith("metrics=")]
    return any(METRICS[name].function.extractor is not None for names in asked for name in names)


def script(name: str) -> ModuleType:
    """The module of a script, by its path or by its dotted name."""
    if name.endswith(".py"):
        assert (ROOT / name).is_file(), f"{name} does not exist"
        name = name.removesuffix(".py").replace("/", ".")
        # Benchmarks are imported by bare names, scripts as they are installed.
        name = name.removeprefix("benchmarks.") if name.startswith("benchmarks.") else f"speed_diffusers.{name}"
    return importlib.import_module(name)


def read_options(module: ModuleType, options: list[str]) -> None:
    """Checks that a script takes the options."""
    (schema,) = (
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and is_dataclass(kind) and kind.__name__.endswith("Config")
        if kind.__module__ == module.__name__
    )
    load_config(schema, options, ROOT / "train_scripts")


def in_small(name: str, options: list[str], tiny_vae: Path) -> list[str]:
    """The options of a command, with what takes long or needs the network replaced by something small."""
    if name in ("train_dit_speed", "profile_training", "cache_latents"):
        small = [*TINY_RUN, "cache_dir=cache"]
        if name == "profile_training":
            small += ["profile_steps=2", "profile_warmup_steps=1"]
        elif name == "train_dit_speed":
            small.append("dry_run=true")
        if any(option.startswith("config=imagenet_256") for option in options):
            small += ["dataset_name=None", "train_data_dir=path/to/images", "model=DiT-tiny/2"]
            small += [f"pretrained_vae_model_name_or_path={tiny_vae}"]
    else:
        small = {
            "push_to_hub": [],
            "sample": ["num_inference_steps=2", "num_images_per_class=1"],
            "plan": [],
            "generate_samples": ["num_images=6", "images_per_pass=3", "num_inference_steps=2", "format=png"],
            "evaluate": ["num_images=6", "num_inference_steps=2"],
            "make_reference_statistics": ["resolution=32"],
            "compare_errors": [],
            "convert_checkpoint": ["vae=embedded"] if any(option.startswith("vae=") for option in options) else [],
            "report": [],
        }[name]
    replaced = {option.partition("=")[0] for option in small}
    return [option for option in options if option.partition("=")[0] not in replaced] + small


def test_the_first_example_is_ten_lines_that_train_a_diffusers_model() -> None:
    example = blocks("python")[0].values[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict[str, Any] = {}
    exec(example, names)
    types = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, **types)
    names["training_loss"](model, torch.randn(4, 3, 8, 8)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_readme_opens_pipelines_without_this_package_from_disk_and_from_the_hub(
    place: Path, hub: LoopbackHub
) -> None:
    examples = [blocks("python")[index].values[1] for index in (1, 2)]
    release_what_is_named(examples[1], hub)
    check = "\nimport sys\nassert len(images) == 2 and 'speed_diffusers' not in sys.modules\ndel images, pipeline\n"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "huggingface"), "HF_HUB_OFFLINE": "0"}
    subprocess.run(
        [sys.executable, "-c", check.join([*examples, ""])], cwd=place, env=environment, check=True, timeout=300
    )
    assert hub.times_asked("GET", "/your-name/.*/resolve/.*safetensors$") == 2, "the two models, in one variant"


def _mean_end(curves: Sequence[Curve], arm: str) -> float:
    """The mean kernel distance at the ends of an arm's runs."""
    ends = [curve.points[max(curve.points)]["kernel_distance"] for curve in curves if curve.arm == arm]
    return float(np.mean(ends))


def test_measured_results_in_words_are_those_of_the_benchmarks() -> None:
    table = (ROOT / "benchmarks/speed_vs_uniform/table.md").read_text("utf-8")
    rows = re.findall(r"^\| \d \|(.*)\|$", table, re.MULTILINE)
    ratios = [float(row.split("|")[2]) for row in rows]
    benchmarks = (ROOT / "benchmarks/README.md").read_text("utf-8")
    assert f"{min(ratios) - 1:.0%} to {max(ratios) - 1:.0%}".replace("% to", " to").replace("%", " %") in benchmarks
    curves = load_curves(ROOT / "benchmarks/steps_to_quality/quickstart")

    def ratio(arm: str, without: str, share: float = 1.0) -> Ratio:
        found = step_ratio(curves, arm, without, share)
        assert found is not None
        return found

    def words(arm: str, without: str, form: str) -> str:
        found = ratio(arm, without)
        assert found.interval is not None
        return form.format(found.mean, *found.interval)

    for baseline, form in (
        ("uniform_epsilon", "in {:.1f} times fewer of them ({:.2f} to {:.2f} over five seeds)"),
        ("uniform_epsilon_tuned", "in {:.1f} times fewer ({:.2f} to {:.2f})"),
    ):
        assert words("fast", baseline, form) in benchmarks
    short = [words("fast_ema_0.99", baseline, "{:.1f} times ({:.2f} to {:.2f})") for baseline in BASELINES]
    equal = ratio("fast_ema_0.99", "uniform_epsilon_tuned_ema_0.99")
    at_lower = f"{ratio('fast_ema_0.99', 'uniform_epsilon_rate_0.002_ema_0.99').mean:.1f}"
    of_equal = f"{equal.mean:.1f} ({at_lower} at 2e-3)"
    assert f"{' and '.join(short)}, and {of_equal} where the baseline has it too" in benchmarks
    readme = " ".join(TEXTS["README.md"].split())
    assert f"in three seeds), {at_lower} at 2e-3." in readme
    times = json.loads((ROOT / "benchmarks/arm_step_time/DiT-tiny-2.json").read_text("utf-8"))["arms"]
    step, three = times["fast"], times["fast_ns_steps_3"]
    assert "{:.2f} of the baseline's step ({:.2f} to {:.2f})".format(step["ratio"], *step["interval_95"]) in benchmarks
    assert "instead of five {:.2f} ({:.2f} to {:.2f})".format(three["ratio"], *three["interval_95"]) in benchmarks
    small = json.loads((ROOT / "benchmarks/arm_step_time/DiT-S-2.json").read_text("utf-8"))["arms"]["fast"]
    assert "{:.2f} ({:.2f} to {:.2f}), so there".format(small["ratio"], *small["interval_95"]) in benchmarks
    by_clock = [f"{ratio('fast', baseline).mean / step['ratio']:.1f}" for baseline in BASELINES]
    assert f"{by_clock[0]} times as fast as the baseline, and {by_clock[1]} times with the baseline at" in benchmarks
    assert f"takes {step['ratio']:.2f} times as long" in readme
    short_by_clock = [f"{ratio('fast_ema_0.99', baseline).mean / step['ratio']:.1f}" for baseline in BASELINES]
    assert f"with an average of 0.99 {' and '.join(short_by_clock)} times" in benchmarks
    assert f"saves {by_clock[0]} times by the clock, and {short_by_clock[0]} times with the shorter average" in readme
    lower = "uniform_epsilon_rate_0.002"
    said = words("fast", lower, "{:.1f} times fewer steps ({:.2f} to {:.2f} over five seeds)")
    shorter = words("fast_ema_0.99", lower, "{:.1f} times ({:.2f} to {:.2f})")
    assert f"against it `fast` needs {said}, and {shorter} with the shorter average" in readme
    assert f"4e-3, {ratio('fast', lower).mean:.1f} times at 2e-3, where it ends closest" in benchmarks
    in_each = ", ".join(f"{value:.2f}" for value in equal.per_seed.values())
    assert f"{equal.mean:.1f} times fewer steps than the baseline at 4e-3 ({in_each} in three seeds)" in readme
    cosine = ratio("fast_cosine", "uniform_epsilon_tuned_cosine")
    assert f"it needs {cosine.mean:.1f} times fewer steps than 3,000 of the baseline at 4e-3" in readme
    assert cosine.interval is not None and len(cosine.per_seed) == 4
    assert "({:.2f} to {:.2f} over four seeds)".format(*cosine.interval) in readme
    of_all = load_curves(ROOT / "benchmarks/steps_to_quality/fashion_mnist_60k")
    all_images = [step_ratio(of_all, "fast", baseline, 1.0) for baseline in BASELINES]
    factors = " and ".join(f"{found.mean:.1f}" for found in all_images if found is not None)
    assert f"all 60,000 images instead of 9,000 {factors} times, two seeds" in benchmarks
    assert [list(found.per_seed) for found in all_images if found is not None] == [[0, 1], [0, 1]]
    on_emoji = load_curves(ROOT / "benchmarks/steps_to_quality/emoji")
    emoji = step_ratio(on_emoji, "fast", "uniform_epsilon_tuned", 1.0, "kernel_distance")
    assert emoji is not None and emoji.interval is not None
    seeds = "{:.2f} to {:.2f} over {} seeds".format(*emoji.interval, {4: "four", 5: "five"}[len(emoji.per_seed)])
    said = f"on the emoji, with constant rates, {emoji.mean:.1f} times fewer than the baseline at 4e-3 ({seeds};"
    by_clock_there = f"{emoji.mean / step['ratio']:.1f}"
    farther = _mean_end(on_emoji, "uniform_epsilon_rate_0.002") / _mean_end(on_emoji, "uniform_epsilon_tuned") - 1
    assert f"{said} 2e-3 ends {farther:.0%} farther there)".replace("%", " %") in readme
    assert f"farther there), or {by_clock_there} times by the clock" in readme
    speed = [step_ratio(on_emoji, "paper_epsilon", baseline, 1.0, "kernel_distance") for baseline in BASELINES]
    of_speed = [found.mean for found in speed if found is not None]
    assert "{:.2f} on the emoji, but {:.2f} against the baseline at 4e-3".format(*of_speed) in readme
    ends = {arm: [curve for curve in curves if curve.arm == arm] for arm in ("fast", "uniform_epsilon")}

    def at_the_end(arm: str, score: str) -> float:
        return float(np.mean([curve.points[max(curve.points)][score] for curve in ends[arm]]))

    for score in ("precision", "recall"):
        low_high = f"({at_the_end('fast', score):.2f} against {at_the_end('uniform_epsilon', score):.2f})"
        assert re.search(rf"{score} (is )?(higher|lower) {re.escape(low_high)}", readme), low_high
    assert f"own part is {ratio('paper_epsilon', 'uniform_epsilon').mean:.2f} with epsilon" in readme
    assert f"({ratio('seed_epsilon', 'uniform_epsilon').mean:.2f} by its authors' first code" in readme
    assert f"and {ratio('paper_flow', 'uniform_flow').mean:.1f} on a flow" in readme
    pairs = (("paper_v", "uniform_v"), ("paper_v_unit", "uniform_v_unit"), ("paper_v_fast", "uniform_v_fast"))
    by_share = [ratio(*pair, share).mean for pair in pairs for share in FACTOR_SHARES]
    assert f", {min(by_share):.1f} to {max(by_share):.1f} with velocity" in readme
    tuned = [ratio("uniform_epsilon_tuned", "uniform_epsilon", share).mean for share in SHARES]
    said = f"4e-3 needs {min(tuned):.1f} to {max(tuned):.1f} times fewer steps than 1e-3"
    assert said in " ".join(TEXTS["docs/training.md"].split())


def test_the_generation_page_lists_every_new_argument() -> None:
    stock, ours = (inspect.signature(kind.__call__).parameters for kind in (DiTPipeline, SpeeDDiTPipeline))
    assert [name for name in set(ours) - set(stock) if f"`{name}" not in TEXTS["docs/generation.md"]] == []


NAMING = [*PAGES, *(ROOT / name for name in ("README.zh-CN.md", "CONTRIBUTING.md", "benchmarks/README.md"))]
NAMING += [ROOT / "train_scripts/configs/README.md", ROOT / "speed_diffusers/assets/fashion_mnist/README.md"]
NAMING += [ROOT / "demo/README.md"]


@pytest.mark.parametrize("page", NAMING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    links = re.findall(r"\]\((?!http)([^)\s]+)\)", text)
    missing = [link for link in links if not link_leads_somewhere(page, link)]
    paths = re.findall(
        r"(?<![\w/.-])((?:train_scripts|benchmarks|demo|docs|tests|pipelines|accelerate_configs)/[\w/]+\.\w+)", text
    )
    missing += [path for path in paths if not (ROOT / path).exists()]
    missing += [name for name in re.findall(r"\bspeed_diffusers(?:\.\w+)+", text) if not is_python_name(name)]
    assert missing == []


def link_leads_somewhere(page: Path, link: str) -> bool:
    """Whether the file of a link is there, and its heading too."""
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    if not target.exists() or not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text("utf-8")), re.MULTILINE)
    return anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def is_python_name(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False
