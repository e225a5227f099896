"""The comparison by steps: its estimator on curves that are known, its arms, and one run from training to table."""

import errno
import json
import math
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import quality_arms
import steps_to_quality
from quality_arms import ARMS, FIVE, SETTINGS, Arm, Job, Setting, jobs
from quality_estimator import Curve, bootstrap, load_curves, step_ratio, steps_to
from quality_report import write_report
from speed_diffusers.config.load import load_config
from speed_diffusers.errors import InputError
from speed_diffusers.train_scripts.train_dit_speed import SCRIPT_DIR, main
from speed_diffusers.training.config import TrainConfig

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
        assert config.checkpointing_steps is not None and config.lr_scheduler == "constant"
        assert all(step % config.checkpointing_steps == 0 for step in arm.measured_at)
        assert all(step % config.logging_steps == 0 for step in arm.measured_at)
    assert arm.measured_at[-1] == arm.steps


def test_the_order_of_the_runs() -> None:
    order = list(jobs(["quickstart"], [], []))
    assert len(order) == len(set(order)) == sum(len(arm.seeds) for arm in ARMS.values())
    main_arms = {name for name, arm in ARMS.items() if arm.seeds == FIVE}
    assert {job.arm for job in order[: len(main_arms)]} == main_arms
    assert [job.seed for job in order] == sorted(job.seed for job in order)
    assert [str(job) for job in jobs(["quickstart"], ["fast"], [2])] == ["quickstart/fast-2"]
    for text in (None, "quickstart/nothing-0", "quickstart/fast", "other/fast-0"):
        with pytest.raises(InputError, match="must be SETTING/ARM-SEED"):
            steps_to_quality._job(text)


def test_the_data_of_a_setting_are_made_once_and_by_scripts_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def pretend(command: list[object], *, check: bool, env: dict[str, str]) -> None:
        assert check and env["PYTHONPATH"] == str(ROOT)
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


def test_there_must_be_a_queue_to_speak_to(tmp_path: Path) -> None:
    for state in (None, {"pid": 2**22 + 1, "children": {}}):  # of a queue that has ended
        if state is not None:
            (tmp_path / "state.json").write_text(json.dumps(state))
        for action in ("pause", "resume", "stop"):
            with pytest.raises(InputError, match=f"action={action}: no queue runs in work_dir="):
                steps_to_quality.main([f"action={action}", f"work_dir={tmp_path}"])


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
def test_a_run_becomes_a_result_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: object
) -> None:
    quick = SETTINGS["quickstart"].options | {"max_train_samples": 40, "checkpointing_steps": 2, "logging_steps": 2}
    quick |= {"train_batch_size": 4, "num_validation_images": 1, "num_inference_steps": 1}
    monkeypatch.setitem(SETTINGS, "quickstart", Setting(quick, num_images=10, num_inference_steps=1))
    for name in ("uniform_epsilon", "fast"):
        monkeypatch.setitem(ARMS, name, Arm(ARMS[name].options, 4, (2, 4), (0,)))
    monkeypatch.setattr(steps_to_quality, "VALIDATION_IMAGES", 4)
    trained = []

    def in_this_process(folder: Path, **settings: object) -> Path:
        fresh_accelerate()  # type: ignore[operator]
        trained.append(folder)
        if not (folder / "pipeline").is_dir():
            main([f"{key}={value}" for key, value in settings.items()] + [f"output_dir={folder}"])
        return folder

    monkeypatch.setattr(steps_to_quality, "trained_run", in_this_process)
    config = steps_to_quality.QualityConfig(results_dir=str(tmp_path / "results"), commit="0123456789ab")
    for arm in ("uniform_epsilon", "fast"):
        steps_to_quality.make(Job("quickstart", arm, 0), config, tmp_path)
    result = json.loads((tmp_path / "results" / "quickstart" / "fast-0.json").read_text())
    assert (result["arm"], result["seed"], result["commit"]) == ("fast", 0, "0123456789ab")
    assert [point["step"] for point in result["curve"]] == [2, 4]
    assert all(point["images"] == 4 * point["step"] and point["frechet_distance"] > 0 for point in result["curve"])
    assert str(tmp_path) not in json.dumps(result)
    assert not list(trained[1].glob("checkpoint-*")) and (tmp_path / "pictures/quickstart/fast-0.png").exists()
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
