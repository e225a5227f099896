"""FlowMatchEulerDiscreteScheduler with SpeeD."""

# SchedulerMixin looks unused, but must be a name of this module: diffusers tells what a class of another library is by
# the base classes that it finds in the namespace of the module that the pipeline's index names.
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin  # noqa: F401
from diffusers.configuration_utils import register_to_config

from .flow import SpeeDFlowMixin


class SpeeDFlowMatchEulerDiscreteScheduler(SpeeDFlowMixin, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` that also draws training timesteps and weighs their losses as SpeeD does.

    All parameters of `FlowMatchEulerDiscreteScheduler`, with its defaults, and SpeeD's. tau and the weights come from
    the noise level of the variance-preserving process with the same SNR, for the method (arXiv 2405.17403) knows such
    processes only. `add_noise` and `get_velocity` are added for training.

    Raises:
        InputError: (a ValueError) A `speed_` value is outside its range or names nothing, or `invert_sigmas` is set.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
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
        FlowMatchEulerDiscreteScheduler.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        _ = self.speed_tables, self.training_timesteps  # checks the values here rather than in the first step
