"""DDIMScheduler with SpeeD."""

import numpy as np

# SchedulerMixin looks unused, but must be a name of this module: diffusers tells what a class of another library is by
# the base classes that it finds in the namespace of the module that the pipeline's index names.
from diffusers import DDIMScheduler, SchedulerMixin  # noqa: F401
from diffusers.configuration_utils import register_to_config

from .mixin import SpeeDSchedulerMixin


class SpeeDDDIMScheduler(SpeeDSchedulerMixin, DDIMScheduler):
    """`DDIMScheduler` that also draws training timesteps and weighs their losses as SpeeD does (arXiv 2405.17403).

    All parameters of `DDIMScheduler`, with its defaults, and SpeeD's.

    Raises:
        InputError: (a ValueError) A `speed_` value is outside its range or names nothing.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        speed_sampling: str = "asymmetric",
        speed_weighting: str = "change_aware",
        speed_k: float = 5.0,
        speed_tau: float | None = None,
        speed_r: float = 145.0,
        speed_lambda: float = 0.6,
        speed_draw: str = "independent",
        speed_normalize_weights: bool = False,
        speed_anneal_start: float = 1.0,
        speed_anneal_end: float = 1.0,
    ) -> None:
        DDIMScheduler.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        _ = self.speed_tables  # checks the values here rather than in the first training step
