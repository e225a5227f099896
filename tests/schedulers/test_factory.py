"""SpeeD on any scheduler: classes made for them, conversions between all, what is saved loads, and refusals."""

import copy
import inspect
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    SchedulerMixin,
)

from speed_diffusers import (
    InputError,
    SpeeDDDIMScheduler,
    SpeeDDDPMScheduler,
    SpeeDFlowMatchEulerDiscreteScheduler,
    SpeeDSchedulerMixin,
    speed_scheduler,
)
from speed_diffusers.schedulers import factory, speed_scheduler_class
from speed_diffusers.settings import SPEED_DEFAULTS

ROOT = Path(__file__).resolve().parents[2]

VARIANCE_PRESERVING = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
)
FLOWS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler",
)
USABLE = VARIANCE_PRESERVING + FLOWS

# Other than any default, so that a key which gets lost shows.
SCHEDULE = {"num_train_timesteps": 500, "beta_start": 0.0009, "beta_end": 0.013, "beta_schedule": "scaled_linear"}
FLOW_SCHEDULE = {"num_train_timesteps": 500, "shift": 2.5}
SPEED = {
    "speed_sampling": "asymmetric:edge=0.5",
    "speed_weighting": "min_snr:gamma=3",
    "speed_k": 3.0,
    "speed_tau": 321,
    "speed_r": 90.0,
    "speed_lambda": 0.8,
    "speed_draw": "stratified",
    "speed_normalize_weights": True,
    "speed_anneal_start": 0.25,
    "speed_anneal_end": 0.75,
}


def plain(name: str) -> SchedulerMixin:
    """A scheduler of diffusers with as much of the schedule above as it takes."""
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    values = FLOW_SCHEDULE if name in FLOWS else SCHEDULE
    if name == "UnCLIPScheduler":  # knows the cosine schedule only
        values = {"num_train_timesteps": 500}
    return cls(**{key: value for key, value in values.items() if key in known})


def every_scheduler() -> list[str]:
    """Names of all schedulers of diffusers that can be made without arguments here."""
    names = []
    for name in dir(diffusers):
        if name.endswith("Scheduler") and isinstance(getattr(diffusers, name), type):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    made = getattr(diffusers, name)()
            except (TypeError, ImportError):  # needs arguments, or a package that is not installed
                continue
            if isinstance(made, SchedulerMixin) and hasattr(made, "config"):
                names.append(name)
    return names


EVERY = every_scheduler()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_every_scheduler_of_diffusers_is_usable_or_refused_with_the_way_out(name: str) -> None:
    host = getattr(diffusers, name)()
    if name in USABLE:
        scheduler = speed_scheduler(host)
        assert isinstance(scheduler, type(host)) and isinstance(scheduler, SpeeDSchedulerMixin)
        return
    with pytest.raises(InputError) as error:
        speed_scheduler(host)
    message = str(error.value)
    assert message.startswith(f"{name} cannot be used for training: ") and "\n" not in message
    assert "Train with SpeeD" in message
    if " and sample with " in message:
        # The way out is code that works, and noises by the same schedule.
        advice = message.split("Train with ")[1].split(" and sample with ")[0]
        usable = eval(advice)
        if hasattr(host, "betas"):
            torch.testing.assert_close(usable.betas, host.betas.float())
            assert usable.config.prediction_type == host.config.get("prediction_type", "epsilon")


def test_the_usable_schedulers_are_all_there() -> None:
    assert set(USABLE) <= set(EVERY)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in SASolver
@pytest.mark.parametrize("name", USABLE)
def test_noise_of_training_is_that_of_the_schedule_in_any_state(name: str) -> None:
    scheduler = speed_scheduler(plain(name), **SPEED)
    clean, noise = (torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    timesteps = scheduler.sample_timesteps(64, generator=torch.Generator().manual_seed(2), progress=0.5)
    process = scheduler.speed_tables.process
    for set_timesteps in (False, True):
        if set_timesteps:
            scheduler.set_timesteps(10)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        if name in FLOWS:
            sigma = (timesteps / 500)[:, None, None, None]
            expected, target = (1 - sigma) * clean + sigma * noise, noise - clean
        else:
            level = process.noise_level[timesteps][:, None, None, None].float()
            expected = (1 - level).sqrt() * clean + level.sqrt() * noise
            target = (1 - level).sqrt() * noise - level.sqrt() * clean
        torch.testing.assert_close(noisy, expected, atol=2e-4, rtol=0)
        torch.testing.assert_close(scheduler.get_velocity(clean, noise, timesteps), target, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", USABLE)
def test_made_class_spells_out_every_parameter(name: str) -> None:
    host = getattr(diffusers, name)
    cls = speed_scheduler_class(host)
    assert cls is speed_scheduler_class(name) is speed_scheduler_class(f"SpeeD{name}") is speed_scheduler_class(cls)
    assert cls.__name__ == f"SpeeD{name}"
    mine = inspect.signature(cls.__init__).parameters
    theirs = inspect.signature(host.__init__).parameters
    assert {n: p.default for n, p in mine.items() if not n.startswith("speed_")} == {
        n: p.default for n, p in theirs.items()
    }
    assert {n: p.default for n, p in mine.items() if n.startswith("speed_")} == SPEED_DEFAULTS
    assert list(mine)[: len(theirs)] == list(theirs)


def test_explicit_classes_are_taken_where_there_are_any() -> None:
    for name, cls in (
        ("DDPMScheduler", SpeeDDDPMScheduler),
        ("DDIMScheduler", SpeeDDDIMScheduler),
        ("FlowMatchEulerDiscreteScheduler", SpeeDFlowMatchEulerDiscreteScheduler),
    ):
        assert type(speed_scheduler(plain(name))) is cls


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in SASolver
@pytest.mark.parametrize("name", USABLE)
def test_factory_keeps_the_schedule_and_adds_the_settings(name: str) -> None:
    host = plain(name)
    scheduler = speed_scheduler(host, **SPEED)
    assert {key: scheduler.config[key] for key in SPEED} == SPEED
    for key, value in host.config.items():
        assert key.startswith("_") or scheduler.config[key] == value, key
    if name in FLOWS:
        assert torch.equal(
            scheduler.training_timesteps, SpeeDFlowMatchEulerDiscreteScheduler(**FLOW_SCHEDULE).training_timesteps
        )
    else:
        assert torch.equal(scheduler.betas, host.betas)
    # From a scheduler with SpeeD only what is given changes.
    again = speed_scheduler(scheduler, speed_k=7.0)
    assert type(again) is type(scheduler) and again.config.speed_k == 7.0
    assert {key: again.config[key] for key in SPEED if key != "speed_k"} == {
        key: value for key, value in SPEED.items() if key != "speed_k"
    }
    assert type(scheduler.to_inference()) is type(host)
    assert [key for key in scheduler.to_inference().config if key.startswith("speed_")] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in SASolver
@pytest.mark.parametrize("name", USABLE)
def test_made_schedulers_save_load_copy_and_pickle(name: str, tmp_path: Path) -> None:
    scheduler = speed_scheduler(plain(name), **SPEED)
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == f"SpeeD{name}"
    twins = [
        type(scheduler).from_pretrained(tmp_path),
        speed_scheduler(saved),
        copy.deepcopy(scheduler),
    ]
    if name != "SASolverScheduler":  # holds a lambda, so plain ones cannot be pickled either
        twins.append(pickle.loads(pickle.dumps(scheduler)))
    expected = scheduler.sample_timesteps(64, generator=torch.Generator().manual_seed(1), progress=0.6)
    for twin in twins:
        assert type(twin) is type(scheduler)
        drawn = twin.sample_timesteps(64, generator=torch.Generator().manual_seed(1), progress=0.6)
        assert torch.equal(drawn, expected)
        assert torch.equal(twin.loss_weights(drawn, progress=0.6), scheduler.loss_weights(drawn, progress=0.6))
        twin.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "scheduler_config.json").read_text()) == saved


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", VARIANCE_PRESERVING)
def test_conversion_to_every_compatible_scheduler_and_back(source: str) -> None:
    scheduler = speed_scheduler(plain(source), **SPEED)
    kept = {**SPEED, **{key: scheduler.config[key] for key in SCHEDULE if key in scheduler.config}}
    compatible = [cls for cls in scheduler.compatibles if not hasattr(cls, "_backends")]
    for target in {*compatible, *(getattr(diffusers, name) for name in VARIANCE_PRESERVING)}:
        if target.__name__ == "UnCLIPScheduler" != source:
            continue  # refuses every schedule but its own
        try:
            there = target.from_config(scheduler.config)
        except ImportError:
            continue  # a package of another is missing
        if "beta_start" in there.config and "beta_start" in scheduler.config and hasattr(there, "betas"):
            torch.testing.assert_close(there.betas.float(), scheduler.betas.float(), msg=f"to {target.__name__}")
        back = type(scheduler).from_config(there.config)
        lost = {"beta_start", "beta_end", "beta_schedule"} if "beta_start" not in there.config else set()
        expected = {key: value for key, value in kept.items() if key not in lost}
        assert {key: back.config[key] for key in expected} == expected, target.__name__


@pytest.mark.parametrize("source", FLOWS)
def test_conversion_between_flows(source: str) -> None:
    scheduler = speed_scheduler(plain(source), **SPEED)
    for name in FLOWS:
        there = getattr(diffusers, name).from_config(scheduler.config)
        assert there.config.shift == 2.5
        back = type(scheduler).from_config(there.config)
        assert {key: back.config[key] for key in {**SPEED, **FLOW_SCHEDULE}} == {**SPEED, **FLOW_SCHEDULE}
        assert torch.equal(back.training_timesteps, scheduler.training_timesteps)


def tiny_pipeline(scheduler: SchedulerMixin) -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1, sample_size=2
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    return DiTPipeline(transformer, vae, scheduler)


IN_ANOTHER_PROCESS = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
import diffusers, torch
from diffusers import DiTPipeline

folder = Path(sys.argv[1])
found = {}
# Without our package: the configurations open in diffusers' own classes, the pipelines do not.
for case in sorted(folder.glob("config-*")):
    name = case.name.removeprefix("config-")
    loaded = getattr(diffusers, name).from_pretrained(case)
    found[case.name] = [type(loaded).__name__, loaded.config.get("speed_k"), "speed_diffusers" in sys.modules]
try:
    DiTPipeline.from_pretrained(folder / "pipeline")
except ValueError as error:
    found["pipeline without us"] = type(error).__name__

import speed_diffusers
pipeline = DiTPipeline.from_pretrained(folder / "pipeline")
found["pipeline"] = [type(pipeline.scheduler).__name__, pipeline.scheduler.config.speed_k]
found["plain pipeline"] = type(DiTPipeline.from_pretrained(folder / "plain").scheduler).__name__
for case in sorted(folder.glob("config-*")):
    name = case.name.removeprefix("config-")
    loaded = speed_diffusers.speed_scheduler(json.loads((case / "scheduler_config.json").read_text()))
    by_class = speed_diffusers.schedulers.speed_scheduler_class(name).from_pretrained(case)
    same = loaded.config == by_class.config
    found[f"speed {case.name}"] = [type(loaded).__name__, loaded.config.speed_k, same]
import pickle
found["pickle"] = type(pickle.loads((folder / "scheduler.pickle").read_bytes())).__name__
print(json.dumps(found))
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in SASolver
def test_what_is_saved_loads_in_a_process_with_and_without_us(tmp_path: Path) -> None:
    """One process for all cases: importing diffusers is slow."""
    for name in USABLE:
        speed_scheduler(plain(name), **SPEED).save_pretrained(tmp_path / f"config-{name}")
    scheduler = speed_scheduler(PNDMScheduler(**SCHEDULE, skip_prk_steps=True), speed_k=3.0)
    tiny_pipeline(scheduler).save_pretrained(tmp_path / "pipeline")
    tiny_pipeline(scheduler.to_inference()).save_pretrained(tmp_path / "plain")
    (tmp_path / "scheduler.pickle").write_bytes(pickle.dumps(scheduler))
    library = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["scheduler"]
    assert library == ["speed_diffusers.schedulers.factory", "SpeeDPNDMScheduler"]

    run = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for name in USABLE:
        assert found[f"config-{name}"] == [name, 3.0, False]
        assert found[f"speed config-{name}"] == [f"SpeeD{name}", 3.0, True]
    assert found["pipeline without us"] == "ValueError"
    assert found["pipeline"] == ["SpeeDPNDMScheduler", 3.0]
    assert found["plain pipeline"] == "PNDMScheduler"
    assert found["pickle"] == "SpeeDPNDMScheduler"


def test_pipelines_sample_alike_with_a_made_scheduler() -> None:
    images = []
    for scheduler in (PNDMScheduler(skip_prk_steps=True), speed_scheduler(PNDMScheduler(skip_prk_steps=True))):
        pipeline = tiny_pipeline(scheduler)
        pipeline.set_progress_bar_config(disable=True)
        images.append(
            pipeline(
                class_labels=[1],
                guidance_scale=1.0,
                num_inference_steps=6,
                output_type="np",
                generator=torch.Generator().manual_seed(0),
            ).images
        )
    assert (images[0] == images[1]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: speed_scheduler(DDPMScheduler(), speed_kk=3),
            "Unknown SpeeD option 'speed_kk'. Did you mean 'speed_k'",
        ),
        (lambda: speed_scheduler(DDPMScheduler(), k=3), "Unknown SpeeD option 'k'"),
        (lambda: speed_scheduler(PNDMScheduler(), speed_k=0.5), r"speed_k=0.5: must lie in \[1, 1e6\]"),
        (lambda: speed_scheduler(PNDMScheduler(), speed_weighting="min_snr:gama=1"), "Unknown parameter of .*'gamma'"),
        (lambda: speed_scheduler(DDPMScheduler().config), "The config of the scheduler names no '_class_name'"),
        (
            lambda: speed_scheduler({"_class_name": "PNDMSheduler"}),
            "Unknown scheduler class 'PNDMSheduler'. Did you mean 'PNDMScheduler'",
        ),
        (lambda: speed_scheduler("ddpm"), "str is neither a scheduler of diffusers nor its config"),
        (lambda: speed_scheduler_class("UNet2DModel"), "Unknown scheduler class 'UNet2DModel'"),
        (lambda: speed_scheduler_class(dict), "<class 'dict'> is not a scheduler class"),
        (
            lambda: speed_scheduler(
                DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
            ),
            r"DPMSolverMultistepScheduler cannot .*SpeeDFlowMatchEulerDiscreteScheduler\(num_train_timesteps=1000, "
            r"shift=3.0\) and sample with DPMSolver",
        ),
    ],
)
def test_bad_input_is_one_line(call: object, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as error:
        call()  # type: ignore[operator]
    assert "\n" not in str(error.value)


def test_made_classes_are_names_of_their_module() -> None:
    assert factory.SpeeDPNDMScheduler is speed_scheduler_class(PNDMScheduler)
    for name in ("SpeeDNoSuchScheduler", "SpeeDPNDM", "nothing"):
        with pytest.raises(AttributeError):
            getattr(factory, name)


def test_a_scheduler_of_somebody_else_is_tried_like_the_others() -> None:
    class Louder(DDPMScheduler):
        """Adds twice the noise."""

        def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor):
            return super().add_noise(original_samples, 2 * noise, timesteps)

    class Same(DDPMScheduler):
        """Adds the same noise."""

    with pytest.raises(InputError, match="^Louder cannot be used for training: its add_noise is not sqrt"):
        speed_scheduler(Louder())
    scheduler = speed_scheduler(Same(num_train_timesteps=500), speed_k=2.0)
    assert isinstance(scheduler, Same) and scheduler.config.speed_k == 2.0 and len(scheduler.betas) == 500
