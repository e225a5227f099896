"""Which trainings are compared: the settings, the arms, and in which order their runs are made."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from speed_diffusers.presets import PRESETS
from training_runs import SPEED_CONFIG

Options = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is trained on, and how it is scored.

    "{data}" in a text stands for the folder of the setting's data.

    Attributes:
        options: Options of the training script that all arms share.
        num_images: Generated images per score.
        num_inference_steps: DDIM steps, without guidance.
        held_out: Options of `open_images` for the images of the validation loss.
        extractor: What the images are seen with.
        reference: What they are held against.
        made_by: What makes the data: for each file that it leaves, a script in train_scripts and its options;
            "{package}" stands for what the user has downloaded.
        package: How that is downloaded.
        score: The distance that its tables and its picture show, a key of `quality_report.DISTANCES`.
        arms: The arms that are run, with their seeds; None: all, each with its own.
    """

    options: Options
    num_images: int = 1000
    num_inference_steps: int = 25
    held_out: Options = field(default_factory=lambda: {"dataset_name": "embedded", "split": "test"})
    extractor: str = "fashion_mnist"
    reference: str = "embedded"
    made_by: dict[str, list[str]] = field(default_factory=dict)
    package: str | None = None
    score: str = "frechet_distance"
    arms: Mapping[str, tuple[int, ...]] | None = None


FIVE = (0, 1, 2, 3, 4)
TWO = (0, 1)

# Constant rate, no warm-up and an EMA of fixed length, so that every step of a run is the end of a shorter one.
SHARED: Options = {
    "config": SPEED_CONFIG,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "ema_decay": 0.995,
    "num_score_images": None,
    "report_to": [],
    "checkpointing_steps": 250,
    "num_validation_images": 4,
    "num_inference_steps": 25,
    "logging_steps": 50,
}

SETTINGS = {
    "quickstart": Setting(SHARED),
    # The same, with all training images. The embedded reference is that of all 10,000 test images.
    "fashion_mnist_60k": Setting(
        {**SHARED, "dataset_name": None, "train_data_dir": "{data}/train.parquet"},
        made_by={
            "train.parquet": [
                "assets/make_embedded_dataset.py",
                "idx_dir={package}",
                "split=train",
                "per_class=0",
                "output={data}/train.parquet",
            ],
        },
        package="apt-get install dataset-fashion-mnist, then package=/usr/share/datasets/fashion-mnist",
        arms=dict.fromkeys(("uniform_epsilon", "uniform_epsilon_tuned", "fast"), TWO),
    ),
    # A colour set of another kind, seen with features that somebody else trained: nothing is tuned on it.
    "emoji": Setting(
        {
            **SHARED,
            "dataset_name": None,
            "train_data_dir": "{data}/train.parquet",
            "pretrained_vae_model_name_or_path": "{data}/vae",
        },
        held_out={"train_data_dir": "{data}/test.parquet", "split": "test"},
        extractor="efflite0",
        reference="{data}/reference/reference_features.safetensors",
        made_by={
            "test.parquet": ["assets/make_emoji_dataset.py", "package_dir={package}", "output_dir={data}"],
            "vae/config.json": [
                "assets/train_vae.py",
                "train_data_dir={data}/train.parquet",
                "validation_data_dir={data}/test.parquet",
                "output_dir={data}/vae",
                # A third of the default's images, which is 48 epochs of so few, in half batches: a quarter of an hour
                # on one thread. Held-out images come back at 23.3 dB.
                "max_train_steps=2400",
                "train_batch_size=32",
            ],
            "reference/reference_features.safetensors": [
                "make_reference_statistics.py",
                "train_data_dir={data}/train.parquet",
                "validation_data_dir={data}/test.parquet",
                "vae={data}/vae",
                "feature_extractor=efflite0",
                "output_dir={data}/reference",
            ],
        },
        package="npm install emoji-datasource-google@16.0.0, then package=node_modules/emoji-datasource-google",
        # Of 268 held-out images in 1,280 features the Fréchet distance is biased by more than what is measured.
        score="kernel_distance",
        # What the claims stand on, and each factor of the recipe alone and left out.
        arms={
            **dict.fromkeys(("uniform_epsilon", "uniform_epsilon_tuned", "paper_epsilon", "fast"), FIVE),
            "uniform_epsilon_rate_0.002": FIVE,  # where the baseline ended closest in the first setting
            **dict.fromkeys(("uniform_v", "uniform_epsilon_unit", "uniform_v_unit", "paper_v"), TWO),
            **dict.fromkeys(("paper_v_unit", "fast_density_v_unit", "uniform_v_fast", "fast_adamw"), TWO),
            "fast_ema_0.99": TWO,
            **dict.fromkeys(("uniform_epsilon_cosine_1000", "uniform_epsilon_tuned_cosine_1000"), (0,)),
            **dict.fromkeys(("uniform_epsilon_cosine_3000", "uniform_epsilon_tuned_cosine_3000"), (0,)),
            **dict.fromkeys(("fast_cosine_500", "fast_cosine_600", "fast_cosine_1000"), (0,)),
        },
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        options: Options of the training script that make it, beside the setting's.
        steps: Optimizer steps of its runs.
        measured_at: Steps at which it is scored.
        seeds: Its seeds.
        curve: Of runs that are measured at their end alone: the arm under which runs of other lengths share a curve.
    """

    options: Options
    steps: int = 3000
    measured_at: tuple[int, ...] = (500, 750, 1000, 1500, 2250, 3000)
    seeds: tuple[int, ...] = (0, 1)
    curve: str | None = None


PRESET_ARMS = ("uniform", "paper", "official", "seed", "sampling_only", "weighting_only", "fast")
DENSITIES: dict[str, Options] = {
    **{name: {key: value for key, value in PRESETS[name].items() if value is not None} for name in PRESET_ARMS},
    **{name: {"speed_sampling": "uniform", "speed_weighting": name} for name in ("min_snr", "soft_min_snr", "p2")},
    **{
        name: {"speed_sampling": name, "speed_weighting": "none"}
        for name in ("logit_normal", "laplace", "infonoise", "two_phase", "t_sample")
    },
    "gaussian": {"speed_sampling": "gaussian:mean=-1", "speed_weighting": "none"},
}
"""What is drawn and weighed: presets, and rivals by their names in the registries."""

TARGETS = {"epsilon": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}

# What is far faster than the baseline is where it is after its whole run long before that.
SHORT: dict[str, Any] = {"steps": 1500, "measured_at": (250, 500, 750, 1000, 1500)}
MIDDLE: dict[str, Any] = {"steps": 2000, "measured_at": (250, 500, 750, 1000, 1500, 2000)}
# A rate that falls to zero, and an average fitted to the length of the run, as in the quickstart: every length is a
# run of its own.
COSINE: Options = {"lr_scheduler": "cosine", "lr_warmup_steps": 50, "ema_decay": None}


def options(density: str, target: str, *, init: str = "dit", muon: float | None = None, rate: float = 1e-3) -> Options:
    """The options of an arm from its factors.

    Args:
        density: Name in `DENSITIES`.
        target: Name in `TARGETS`.
        init: Initialisation of the embedders.
        muon: Rate of Muon; None: AdamW for all.
        rate: Rate of AdamW.
    """
    chosen: Options = {"prediction_type": TARGETS[target], **DENSITIES[density]}
    chosen |= {"conditioning_init": init, "learning_rate": rate}
    return chosen | ({} if muon is None else {"optimizer": "muon", "muon_learning_rate": muon})


@dataclass(frozen=True)
class _Grid:
    arms: dict[str, Arm] = field(default_factory=dict)

    def add(self, name: str, chosen: Options, **kwargs: Any) -> None:
        assert name not in self.arms, name
        self.arms[name] = Arm(chosen, **kwargs)


def _arms() -> dict[str, Arm]:
    grid = _Grid()
    fast = {"init": "unit", "muon": 6e-3, "rate": 3e-3}
    # The five that the claims stand on.
    grid.add("uniform_epsilon", options("uniform", "epsilon"), seeds=FIVE)
    grid.add("fast", options("fast", "v", **fast), seeds=FIVE, **SHORT)
    grid.add("uniform_epsilon_tuned", options("uniform", "epsilon", rate=4e-3), seeds=FIVE)
    grid.add("paper_v", options("paper", "v"), seeds=FIVE, **MIDDLE)
    grid.add("paper_epsilon", options("paper", "epsilon"), seeds=FIVE)
    # Each factor alone and together.
    grid.add("fast_adamw", options("fast", "v", init="unit", rate=4e-3), **SHORT)
    grid.add("uniform_v", options("uniform", "v"), **MIDDLE)
    grid.add("uniform_v_unit", options("uniform", "v", init="unit"), **SHORT)
    grid.add("paper_v_unit", options("paper", "v", init="unit"), **SHORT)
    grid.add("fast_density_v_unit", options("fast", "v", init="unit"), **SHORT)
    grid.add("uniform_v_fast", options("uniform", "v", **fast), **SHORT)
    grid.add("paper_v_fast", options("paper", "v", **fast), **SHORT)
    grid.add("uniform_epsilon_unit", options("uniform", "epsilon", init="unit"))
    grid.add("paper_epsilon_unit", options("paper", "epsilon", init="unit"))
    grid.add("uniform_epsilon_fast", options("uniform", "epsilon", **fast))
    grid.add("paper_epsilon_fast", options("paper", "epsilon", **fast))
    grid.add("gaussian_v_unit", options("gaussian", "v", init="unit"), **SHORT)
    grid.add("logit_normal_flow_unit", options("logit_normal", "flow", init="unit"), **SHORT)
    # Rates, as many for the baseline as for the recipe.
    for rate, seeds in ((0.5e-3, (0,)), (2e-3, FIVE), (8e-3, (0,))):  # 2e-3 ended closer than 4e-3 in seed 0
        grid.add(f"uniform_epsilon_rate_{rate:g}", options("uniform", "epsilon", rate=rate), seeds=seeds)
    for rate in (1.5e-3, 3e-3, 12e-3):
        chosen = options("fast", "v", init="unit", muon=rate, rate=rate / 2)
        grid.add(f"fast_rate_{rate:g}", chosen, seeds=(0,), **SHORT)
    # With a cosine schedule.
    cosine = {
        "uniform_epsilon": (options("uniform", "epsilon"), (1000, 3000)),
        "uniform_epsilon_tuned": (options("uniform", "epsilon", rate=4e-3), (1000, 3000)),
        **{
            f"uniform_epsilon_rate_{rate:g}": (options("uniform", "epsilon", rate=rate), (3000,))
            for rate in (2e-3, 8e-3)
        },
        "paper_v": (options("paper", "v", rate=4e-3), (500, 1000, 1500)),
        "quickstart": (options("paper", "v"), (3000,)),  # config=quickstart/fashion_mnist, but for its longer warm-up
        "fast_adamw": (options("fast", "v", init="unit", rate=4e-3), (500, 750, 1000)),
        "fast": (options("fast", "v", **fast), (300, 400, 500, 600, 750, 1000)),
    }
    for name, (chosen, lengths) in cosine.items():
        for steps in lengths:
            family = f"{name}_cosine"
            added = {"steps": steps, "measured_at": (steps,), "seeds": (0, 1, 2), "curve": family}
            grid.add(f"{family}_{steps}", chosen | COSINE, **added)
    # Is the recipe's picture as good as that of `quickstart` in a third of the time? With Muon that was 750 steps.
    changes: dict[str, Options] = {
        "momentum_0.9": {"muon_momentum": 0.9},
        "beta2_0.99": {"adam_beta2": 0.99},
        "rate_0.009": {"muon_learning_rate": 9e-3, "learning_rate": 4.5e-3},
        "two_phase": {"speed_sampling": "two_phase:until=0.6,first=gaussian:mean=-1"},
        "mean_-0.5": {"speed_sampling": "gaussian:mean=-0.5"},
    }
    changes["together"] = changes["momentum_0.9"] | changes["rate_0.009"] | changes["mean_-0.5"]
    # With three Newton-Schulz steps 880 steps are a third of the time. "quick" is config=quickstart/fast.
    cheaper: dict[str, Options] = {f"ns_steps_{steps}": {"muon_ns_steps": steps} for steps in (3, 2)}
    quick = {"quick": changes["momentum_0.9"] | changes["rate_0.009"] | cheaper["ns_steps_3"]}
    cheaper |= quick | {"together_ns_steps_3": changes["together"] | cheaper["ns_steps_3"]}
    for steps, tried in ((750, changes), (880, cheaper), (400, quick), (500, quick)):
        for name, change in tried.items():
            family = f"fast_{name}_cosine"
            chosen = options("fast", "v", **fast) | COSINE | change
            seeds = {"together": (0, 1), "quick": (0, 1, 2, 3)}.get(name, (0,))
            grid.add(f"{family}_{steps}", chosen, steps=steps, measured_at=(steps,), seeds=seeds, curve=family)
    # What else could make the recipe faster, one thing at a time.
    recipe = options("fast", "v", **fast)
    trials: dict[str, Options] = {
        "ema_0.99": {"ema_decay": 0.99},
        "beta2_0.95": {"adam_beta2": 0.95},
        "beta2_0.99": {"adam_beta2": 0.99},
        "momentum_0.9": {"muon_momentum": 0.9},
        "mean_0": {"speed_sampling": "gaussian:mean=0"},
        "std_1.5": {"speed_sampling": "gaussian:mean=-1,std=1.5"},
        "infonoise": {"speed_sampling": "infonoise"},
        "min_snr": {"speed_weighting": "soft_min_snr"},
        "adamw_rate_6e-3": {"learning_rate": 6e-3},
        "ns_steps_3": cheaper["ns_steps_3"],
    }
    for name, change in trials.items():
        grid.add(f"fast_{name}", recipe | change, seeds=FIVE if name == "ema_0.99" else (0,), **SHORT)
    # And the baseline, where it could gain from the same.
    for name in ("ema_0.99", "beta2_0.99"):
        chosen = options("uniform", "epsilon", rate=4e-3) | trials[name]
        grid.add(f"uniform_epsilon_tuned_{name}", chosen, seeds=(0, 1, 2) if name == "ema_0.99" else (0,))
    chosen = options("uniform", "epsilon", rate=2e-3) | trials["ema_0.99"]
    grid.add("uniform_epsilon_rate_0.002_ema_0.99", chosen, seeds=(0, 1, 2))
    # Every density at both targets, all else as DiT has it: one seed and fewer scores, to find out what is far off.
    screened: dict[str, dict[str, Any]] = {
        "epsilon": {"measured_at": (750, 1500, 3000), "seeds": (0,)},
        # Velocity alone brings the baseline's end within 1,500 steps.
        "v": {"steps": 1500, "measured_at": (500, 1000, 1500), "seeds": (0,)},
    }
    for density in DENSITIES:
        if density == "gaussian":  # "fast" is the same, drawn evenly; what that is worth gaussian_v_unit tells
            continue
        for target, measured in screened.items():
            name = f"{density}_{target}"
            if name not in grid.arms:
                # The authors' first code saves most with epsilon: that needs more than one seed.
                more = {"seeds": (0, 1, 2)} if name == "seed_epsilon" else {}
                grid.add(name, options(density, target), **measured | more)
    # What SpeeD is worth on a flow, of whose steps few have settled, and what the recipe's timesteps are.
    grid.add("uniform_flow", options("uniform", "flow"), **MIDDLE)
    grid.add("paper_flow", options("paper", "flow"), **MIDDLE)
    for density in ("fast", "logit_normal"):
        grid.add(f"{density}_flow", options(density, "flow"), **screened["v"])
    # What the field has found since, over the density, target and initialisation of the recipe.
    unit = options("fast", "v", init="unit")
    uncertainty: Options = {"speed_weighting": "uncertainty"}
    two_phase: Options = {"speed_sampling": "two_phase:until=0.6,first=gaussian:mean=-1"}
    grid.add("uncertainty_v_unit", options("uniform", "v", init="unit") | uncertainty, **SHORT)
    grid.add("fast_density_uncertainty_v_unit", unit | uncertainty, **SHORT)
    grid.add("fast_density_two_phase_v_unit", unit | two_phase, **SHORT)
    grid.add("fast_uncertainty", options("fast", "v", **fast) | uncertainty, **SHORT)
    grid.add("fast_two_phase", options("fast", "v", **fast) | two_phase, **SHORT)
    return grid.arms


ARMS: dict[str, Arm] = _arms()


@dataclass(frozen=True)
class Job:
    """One run: a setting, an arm, a seed."""

    setting: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.setting}/{self.arm}-{self.seed}"


def jobs(settings: list[str], arms: list[str], seeds: list[int]) -> Iterator[Job]:
    """The runs in their order.

    First those that the claims stand on, the seeds in turn, so that what compares two of them has the same seeds of
    both; then the first seeds of all others, and so on.

    Args:
        settings: Names of settings.
        arms: Names of arms; empty: all.
        seeds: Seeds; empty: all.
    """
    for main in (True, False):
        for seed in FIVE:
            for setting in settings:
                its_seeds = seeds_of(setting)
                most = max(map(len, its_seeds.values()))
                for name, own in its_seeds.items():
                    asked_for = (not arms or name in arms) and (not seeds or seed in seeds)
                    if (len(own) == most) == main and seed in own and asked_for:
                        yield Job(setting, name, seed)


def seeds_of(setting: str) -> dict[str, tuple[int, ...]]:
    """The seeds of each arm that a setting runs, in the order of `ARMS`."""
    own = SETTINGS[setting].arms
    return {name: arm.seeds if own is None else own[name] for name, arm in ARMS.items() if own is None or name in own}
