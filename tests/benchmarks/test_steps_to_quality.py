"""The comparison by steps: its estimator on curves that are known, its arms, and one run from training to table."""

import errno
import gzip
import json
import math
import os
import signal
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import arm_step_time
import class_distances
import quality_arms
import same_images
import steps_to_quality
from quality_arms import ARMS, FIVE, SETTINGS, Arm, Job, Setting, jobs
from quality_estimator import Curve, bootstrap, load_curves, step_ratio, steps_to
from quality_report import FACTORS, arms_of, factors, with_ladder, write_report
from speed_diffusers.config.load import load_config
from speed_diffusers.data.decode import load_image
from speed_diffusers.data.images import open_images
from speed_diffusers.errors import InputError
from speed_diffusers.files import file_sha256
from speed_diffusers.generation import load_pipeline
from speed_diffusers.generation.generate import GenerationSettings, class_samples, row_names_of
from speed_diffusers.metrics import load_extractor, load_reference
from speed_diffusers.metrics.kernel import kernel_distance
from speed_diffusers.train_scripts.train_dit_speed import SCRIPT_DIR
from speed_diffusers.training.config import DEFAULT_CONFIG, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = (250, 500, 1000, 2000, 3000)


def power_law(arm: str, seed: int, speed_up: float, power: float = -0.8) -> Curve:
    """Quality as a power of the steps, reached `speed_up` times as early."""
    points = {step: {"frechet_distance": 1e4 * (step * speed_up) ** power} for step in STEPS}
    return Curve(arm, seed, points, {})


def test_the_ratio_of_power_laws_is_exact() -> None:
    curves = [power_law("uniform", seed, 1.0 + 0.1 * seed) for seed in range(5)]
    curves += [power_law("fast", seed, 4.0 * (1.0 + 0.1 * seed)) for seed in range(5)]
    for share in (1 / 3, 2 / 3, 1.0):
        ratio = step_ratio(curves, "fast", "uniform", share)
        assert ratio is not None and ratio.interval is not None
        assert ratio.per_seed == pytest.approx(dict.fromkeys(range(5), 4.0), rel=1e-9)
        assert (ratio.mean, *ratio.interval) == pytest.approx((4.0, 4.0, 4.0), rel=1e-9)
    assert step_ratio(curves, "absent", "uniform", 1.0) is None


def test_a_curve_is_made_monotone_and_one_that_never_arrives_counts() -> None:
    curve = Curve("a", 0, {step: {"d": value} for step, value in zip(STEPS, (20, 10, 12, 5, 8), strict=True)}, {})
    assert steps_to(curve, 10, "d") == pytest.approx(500)
    assert steps_to(curve, 25, "d") == 250, "a run that is better at its first step is given that step"
    assert steps_to(curve, 4.9, "d") == math.inf
    assert 1000 < steps_to(curve, 7, "d") < 2000
    curves = [power_law("uniform", seed, 1.0) for seed in (0, 1)]
    early = power_law("early", 1, 2.0)
    early = replace(early, points={step: early.points[step] for step in (250, 500)})
    found = step_ratio([*curves, power_law("early", 0, 2.0), early], "early", "uniform", 1.0)
    assert found is not None and found.per_seed == pytest.approx({0: 2.0}), "its longer runs are missing"
    longest = replace(curves[0], points={4000: {"d": 1.0, "frechet_distance": 1.0}})
    found = step_ratio(
        [longest, curves[1], power_law("slow", 0, 1.5), power_law("slow", 1, 0.5)], "slow", "uniform", 0.5
    )
    assert found is not None and list(found.per_seed) == [1], (
        "the other was not measured at that step of the longest run"
    )
    curves += [power_law("slow", 0, 1.5), power_law("slow", 1, 0.5)]
    ratio = step_ratio(curves, "slow", "uniform", 1.0)
    assert ratio is not None and ratio.mean == 0 and ratio.per_seed[1] == 0 and ratio.per_seed[0] > 1.4
    assert str(ratio) == "not reached by 1 of 2"


def test_the_interval_covers_the_mean_and_needs_seeds() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        low, high = bootstrap(np.exp(random.normal(1.0, 0.1, 12))) or (0, 0)
        covered += low <= math.e <= high
    assert 0.85 <= covered / 200 <= 0.98
    assert bootstrap(np.array([1.0, 2.0, 3.0])) is None


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_training(name: str) -> None:
    arm = ARMS[name]
    for setting in SETTINGS.values():
        options = {**setting.options, **arm.options, "max_train_steps": arm.steps, "output_dir": "out"}
        options = steps_to_quality.filled(options, data="folder")
        config = load_config(TrainConfig, [f"{key}={value}" for key, value in options.items()], SCRIPT_DIR)
        # Any step of a constant rate is the end of a shorter run; with another, the last one alone is.
        assert config.lr_scheduler == "constant" if arm.curve is None else arm.measured_at == (arm.steps,)
        assert all(config.saves_at(step) for step in arm.measured_at)
        # The last step is always logged.
        assert all(step % config.logging_steps == 0 or step == arm.steps for step in arm.measured_at)
    assert arm.measured_at[-1] == arm.steps


def test_the_first_command_is_the_arm_that_it_was_chosen_by() -> None:
    config, arm = load_config(TrainConfig, [], SCRIPT_DIR, default=DEFAULT_CONFIG), ARMS["fast_quick_cosine_880"]
    options = {**SETTINGS["quickstart"].options, **arm.options, "max_train_steps": arm.steps}
    measured = load_config(TrainConfig, [f"{key}={value}" for key, value in options.items()], SCRIPT_DIR)
    # What an arm does otherwise touches nothing that is computed.
    apart = {"output_dir", "num_score_images", "report_to", "checkpointing_steps", "num_validation_images"}
    apart |= {"num_inference_steps", "logging_steps"}
    assert {
        field.name for field in fields(config) if getattr(config, field.name) != getattr(measured, field.name)
    } <= apart


def test_runs_of_several_lengths_are_one_curve(tmp_path: Path) -> None:
    lengths = {name: arm.steps for name, arm in ARMS.items() if arm.curve == "fast_cosine"}
    assert len(lengths) > 3
    for name, steps in lengths.items():
        result = {"arm": name, "seed": 2, "curve": [{"step": steps, "frechet_distance": 1000 / steps}]}
        (tmp_path / f"{name}-2.json").write_text(json.dumps(result))
    (curve,) = load_curves(tmp_path)
    assert (curve.arm, curve.seed, sorted(curve.points)) == ("fast_cosine", 2, sorted(lengths.values()))
    assert arms_of([curve]) == ["fast_cosine"]


def test_the_order_of_the_runs() -> None:
    order = list(jobs(["quickstart"], [], []))
    assert len(order) == len(set(order)) == sum(len(arm.seeds) for arm in ARMS.values())
    main_arms = {name for name, arm in ARMS.items() if arm.seeds == FIVE}
    first, rest = order[: 5 * len(main_arms)], order[5 * len(main_arms) :]
    assert {job.arm for job in first} == main_arms and not {job.arm for job in rest} & main_arms
    for part in (first, rest):
        assert [job.seed for job in part] == sorted(job.seed for job in part)
    assert [str(job) for job in jobs(["quickstart"], ["fast"], [2])] == ["quickstart/fast-2"]
    config = steps_to_quality.QualityConfig(runs=["emoji/fast-3", "quickstart/fast-0"], arms=["paper_v"])
    assert steps_to_quality.wanted(config) == [Job("emoji", "fast", 3), Job("quickstart", "fast", 0)]
    for text in ("", "quickstart/nothing-0", "quickstart/fast", "other/fast-0"):
        with pytest.raises(InputError, match="must be SETTING/ARM-SEED"):
            steps_to_quality._job(text)


def test_a_setting_names_the_arms_and_seeds_that_it_runs() -> None:
    for setting, each in SETTINGS.items():
        assert set(each.arms or ()) <= set(ARMS), f"{setting} names an arm that there is not"
    small = list(jobs(["fashion_mnist_60k"], [], []))
    assert {(job.arm, job.seed) for job in small} == {
        (arm, seed) for arm in ("uniform_epsilon", "uniform_epsilon_tuned", "fast") for seed in (0, 1)
    }
    emoji = list(jobs(["emoji"], [], []))
    main_arms = {"uniform_epsilon", "uniform_epsilon_tuned", "uniform_epsilon_rate_0.002", "paper_epsilon", "fast"}
    assert {job.arm for job in emoji[:25]} == main_arms and {job.seed for job in emoji[25:]} == {0, 1}
    assert len(emoji) == len(set(emoji)) == 25 + 2 * 9 + 7
    assert list(jobs(["emoji"], ["paper_v"], [4])) == [], "paper_v has five seeds, but two on emoji"


def test_the_data_of_a_setting_are_made_once_and_by_scripts_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def pretend(command: list[object], *, check: bool, env: dict[str, str]) -> None:
        assert check and env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        ran.append([str(word) for word in command[1:]])
        made = list(SETTINGS["emoji"].made_by)[len(ran) - 1]
        path = steps_to_quality.data_dir("emoji", tmp_path) / made
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr(steps_to_quality.subprocess, "run", pretend)
    with pytest.raises(InputError, match="settings=emoji: first npm install emoji-datasource-google"):
        steps_to_quality.make_data("emoji", ROOT, tmp_path, None)
    for _ in range(2):
        steps_to_quality.make_data("emoji", ROOT, tmp_path, "node_modules/emoji")
    assert len(ran) == 3 and all(Path(command[0]).is_file() for command in ran)
    assert "package_dir=node_modules/emoji" in ran[0] and f"output_dir={tmp_path / 'data' / 'emoji' / 'vae'}" in ran[1]
    steps_to_quality.make_data("quickstart", ROOT, tmp_path, None)
    assert len(ran) == 3


def test_all_of_fashion_mnist_is_made_from_its_idx_files(tmp_path: Path) -> None:
    names = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    for name, values in zip(names, (np.arange(20 * 28 * 28).reshape(20, 28, 28), np.arange(20) % 10), strict=True):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
        (tmp_path / name).write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))
    with pytest.raises(InputError, match="settings=fashion_mnist_60k: first apt-get install dataset-fashion-mnist"):
        steps_to_quality.make_data("fashion_mnist_60k", ROOT, tmp_path, None)
    steps_to_quality.make_data("fashion_mnist_60k", ROOT, tmp_path, str(tmp_path))
    setting = SETTINGS["fashion_mnist_60k"]
    place = steps_to_quality.data_dir("fashion_mnist_60k", tmp_path)
    options = steps_to_quality.filled(setting.options, data=place)
    made = open_images(train_data_dir=options["train_data_dir"])
    assert len(made) == 20 and [made.labels[row] for row in range(3)] == [0, 1, 2]
    assert load_reference(setting.reference).statistics.count == 10_000
    assert steps_to_quality.fingerprints(place) == {"train.parquet": file_sha256(place / "train.parquet")}


def test_there_must_be_a_queue_to_speak_to(tmp_path: Path) -> None:
    for state in (None, {"pid": 2**22 + 1, "children": []}):  # of a queue that has ended
        if state is not None:
            (tmp_path / "state.json").write_text(json.dumps(state))
        for action in ("pause", "resume", "stop"):
            with pytest.raises(InputError, match=f"action={action}: no queue runs in work_dir="):
                steps_to_quality.main([f"action={action}", f"work_dir={tmp_path}"])


@pytest.mark.parametrize("short", ["max_train_steps=2", "num_images=10"])
def test_runs_that_are_cut_short_do_not_come_among_the_others(short: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{short}: cuts runs short; give a results_dir too"):
        steps_to_quality.main([short, f"work_dir={tmp_path / 'work'}"])
    assert not (tmp_path / "work").exists()


def test_what_ends_a_queue_ends_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[bytes]] = []

    def started(*_: object) -> subprocess.Popen[bytes]:
        children.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        return children[-1]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(steps_to_quality, "exported_commit", lambda *_: ROOT)
    monkeypatch.setattr(steps_to_quality, "start", started)
    monkeypatch.setattr(steps_to_quality, "write_text", full)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(OSError, match="No space left"):
            steps_to_quality.main([f"work_dir={tmp_path}", f"results_dir={tmp_path}", "arms=fast"])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert [child.returncode for child in children] == [-signal.SIGTERM]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_becomes_a_result_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = SETTINGS["quickstart"].options | {"max_train_samples": 40, "checkpointing_steps": 2, "logging_steps": 2}
    quick |= {"train_batch_size": 4, "num_validation_images": 1, "num_inference_steps": 1}
    monkeypatch.setitem(SETTINGS, "quickstart", Setting(quick, num_images=10, num_inference_steps=1))
    for name in ("uniform_epsilon", "fast"):
        monkeypatch.setitem(ARMS, name, Arm(ARMS[name].options, 4, (2, 4), (0,)))
    monkeypatch.setattr(steps_to_quality, "VALIDATION_IMAGES", 4)
    config = steps_to_quality.QualityConfig(
        results_dir=str(tmp_path / "results"), commit="0123456789ab", arms=["uniform_epsilon", "fast"], seeds=[0]
    )
    broken = Arm(ARMS["paper_v"].options | {"speed_sampling": "nothing"}, 4, (4,), (0,))
    monkeypatch.setitem(ARMS, "paper_v", broken)
    with pytest.raises(InputError, match=r"1 run\(s\) failed: quickstart/paper_v-0"):
        steps_to_quality.work(replace(config, arms=["uniform_epsilon", "paper_v", "fast"]), tmp_path)
    steps_to_quality.work(replace(config, arms=["paper_v"]), tmp_path)  # another worker leaves it alone
    assert (tmp_path / "claims/quickstart/paper_v-0.failed").exists()
    result = json.loads((tmp_path / "results" / "quickstart" / "fast-0.json").read_text())
    assert (result["arm"], result["seed"], result["commit"]) == ("fast", 0, "0123456789ab")
    assert [point["step"] for point in result["curve"]] == [2, 4]
    assert all(point["images"] == 4 * point["step"] and point["frechet_distance"] > 0 for point in result["curve"])
    assert str(tmp_path) not in json.dumps(result)
    assert result["data"] == {}  # what is embedded goes with the commit
    run = steps_to_quality.run_dir(Job("quickstart", "fast", 0), tmp_path)
    assert not list(run.glob("checkpoint-*")) and (tmp_path / "pictures/quickstart/fast-0.png").exists()
    # measured again, nothing is computed: the checkpoints are gone
    steps_to_quality.make(Job("quickstart", "fast", 0), config, tmp_path)
    assert json.loads((tmp_path / "results" / "quickstart" / "fast-0.json").read_text()) == result
    table = write_report(tmp_path / "results" / "quickstart")
    assert "| fast | 1 |" in table and "Times fewer steps than `uniform_epsilon`" in table
    assert Image.open(tmp_path / "results" / "quickstart" / "curves.png").width > 500
    assert len(load_curves(tmp_path / "results" / "quickstart")) == 2


def test_committed_tables_are_those_of_the_committed_results(tmp_path: Path) -> None:
    for setting in quality_arms.SETTINGS:
        folder = steps_to_quality.RESULTS / setting
        if not list(folder.glob("*-*.json")):
            continue
        for path in folder.glob("*-*.json"):
            (tmp_path / setting).mkdir(exist_ok=True)
            (tmp_path / setting / path.name).write_text(path.read_text())
        assert write_report(tmp_path / setting) == (folder / "table.md").read_text().rstrip("\n")
    page = (ROOT / "README.md").read_text("utf-8")
    made = with_ladder(page, steps_to_quality.RESULTS)
    assert made == page, "run: python benchmarks/steps_to_quality.py action=report"


def test_one_factor_at_a_time_is_held_against_the_arm_without_it(tmp_path: Path) -> None:
    for changed, arm, without in FACTORS:
        assert changed and {arm, without} <= ARMS.keys()
    curves = [power_law("uniform_v", 0, 2.0), power_law("paper_v", 0, 3.0), power_law("fast", 0, 5.0)]
    table = factors(curves, "frechet_distance")
    assert table is not None and "| paper_v | uniform_v | 1.50 (1.50) | 1.50 (1.50) |" in table
    assert "| fast |" not in table, "the arm without Muon has no runs here"
    assert factors(curves[:1], "frechet_distance") is None


def test_a_setting_is_reported_in_its_own_distance(tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    folder.mkdir()
    for arm, factor in (("uniform_epsilon", 1), ("fast", 4)):
        # The Fréchet distances would say the opposite.
        scores = {step: {"frechet_distance": float(step), "kernel_distance": 50 / (factor * step)} for step in STEPS}
        other = dict.fromkeys(("recall", "precision", "class_agreement", "validation_loss"), 0.5)
        curve = [{"step": step, **values, **other} for step, values in scores.items()]
        (folder / f"{arm}-0.json").write_text(json.dumps({"arm": arm, "seed": 0, "curve": curve}))
    table = write_report(folder)
    assert "**Kernel distance after steps**" in table and "| uniform_epsilon | 1 | 0.1000 | 0.0500 |" in table
    assert "| fast | at least 3.00 (3.00) | 4.00 (4.00) | 4.00 (4.00) | 4.00 (4.00) |" in table


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_step_times_of_arms_are_taken_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = SETTINGS["quickstart"].options | {"max_train_samples": 8, "cache_dir": tmp_path / "cache"}
    monkeypatch.setitem(SETTINGS, "quickstart", Setting(quick))
    options = ["arms=uniform_epsilon,fast", "models=DiT-tiny/8", "train_batch_size=2", "block_steps=2", "rounds=3"]
    arm_step_time.main([*options, f"results_dir={tmp_path / 'results'}"])
    result = json.loads((tmp_path / "results" / "DiT-tiny-8.json").read_text())
    assert result["against"] == "uniform_epsilon" and list(result["arms"]) == ["uniform_epsilon", "fast"]
    ours, theirs = result["arms"]["fast"], result["arms"]["uniform_epsilon"]
    ratios = np.array(ours["by_round"]) / np.array(theirs["by_round"])
    assert len(ratios) == 3 and ours["ratio"] == pytest.approx(np.median(ratios))
    low, high = ours["interval_95"]
    assert min(ratios) <= low <= ours["ratio"] <= high <= max(ratios)
    assert theirs["ratio"] == 1 and "DiT-tiny/8 fast: " in capsys.readouterr().out


def test_pipelines_are_put_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["class_labels=Bag,Dress", "num_images_per_class=2", "num_inference_steps=1"]
    output = tmp_path / "made" / "both.png"
    same_images.main(["models=embedded,embedded", "titles=[$one$,two]", f"output={output}", *common])
    # two models of two columns and two rows of 32 pixels each, every pixel twice
    picture = np.asarray(Image.open(output).convert("L"), dtype=int)
    assert picture.shape[0] == pytest.approx(2 * (2 * 34 - 2) + 35, abs=2)
    assert "Saved" in capsys.readouterr().out
    with pytest.raises(InputError, match="2 given with 1 titles; each needs one"):
        same_images.main(["models=embedded,embedded", "titles=[one]", f"output={tmp_path / 'no.png'}", *common])
    assert not (tmp_path / "no.png").exists()


def test_distances_of_classes_are_those_of_their_own_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["num_images_per_class=3", "num_inference_steps=4", f"results_dir={tmp_path / 'results'}"]
    class_distances.main(["models=embedded,embedded,embedded", "titles=[a,a,$b$]", *common])
    result = json.loads((tmp_path / "results" / "result.json").read_text())
    first, second, third = (model["kernel_distance"] for model in result["models"])
    assert first == second == third and len(first) == 10, "the same noise for all"
    pipeline, extractor = load_pipeline("embedded"), load_extractor()
    held_out = open_images(dataset_name="embedded", split="test")
    name, *_ = held_out.label_names or []
    rows = {name: row for row, name in row_names_of(pipeline).items()}
    images = class_samples(pipeline, [rows[name]], 3, GenerationSettings(num_inference_steps=4))
    held_rows = np.flatnonzero(held_out.labels == 0)
    real = np.stack([load_image(held_out.image(int(row)) or {}, 32) for row in held_rows]) / 255
    features = [extractor(torch.from_numpy(each).permute(0, 3, 1, 2).float())[0] for each in (images, real)]
    assert first[name] == pytest.approx(kernel_distance(*features), rel=1e-4)
    assert result["held_out_images"][name] == len(real)
    table = (tmp_path / "results" / "table.md").read_text()
    assert "| class | a | $b$ |" in table and "| models | 2 | 1 |" in table
    assert Image.open(tmp_path / "results" / "class_distances.png").width > 500
    with pytest.raises(InputError, match="1 given with 0 titles"):
        class_distances.main(["models=embedded", *common])
