"""The mixin that teaches a diffusers scheduler SpeeD's timestep sampling and loss weights."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..errors import InputError, unknown_name
from ..predictions import FLOW_PREDICTION
from ..process import Areas, ForwardProcess, is_rectified_flow
from ..settings import PREFIX, SPEED_KEYS, SpeeDOptions
from ..strategy import REGISTRIES, SpeeDStrategy
from ..tables import SpeeDTables, draw, importance, weights

SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""What says how a scheduler noises, and what of it is predicted."""

_DEFAULTS_KEY = "_use_default_values"
"""Where diffusers lists the keys that were left at their defaults when a scheduler was made. `from_config` gives those
the defaults of the new class, whatever `register_to_config` has said since."""


def whole_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """A scheduler's config as it is now, of which `from_config` leaves out what is still a default of its class."""
    config, given = cast(Any, scheduler).config, inspect.signature(type(scheduler).__init__).parameters
    still = [name for name in config.get(_DEFAULTS_KEY, ()) if name in given and config[name] == given[name].default]
    return {**config, _DEFAULTS_KEY: still}


class SpeeDSchedulerMixin:
    """Adds asymmetric timestep sampling and change-aware loss weights to a scheduler (SpeeD, arXiv 2405.17403).

    For a scheduler without a SpeeD class of its own `speed_scheduler` makes one. By hand: put the mixin before a
    diffusers scheduler in the bases of a class whose `__init__` spells out every parameter of that scheduler plus ours
    (diffusers reads config keys off the signature, so `**kwargs` would lose them), is decorated with
    `register_to_config`, and ends with `self.speed_tables`, which checks the values. Sampling is left to the host:
    `step`, `add_noise` and `set_timesteps` are untouched.

    Take a host whose `add_noise` is fit for training as it stands, such as DDPM, DDIM or PNDM: that of a fresh
    DPMSolver, DEIS or UniPC noises the wrong way round until `set_timesteps`, and that of Euler, LMS or Heun does not
    scale the signal.

    Config keys, all JSON scalars, are the fields of `SpeeDOptions` with `speed_` before their names. Every SpeeD class
    lists them at the end of its docstring.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Describes SpeeD's options in the docstring of each SpeeD scheduler, from the one place where they stand."""
        super().__init_subclass__(**kwargs)
        if cls.__doc__ and issubclass(cls, SchedulerMixin):
            before, raises, after = cls.__doc__.partition("    Raises:\n")
            cls.__doc__ = f"{before}{_described_options()}{raises}{after}"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuses unknown `speed_` keywords, with the nearest one that there is."""
        _check_keys(kwargs)
        return super().__new__(cls)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from the config of this or a compatible one, as diffusers has it.

        Args:
            config: Config of a scheduler, or the content of a `scheduler_config.json`.
            return_unused_kwargs: Return keywords that the class does not know too.
            kwargs: Values to replace.

        Raises:
            InputError: A `speed_` key is unknown, which diffusers would leave out; or a value is outside its range.
        """
        _check_keys({**(config if isinstance(config, Mapping) else {}), **kwargs})
        if isinstance(config, Mapping) and _DEFAULTS_KEY in config:
            # Another class may have another default noise schedule: LCM's is not DDPM's. SpeeD's are alike.
            kept = {*SCHEDULE_KEYS, "shift", *SPEED_KEYS}
            left_out = [name for name in config[_DEFAULTS_KEY] if name not in kept]
            config = {**config, _DEFAULTS_KEY: left_out}
        return cast(Any, super()).from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        # diffusers looks for the class itself by its name among its own.
        found = cast(Any, super())._get_compatibles()
        return [cls, *found, *(host for host in [cls._host()] if host not in found)]

    @classmethod
    def _host(cls) -> type:
        """The scheduler class without SpeeD."""
        return next(
            each
            for each in cls.__mro__
            if issubclass(each, SchedulerMixin) and not issubclass(each, SpeeDSchedulerMixin)
        )

    @property
    def speed_strategy(self) -> SpeeDStrategy:
        """What draws and weighs, made on first use, and again when `register_to_config` has changed what it is of.

        Some trainers set the `prediction_type` so after the scheduler was made; weightings by SNR depend on it. What
        was learned is then forgotten, for it was learned from other errors.

        Raises:
            InputError: A `speed_` key is unknown, a value outside its range or names nothing, or the host cannot be
                read.
        """
        strategy, config = self.__dict__.get("_speed_strategy"), cast(Any, self).config
        # A change puts another config in the place of the one before.
        if strategy is None or self.__dict__.get("_speed_config") is not config:
            _check_keys(config)
            options = self._speed_options()
            if strategy is None or strategy.options != options:
                strategy = SpeeDStrategy(ForwardProcess.from_scheduler(cast(Any, self)), options)
                self._speed_strategy = strategy
            self._speed_config = config
        return cast(SpeeDStrategy, strategy)

    @property
    def speed_tables(self) -> SpeeDTables:
        """Probabilities and weights as float64 tables; where they change in training, the latest that were used.

        Raises:
            InputError: A `speed_` value is outside its range or names nothing.
        """
        return self.speed_strategy.latest_tables

    @property
    def speed_areas(self) -> Areas:
        """The acceleration, deceleration and convergence areas as ranges of timesteps, 0 having the least noise."""
        strategy = self.speed_strategy
        return strategy.process.areas(strategy.settings.tau)

    def sample_timesteps(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Draws training timesteps, as the host's `add_noise` takes them.

        Args:
            batch_size: Number of draws, at least 1. Paired and stratified draws reach over all of them, so with
                several processes draw the global batch everywhere and take a slice.
            generator: Source of randomness; the draw happens on its device. None takes torch's global one.
            device: Where the result lives; None: the generator's device, or the CPU.
            progress: Share of the training that is done, in [0, 1]; needed where k is annealed or the density changes.

        Returns:
            int64 (batch_size,) in [0, T). With `speed_sampling="uniform"` bit-identical to
            `torch.randint(0, T, (batch_size,), generator=generator, device=device)`.

        Raises:
            InputError: `progress` is needed and not given, or outside [0, 1].
        """
        return draw(self.speed_strategy.tables_to_draw(progress), batch_size, generator, device)

    def loss_weights(self, timesteps: Tensor, progress: float | None = None) -> Tensor:
        """The loss weight of each timestep of a batch, for the squared error of what the host's model predicts.

        Args:
            timesteps: Any shape, in the unit and dtype of `sample_timesteps`.
            progress: As for `sample_timesteps`.

        Returns:
            float32 of the same shape, on the same device.

        Raises:
            InputError: `progress` is needed and not given, or outside [0, 1].
        """
        return weights(self.speed_strategy.tables_to_weigh(progress), self.timestep_indices(timesteps))

    def importance_weights(self, timesteps: Tensor, progress: float | None = None) -> Tensor:
        """What undoes the density in the loss of each timestep of a batch, for terms that carry no loss weight.

        `loss_weights` holds it already. It is 1 for every density but importance sampling ("loss_second_moment"),
        whose whole loss must be multiplied by it.

        Args:
            timesteps: As for `loss_weights`.
            progress: As for `sample_timesteps`.

        Returns:
            float32 of the same shape, on the same device.

        Raises:
            InputError: `progress` is needed and not given, or outside [0, 1].
        """
        return importance(self.speed_strategy.tables(progress), self.timestep_indices(timesteps))

    def timestep_indices(self, timesteps: Tensor) -> Tensor:
        """Index in [0, T) of each timestep, int64, as `update_speed` counts them: here the timesteps themselves."""
        return timesteps

    @property
    def speed_is_loss_aware(self) -> bool:
        """Whether density or weighting follows the losses of the training, and so needs `update_speed`."""
        return self.speed_strategy.is_loss_aware

    def update_speed(self, error_sums: Tensor, error_counts: Tensor) -> None:
        """Tells a loss-aware density or weighting the errors of one or more batches, summed over all processes.

        Args:
            error_sums: Shape (T,), by `timestep_indices`: sum over the samples of each timestep of the prediction's
                unweighted mean squared error.
            error_counts: Shape (T,): how many samples that were.

        Raises:
            InputError: Neither `speed_sampling` nor `speed_weighting` learns, or the tensors are of another shape.
        """
        self.speed_strategy.update(error_sums, error_counts)

    def speed_state_dict(self) -> dict[str, Tensor]:
        """What density and weighting have learned, as plain tensors for a checkpoint; the config does not hold it.

        Raises:
            InputError: Neither `speed_sampling` nor `speed_weighting` learns.
        """
        return self.speed_strategy.state_dict()

    def load_speed_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to what density and weighting had learned.

        Raises:
            InputError: Neither `speed_sampling` nor `speed_weighting` learns, or the state is that of other choices or
                another process.
        """
        self.speed_strategy.load_state_dict(state)

    def to_inference(self) -> SchedulerMixin:
        """The host scheduler without SpeeD, same schedule: what an exported pipeline carries."""
        host = self._host()
        own = whole_config(cast(SchedulerMixin, self))
        config = {key: value for key, value in own.items() if not key.startswith(PREFIX)}
        return cast(SchedulerMixin, cast(Any, host).from_config(config))

    @property
    def _speed_prediction_type(self) -> str:
        # A flow's config may hold the key of a scheduler that it was converted from.
        if is_rectified_flow(self):
            return FLOW_PREDICTION
        return str(cast(Any, self).config.get("prediction_type") or "epsilon")

    def _speed_options(self) -> SpeeDOptions:
        config = cast(Any, self).config
        for key in REGISTRIES:
            if callable(config.get(key)):
                raise InputError(
                    f"{key}={config[key]!r}: a scheduler's config holds names only; register the function under one, "
                    "or use speed_diffusers.functional."
                )
        return SpeeDOptions.from_config(config, self._speed_prediction_type)


def _check_keys(config: Mapping[str, Any]) -> None:
    """Refuses keys that begin as SpeeD's and are none: a slip would silently train something else."""
    for key in config:
        if isinstance(key, str) and key.startswith(PREFIX) and key not in SPEED_KEYS:
            raise unknown_name("SpeeD option", key, SPEED_KEYS)


def _described_options() -> str:
    """SpeeD's options as a section of a docstring."""
    lines = ["    Args:"]
    for field in dataclasses.fields(SpeeDOptions):
        key = next((key for key, name in SPEED_KEYS.items() if name == field.name), None)
        if key is not None:
            interval = field.metadata["interval"]
            lines.append(f"        {key}: {field.metadata['help']}" + (f" In {interval}." if interval else ""))
    return "\n".join([*lines, "", ""])
