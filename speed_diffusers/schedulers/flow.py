"""What SpeeD needs of a flow-matching scheduler: timesteps as floats, and noising for training."""

from typing import Any, cast

import torch
from torch import Tensor

from ..errors import InputError
from ..tables import draw, draw_devices, may_be_late
from .mixin import SpeeDSchedulerMixin


class SpeeDFlowMixin(SpeeDSchedulerMixin):
    """SpeeD on a scheduler of a rectified flow x = (1 - sigma) x_0 + sigma eps, such as FlowMatchEulerDiscrete.

    Indices count from the least noise, sigma of 1/T before shift; a scheduler's own tables count from the most. Models
    are fed sigma T, float32, and so are `sample_timesteps` and `loss_weights`. The shift for a resolution is taken
    from `shift`; with `use_dynamic_shifting` training knows no shift, as in diffusers' scripts.
    """

    @property
    def training_timesteps(self) -> Tensor:
        """Sigma T of every training timestep, float32 (T,), ascending: the table of a fresh host, bit for bit.

        Made from the config, because the host's own table changes with `set_timesteps`.

        Raises:
            InputError: The scheduler turns sigmas around (`invert_sigmas`), which training here does not know.
        """
        table = self.__dict__.get("_training_timesteps")
        if table is None:
            config = cast(Any, self).config
            if config.get("invert_sigmas", False):
                raise InputError("invert_sigmas=True: SpeeD trains flows whose sigma grows with the noise only.")
            steps = config["num_train_timesteps"]
            # In the host's own order of float32 operations.
            sigmas = torch.arange(1, steps + 1, dtype=torch.float32) / steps
            if not config.get("use_dynamic_shifting", False):
                shift = config["shift"]
                sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
            table = self._training_timesteps = sigmas * steps
        return cast(Tensor, table)

    def sample_timesteps(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Draws training timesteps, in the unit in which pipelines feed them to the model.

        Args:
            batch_size: Number of draws, at least 1. Paired and stratified draws reach over all of them, so with
                several processes draw the global batch everywhere and take a slice.
            generator: Source of randomness; the draw happens on its device. None takes torch's global one.
            device: Where the result lives; None: the generator's device, or the CPU.
            progress: Share of the training that is done, in [0, 1]; needed where k is annealed or the density changes.

        Returns:
            float32 (batch_size,): sigma T, in (0, T]. With `speed_sampling="uniform"` bit-identical to diffusers' SD3
            and Flux scripts without a weighting scheme, which take
            `scheduler.timesteps[(torch.rand(batch_size) * T).long()]` of a fresh scheduler, most noise first.

        Raises:
            InputError: `progress` is needed and not given, or outside [0, 1].
        """
        tables = self.speed_strategy.tables_to_draw(progress)
        source, target = draw_devices(generator, device)
        if tables.randint:
            steps = tables.process.num_train_timesteps
            # As diffusers' compute_density_for_timestep_sampling without a scheme, in float32 whatever the default is.
            share = torch.rand(batch_size, device=source, generator=generator, dtype=torch.float32)
            indices = steps - 1 - (share * steps).long().clamp_max(steps - 1)
        else:
            indices = draw(tables, batch_size, generator, source)
        return self._float_table("timesteps", source)[indices].to(target, non_blocking=may_be_late(target))

    def timestep_indices(self, timesteps: Tensor) -> Tensor:
        """Index in [0, T) of the training timestep nearest to each sigma T, int64, without host synchronisation.

        Args:
            timesteps: Floating point, any shape: sigma T.
        """
        return torch.searchsorted(self._float_table("middles", timesteps.device), timesteps.float().contiguous())

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noises for training: (1 - sigma) x_0 + sigma eps.

        The host's `scale_noise`, which pipelines use, looks timesteps up one by one in the table of the latest
        `set_timesteps` and waits for the device at each; this one needs no table.

        Args:
            original_samples: x_0, (B, ...).
            noise: eps, like x_0.
            timesteps: (B,), sigma T, from `sample_timesteps`.

        Returns:
            Shape and dtype of x_0.
        """
        sigma = timesteps.to(original_samples.device, torch.float32) / cast(Any, self).config["num_train_timesteps"]
        sigma = sigma.reshape(-1, *[1] * (original_samples.dim() - 1))
        noisy = (1.0 - sigma) * original_samples + sigma * noise
        return cast(Tensor, noisy.to(original_samples.dtype))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of training: noise - x_0, the same at every timestep.

        Args:
            sample: x_0, (B, ...).
            noise: eps, like x_0.
            timesteps: (B,); not needed, here for the signature that diffusers' schedulers share.
        """
        return noise - sample

    def _float_table(self, name: str, device: torch.device) -> Tensor:
        copies = self.__dict__.setdefault("_float_tables", {})
        key = (name, device)
        if key not in copies:
            table = self.training_timesteps
            copies[key] = (table if name == "timesteps" else 0.5 * (table[:-1] + table[1:])).to(device)
        return cast(Tensor, copies[key])
