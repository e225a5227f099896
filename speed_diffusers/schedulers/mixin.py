"""The mixin that teaches a diffusers scheduler SpeeD's timestep sampling and loss weights."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..process import Areas, ForwardProcess, SpeeDSettings
from ..timesteps import UNIFORM, draw_independent, draw_uniform, timestep_pmf
from ..weightings import timestep_weights

PREFIX = "speed_"


@dataclass(frozen=True)
class SpeeDTables:
    """What SpeeD derives from a schedule: float64 on the CPU, never part of a saved config.

    Attributes:
        process: The forward process.
        settings: Resolved k, tau and lambda.
        pmf: Probability of each timestep, shape (T,), summing to 1.
        weights: Loss weight of each timestep, shape (T,).
    """

    process: ForwardProcess
    settings: SpeeDSettings
    pmf: Tensor
    weights: Tensor


class SpeeDSchedulerMixin:
    """Adds asymmetric timestep sampling and change-aware loss weights to a scheduler (SpeeD, arXiv 2405.17403).

    Put it before a diffusers scheduler in the bases of a class whose `__init__` spells out every parameter of that
    scheduler plus the six here (diffusers reads config keys off the signature, so `**kwargs` would lose them), is
    decorated with `register_to_config`, and ends with `self.speed_tables`, which checks the values. Sampling is left
    to the host: `step`, `add_noise` and `set_timesteps` are untouched.

    Take a host whose `add_noise` is fit for training as it stands, such as DDPM, DDIM or PNDM: that of a fresh
    DPMSolver, DEIS or UniPC noises the wrong way round until `set_timesteps`, and that of Euler, LMS or Heun does not
    scale the signal.

    Config keys, all JSON scalars: `speed_sampling` (a name in `DENSITIES`), `speed_weighting` (a name in
    `WEIGHTINGS`), `speed_k` (at least 1), `speed_tau` (in [1, T]; None: from `speed_r`), `speed_r` (above 1),
    `speed_lambda` (in [0.5, 1]).
    """

    @property
    def speed_tables(self) -> SpeeDTables:
        """The tables of this schedule, built on first use.

        Raises:
            InputError: A `speed_` value is outside its range or names nothing.
        """
        tables = self.__dict__.get("_speed_tables")
        if tables is None:
            config = cast(Any, self).config
            process = ForwardProcess.from_scheduler(cast(Any, self))
            settings = SpeeDSettings.resolve(
                process,
                k=config.speed_k,
                tau=config.speed_tau,
                r=config.speed_r,
                lambda_=config.speed_lambda,
            )
            tables = SpeeDTables(
                process,
                settings,
                timestep_pmf(config.speed_sampling, process, settings),
                timestep_weights(config.speed_weighting, process, settings),
            )
            self._speed_tables = tables
            # Working copies in float32, one a device, so that a training step copies no table.
            self._speed_device_tables: dict[tuple[str, torch.device], Tensor] = {}
        return cast(SpeeDTables, tables)

    @property
    def speed_areas(self) -> Areas:
        """The acceleration, deceleration and convergence areas as ranges of timesteps."""
        tables = self.speed_tables
        return tables.process.areas(tables.settings.tau)

    def sample_timesteps(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws training timesteps, as the host's `add_noise` takes them.

        Args:
            batch_size: Number of draws, at least 1.
            generator: Source of randomness; the draw happens on its device. None takes torch's global one.
            device: Where the result lives; None: the generator's device, or the CPU.

        Returns:
            int64 (batch_size,) in [0, T). With `speed_sampling="uniform"` bit-identical to
            `torch.randint(0, T, (batch_size,), generator=generator, device=device)`.
        """
        target = torch.device(device) if device is not None else generator.device if generator else torch.device("cpu")
        source = generator.device if generator is not None else target
        tables = self.speed_tables
        if cast(Any, self).config.speed_sampling == UNIFORM:
            timesteps = draw_uniform(
                tables.process.num_train_timesteps, batch_size, generator=generator, device=source
            )
        else:
            timesteps = draw_independent(self._on_device("cumulative", source), batch_size, generator=generator)
        return timesteps.to(target, non_blocking=True)

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        """The loss weight of each timestep of a batch.

        Args:
            timesteps: int64, any shape, in [0, T).

        Returns:
            float32 of the same shape, on the same device.
        """
        return self._on_device("weights", timesteps.device)[timesteps]

    def to_inference(self) -> SchedulerMixin:
        """The host scheduler without SpeeD, same schedule: what an exported pipeline carries."""
        host = next(
            cls
            for cls in type(self).__mro__
            if issubclass(cls, SchedulerMixin) and not issubclass(cls, SpeeDSchedulerMixin)
        )
        config = {key: value for key, value in cast(Any, self).config.items() if not key.startswith(PREFIX)}
        return cast(SchedulerMixin, cast(Any, host).from_config(config))

    def _on_device(self, name: str, device: torch.device) -> Tensor:
        tables = self.speed_tables
        key = (name, device)
        if key not in self._speed_device_tables:
            if name == "weights":
                table = tables.weights.float()
            else:
                table = tables.pmf.cumsum(0).float()
                # Rounding must not leave a gap below 1 that a draw could fall through.
                table[-1] = 1.0
            self._speed_device_tables[key] = table.to(device)
        return self._speed_device_tables[key]
