"""The plan: printed numbers against formulas by hand, every registered strategy, its picture, and wrong input."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from speed_diffusers import ForwardProcess, SpeeDDDPMScheduler, SpeeDOptions, SpeeDStrategy
from speed_diffusers.config.load import load_config, save_config
from speed_diffusers.errors import InputError
from speed_diffusers.generation.pretrained import load_transformer
from speed_diffusers.models import TrainableDiT
from speed_diffusers.presets import PRESETS
from speed_diffusers.reports.strategy_plot import (
    area_shares,
    axis_range,
    density_over_log_snr,
    log_snr_moments,
    mean_weight,
    relative_density,
    save_strategy_plot,
)
from speed_diffusers.reports.strategy_report import (
    describe_cost,
    describe_run,
    describe_strategies,
    own_name,
    strategy_tables,
    unused_options,
)
from speed_diffusers.reports.training_cost import GPUS, gpu_named
from speed_diffusers.schedulers import speed_scheduler
from speed_diffusers.timesteps import DENSITIES
from speed_diffusers.train_scripts.plan import SCRIPT_DIR, PlanConfig, main, training_cost
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.weightings import WEIGHTINGS

SCHEDULERS = {
    "linear": lambda: speed_scheduler(DDPMScheduler()),
    "cosine": lambda: speed_scheduler(DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
    "flow": lambda: speed_scheduler(FlowMatchEulerDiscreteScheduler()),
}
XL = ["config=imagenet_256/dit_xl2"]


def plan(options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the script prints."""
    main([*options, f"output={folder / 'plan.png'}"])
    return capsys.readouterr().out


def row(printed: str, name: str) -> list[str]:
    """The words behind the first line that begins with `name`."""
    (line, *_) = [line for line in printed.splitlines() if line.strip().startswith(name)]
    return line.strip().removeprefix(name).split()


def test_shares_of_draws_and_weights_are_those_of_the_formula(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = plan([*XL, "strategies=paper,uniform,asymmetric+none"], tmp_path, capsys)
    # k / (T + tau (k - 1)) a step before tau = 700, a k-th of it from there on; areas meet at 219 and 700.
    likely = 5 / (1000 + 700 * 4)
    by_hand = (219 * likely, 481 * likely, 300 * likely / 5)
    assert by_hand == pytest.approx((0.288, 0.633, 0.079), abs=5e-4)
    assert [float(word.rstrip("%")) / 100 for word in row(printed, "paper")[:3]] == pytest.approx(by_hand, abs=6e-4)
    assert row(printed, "uniform") == ["21.9%", "48.1%", "30.0%", "1"]
    assert "acceleration 0-218, deceleration 219-699, convergence 700-999" in printed
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    change = torch.gradient(1 - torch.cumprod(1 - betas, 0))[0]
    weights = 0.4 + 0.2 * (change - change.min()) / (change.max() - change.min())
    mean = float(likely * (weights[:700].sum() + weights[700:].sum() / 5))
    assert float(row(printed, "paper")[3]) == pytest.approx(mean, rel=1e-3)
    # At the timesteps 0, 100, 219, 459, 699, 700, 850 and 999 that the table shows.
    steps = [int(word) for word in row(printed, "timestep")]
    assert steps == [0, 100, 219, 459, 699, 700, 850, 999]
    density = [1000 * likely if step < 700 else 200 * likely for step in steps]
    product = [at * float(weights[step]) for at, step in zip(density, steps, strict=True)]
    assert [float(word) for word in row(printed, "density/uniform")] == pytest.approx(density, abs=6e-4)
    assert [float(word) for word in row(printed, "weight")] == pytest.approx(weights[steps].tolist(), abs=6e-4)
    assert [float(word) for word in row(printed, "density x weight")] == pytest.approx(product, abs=6e-4)
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.format == "PNG" and picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_costs_are_those_of_the_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["gpu=h100", "num_gpus=8", "mfu=0.4", "max_train_steps=400000"]
    printed = plan([*XL, *options], tmp_path, capsys)
    # DiT-XL/2 takes 118.6 Gmac forward an image (its paper's table 4), so 711.7 GFLOP with the backward pass.
    hours = 711.7e9 * 32 * 8 * 400_000 / (989e12 * 0.4) / 3600
    assert float(row(printed, "GPU hours")[0]) == pytest.approx(hours, rel=1e-3)
    assert float(row(printed, "hours on the clock")[0]) == pytest.approx(hours / 8, rel=1e-3)
    parameters = float(row(printed, "parameters")[0])
    assert parameters == pytest.approx(675, rel=0.01)  # what DiT's paper gives for XL/2
    assert float(row(printed, "state, per device")[0]) == pytest.approx(parameters * 20e-3, abs=6e-3)
    # Two moments of 4x32x32 numbers of 2 bytes, for both mirror images.
    assert float(row(printed, "latent cache")[0]) == pytest.approx(1_281_167 * 2 * 2 * 4 * 32 * 32 * 2 / 1e9, abs=6e-3)
    assert "stimates" in printed and "ASSUMPTION" in printed and "Left out" in printed


def test_epochs_need_to_know_of_how_many_images() -> None:
    def steps(*options: str) -> int:
        return training_cost(load_config(PlanConfig, [*XL, *options], SCRIPT_DIR)).max_train_steps

    assert steps("num_train_epochs=2", "num_images=1000", "train_batch_size=30") == 67
    assert steps("num_train_epochs=80", "num_gpus=8") == math.ceil(80 * 1_281_167 / 256)
    for elsewhere in (["train_data_dir=somewhere", "dataset_name=None"], ["dataset_split=validation"]):
        with pytest.raises(InputError, match="num_train_epochs=2: of how many images"):
            steps("num_train_epochs=2", *elsewhere)


def test_the_costs_of_a_pretrained_model_are_its_own() -> None:
    options = ["pretrained_model_name_or_path=embedded", "config=None", "dataset_name=embedded", "ema_tracks=0.05"]
    cost = training_cost(load_config(PlanConfig, options, SCRIPT_DIR))
    core = TrainableDiT(load_transformer("embedded"))
    assert cost.num_parameters == sum(each.numel() for each in core.parameters() if each.requires_grad)
    assert cost.ema_tracks == 1 and cost.num_images == 9000
    with pytest.raises(InputError, match="=owner/name: is not on this disk, and a plan asks no Hub"):
        training_cost(load_config(PlanConfig, ["pretrained_model_name_or_path=owner/name"], SCRIPT_DIR))


def test_gradient_checkpointing_and_unknown_data_show_in_the_costs() -> None:
    options = [*XL, "train_data_dir=somewhere", "dataset_name=None", "gradient_checkpointing=true"]
    again = training_cost(load_config(PlanConfig, options, SCRIPT_DIR))
    once = training_cost(load_config(PlanConfig, options[:-1], SCRIPT_DIR))
    assert again.run_flops == pytest.approx(once.run_flops * 8 / 6)
    assert again.cache_bytes is None and "give num_images" in describe_cost(again)
    assert "GPU hours" not in describe_cost(again)
    known = training_cost(load_config(PlanConfig, [*options, "num_images=1000"], SCRIPT_DIR))
    assert known.cache_bytes == 1000 * 32768


def test_own_images_are_listed_and_counted(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    for name in ("train", "test"):
        shutil.copytree(image_folder, folder / name)
    options = [f"train_data_dir={folder}", "dataset_name=None", "pretrained_vae_model_name_or_path=embedded"]
    printed = plan([*XL, *options, "max_train_samples=20"], tmp_path, capsys)
    assert "20 images, 2 classes (0 'cat' to 1 'dog')" in printed and "split 'test': 26 images" in printed
    assert "latent cache" in printed and "20 images x 2 moments" in printed
    with pytest.raises(InputError, match="Unknown split 'vat'"):
        plan([*XL, *options, "dataset_split=vat"], tmp_path, capsys)


def test_the_default_plans_the_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = plan([], tmp_path, capsys)
    assert "9,000 images x 2 moments of 4x8x8" in printed and "of Muon's 3 Newton-Schulz steps" in printed
    assert row(printed, "fast") and row(printed, "uniform")


def test_a_density_over_log_snr_is_the_same_on_every_schedule() -> None:
    for schedule in ("linear", "cosine"):
        (tables,) = strategy_tables(SCHEDULERS[schedule](), ["gaussian:mean=-1,std=1+none"]).values()
        density = density_over_log_snr(tables)
        log_snr = tables.process.finite_log_snr
        bell = torch.exp(-0.5 * (log_snr + 1).square()) / (2 * torch.pi) ** 0.5
        torch.testing.assert_close(density, bell, rtol=0, atol=2e-3)
        assert log_snr_moments(tables) == pytest.approx((-1, 1), abs=0.01)


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_every_registered_strategy_is_planned_or_refused_in_a_line(schedule: str, tmp_path: Path) -> None:
    scheduler = SCHEDULERS[schedule]()
    names = [*PRESETS, *(f"{name}+none" for name in DENSITIES), *(f"uniform+{name}" for name in WEIGHTINGS)]
    planned, refused = {}, {}
    for name in names:
        try:
            planned |= strategy_tables(scheduler, [name])
        except InputError as error:
            refused[name] = str(error)
            assert str(error).startswith(f"strategy '{name}': ") and "\n" not in str(error)
    # The authors' pairs need a pivot, which a rectified flow does not have.
    assert set(refused) == ({"official", "official_k2", "seed", "t_sample+none"} if schedule == "flow" else set())
    for tables in planned.values():
        assert sum(area_shares(tables, scheduler.speed_areas).values()) == pytest.approx(1, abs=1e-9)
        assert float(relative_density(tables).mean()) == pytest.approx(1, abs=1e-9)
        assert 0 < mean_weight(tables) < float("inf")
    save_strategy_plot(planned, scheduler.speed_areas, schedule, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 20_000


def test_a_strategy_named_by_its_parts_takes_the_schedulers_numbers() -> None:
    scheduler = SpeeDDDPMScheduler(speed_k=3.0, speed_tau=500)
    tables = strategy_tables(scheduler, ["asymmetric+none", "paper", "asymmetric+p2:k=1e+1,gamma=2+stratified"])
    assert float(relative_density(tables["asymmetric+none"])[0]) == pytest.approx(3 * 1000 / (1000 + 500 * 2))
    assert tables["paper"].settings.k == 5.0 and tables["paper"].settings.tau == 700
    last = tables["asymmetric+p2:k=1e+1,gamma=2+stratified"]
    snr = last.process.snr
    torch.testing.assert_close(last.weights, (10 + snr).pow(-2))
    assert last.draw == "stratified"
    assert own_name(scheduler) == "asymmetric+change_aware" and own_name(SpeeDDDPMScheduler()) == "paper"
    assert own_name(SpeeDDDPMScheduler(**PRESETS["official"])) == "official"
    assert own_name(SpeeDDDPMScheduler(**PRESETS["uniform"], speed_k=2.0)) == "uniform"
    pairs = SpeeDDDPMScheduler(**{**PRESETS["uniform"], "speed_draw": "paired"})
    assert own_name(pairs) == "uniform+none+paired"
    assert [tables.draw for tables in strategy_tables(pairs, []).values()] == ["paired", "independent"]


def test_densities_that_learn_are_marked() -> None:
    scheduler = SpeeDDDPMScheduler()
    names = ["loss_second_moment+none", "paper", "logit_normal+none"]
    printed = describe_strategies(strategy_tables(scheduler, names), scheduler.speed_areas)
    assert [line.split()[0] for line in printed.splitlines() if "(loss-aware; shown" in line] == names[:1]


def test_a_run_is_described_in_one_call() -> None:
    cost = training_cost(load_config(PlanConfig, XL, SCRIPT_DIR))
    text = describe_run(SpeeDDDPMScheduler(**PRESETS["official"]), cost, gpu="A100", num_gpus=2)
    assert row(text, "official")[2] == "3.9%" and row(text, "uniform")[2] == "30.0%"
    assert float(row(text, "GPU hours")[0]) == pytest.approx(2 * float(row(text, "hours on the clock")[0]), rel=1e-3)
    # A strategy that is uniform already stands there once.
    assert describe_run(SpeeDDDPMScheduler(**PRESETS["uniform"]), cost).count("density x weight") == 1


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({}, []),
        ({"k": 10, "tau": 700, "lambda_": 0.7}, []),
        ({"weighting": "none", "k": 10, "lambda_": 0.7}, ["speed_lambda=0.7"]),
        ({"sampling": "gaussian", "weighting": "none", "k": 10, "r": 99.0}, ["speed_k=10", "speed_r=99.0"]),
        ({"tau": 0.5, "r": 99.0}, ["speed_r=99.0"]),
        ({"sampling": "two_phase:until=0.4,first=asymmetric", "k": 10}, []),
        ({"anneal_start": 0.2, "anneal_end": 0.6}, []),
        ({"k": 1.0, "anneal_start": 0.2, "anneal_end": 0.6}, ["speed_anneal_start=0.2", "speed_anneal_end=0.6"]),
        ({"sampling": "uniform", "normalize_weights": True}, []),
        ({"sampling": "uniform", "weighting": "uncertainty", "normalize_weights": True}, []),
        ({"sampling": "uniform", "weighting": "none", "normalize_weights": True}, ["speed_normalize_weights=True"]),
    ],
)
def test_options_that_change_nothing_are_named(options: dict[str, object], unused: list[str]) -> None:
    process = ForwardProcess.from_scheduler(DDPMScheduler())
    assert unused_options(SpeeDStrategy(process, SpeeDOptions(**options))) == unused  # type: ignore[arg-type]


def test_progress_shows_what_changes_in_training() -> None:
    scheduler = SpeeDDDPMScheduler(speed_anneal_start=0.0)
    late, early = (strategy_tables(scheduler, [], progress)["asymmetric+change_aware"] for progress in (1.0, 0.0))
    assert early.settings.k == 5.0 and late.settings.k == 1.0


@pytest.mark.parametrize("place", ["scheduler", "pipeline", "run", "class"])
def test_a_scheduler_is_found_wherever_it_is(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = SpeeDDDPMScheduler(beta_schedule="squaredcos_cap_v2")
    name = str(tmp_path / "it")
    if place == "run":
        (tmp_path / "it").mkdir()
        save_config(TrainConfig(beta_schedule="squaredcos_cap_v2"), tmp_path / "it" / "config.yaml")
    elif place == "class":
        name = "FlowMatchEulerDiscreteScheduler"
    else:
        scheduler.save_pretrained(tmp_path / "it" / ("" if place == "scheduler" else "scheduler"))
    printed = plan([f"scheduler={name}", 'strategies=["logit_normal:mean=0+none","paper"]'], tmp_path, capsys)
    tau = speed_scheduler(
        FlowMatchEulerDiscreteScheduler() if place == "class" else scheduler
    ).speed_areas.deceleration
    assert f"deceleration {tau.start}-{tau.stop - 1}" in printed
    assert "GPU hours" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["strategies=papr"], "Did you mean 'paper'?"),
        (["strategies=logit_norml+none"], "Did you mean 'logit_normal'?"),
        (["strategies=uniform+min_snrr"], "Did you mean 'min_snr'?"),
        (["strategies=uniform+min_snr:gama=1"], "Did you mean 'gamma'?"),
        (["strategies=uniform+min_snr:gamma=-1"], "[1e-12, inf)"),
        (["strategies=uniform+none+pared"], "Did you mean 'paired'?"),
        (["strategies=uniform+none+paired+more"], "must be a preset, density+weighting"),
        (["strategies=logit_normal"], "logit_normal+none"),
        (["strategies=min_snr"], "uniform+min_snr"),
        (["strategies=paper,paper"], "given twice"),
        (["gpu=H10"], "Did you mean 'H100'?"),
        (["mfu=0"], "(0, 1]"),
        (["mfu=1.5"], "(0, 1]"),
        (["num_gpus=0"], "[1, 10^6]"),
        (["num_images=0"], "[1, 10^12]"),
        (["resolution=30"], "multiple of the autoencoder's factor, 4"),
        (["progress=2"], "[0, 1]"),
        (["num_train_timesteps=1"], "[2, 10^6]"),
        (["scheduler=FlowMatchEulerDiscreteScheduler", "strategies=official"], "strategy 'official': "),
        (["scheduler=DDPMSchedular"], "Did you mean 'DDPMScheduler'?"),
        (["scheduler=EulerDiscreteScheduler"], "cannot be used for training"),
        (["scheduler=DDPMScheduler", "--beta-schedule", "linear"], "beta_schedule has no effect"),
        (["scheduler=."], "no scheduler_config.json"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        main(options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("output", ["plan.jpg", "file/plan.png"])
def test_an_output_that_cannot_be_is_refused(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output="):
        main([f"output={tmp_path / output}"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_scheduler_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]"):
        (tmp_path / "scheduler_config.json").write_text(text)
        with pytest.raises(InputError, match=r"scheduler_config\.json"):
            main([f"scheduler={tmp_path}", "output=None"])


def test_the_script_exits_with_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT_DIR / "plan.py"), "gpu=A10O"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("error: Unknown gpu 'A10O'. Did you mean 'A10")
    assert list(tmp_path.iterdir()) == []


def test_gpus_are_named_in_any_case() -> None:
    assert gpu_named("a100-40gb") is GPUS["A100-40GB"] and gpu_named("rtx4090") is GPUS["RTX4090"]


def test_a_steep_weight_leaves_the_others_on_the_axis() -> None:
    tables = strategy_tables(SCHEDULERS["flow"](), ["uniform+sigma_sqrt", "paper", "uniform"])
    scale, low, high = axis_range(torch.cat([each.weights for each in tables.values()]))
    assert scale == "log" and low < 0.4 and high > 1e6
    assert axis_range(tables["paper"].weights) == ("linear", 0.0, pytest.approx(1.12 * 0.6))
    # A few steps that hardly count need no logarithm.
    assert axis_range(tables["paper"].process.noise_level)[0] == "linear"
