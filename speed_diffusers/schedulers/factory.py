"""SpeeD on any other scheduler of diffusers: a class made for it, or a clear refusal.

Nothing is taken on trust: a scheduler is accepted if its own `add_noise` (of flows, `scale_noise`) does what its noise
schedule says, fresh and after `set_timesteps`. Of diffusers 0.42 that leaves the parallel variants of DDPM and DDIM,
PNDM, SASolver, LCM, TCD, UnCLIP, CogVideoX's two and the flow-matching ones. `add_noise` of the others is not
overridden here, because image-to-image pipelines call it: Euler's kin need the signal unscaled there, and DPMSolver's
kin the noise of their own, perhaps warped, inference steps. Such a scheduler samples, and DDPM's class trains.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, cast

import diffusers
import torch

# SchedulerMixin must be a name of this module: diffusers tells what a class of another library is by the base classes
# that it finds in the namespace of the module that the pipeline's index names.
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config

from ..errors import InputError, unknown_name
from ..process import ForwardProcess, is_rectified_flow
from ..settings import PREFIX, SPEED_DEFAULTS
from .ddim import SpeeDDDIMScheduler
from .ddpm import SpeeDDDPMScheduler
from .flow import SpeeDFlowMixin
from .flow_match_euler_discrete import SpeeDFlowMatchEulerDiscreteScheduler
from .mixin import SCHEDULE_KEYS, SpeeDSchedulerMixin, whole_config

NAME_PREFIX = "SpeeD"

_CLASSES: dict[type, type] = {
    DDPMScheduler: SpeeDDDPMScheduler,
    DDIMScheduler: SpeeDDDIMScheduler,
    FlowMatchEulerDiscreteScheduler: SpeeDFlowMatchEulerDiscreteScheduler,
}


def speed_scheduler(scheduler_or_config: SchedulerMixin | Mapping[str, Any], **speed: Any) -> Any:
    """The same scheduler with SpeeD's `sample_timesteps` and `loss_weights`.

    Args:
        scheduler_or_config: A scheduler, plain or with SpeeD already; or the content of a `scheduler_config.json`,
            which names its class.
        speed: Our config keys, such as `speed_k=3.0`; those left out keep what the config has, or their defaults.

    Returns:
        A new scheduler whose class derives from that of the given one and from `SpeeDSchedulerMixin`. What it saves is
        loaded by its class's `from_pretrained` (`speed_scheduler_class` gives that), by this function, by pipelines in
        a process that has imported `speed_diffusers`, and by plain diffusers schedulers.

    Raises:
        InputError: Unknown class or key, a value outside its range, or a scheduler that cannot be used for training,
            with the class to take instead.
    """
    for key in speed:
        if key not in SPEED_DEFAULTS:
            raise unknown_name("SpeeD option", key, SPEED_DEFAULTS)
    if isinstance(scheduler_or_config, Mapping):
        name = scheduler_or_config.get("_class_name")
        if not isinstance(name, str):
            raise InputError(
                "The config of the scheduler names no '_class_name', as configs of schedulers made in code do not; "
                "pass the scheduler itself, or scheduler_config.json as a dictionary."
            )
        cls, config = speed_scheduler_class(name), scheduler_or_config
    elif isinstance(scheduler_or_config, SchedulerMixin):
        cls, config = speed_scheduler_class(type(scheduler_or_config)), whole_config(scheduler_or_config)
    else:
        raise InputError(f"{type(scheduler_or_config).__name__} is neither a scheduler of diffusers nor its config.")
    betas, wanted = config.get("trained_betas"), config.get("num_train_timesteps")
    if betas is not None and len(betas) != wanted:
        raise InputError(
            f"The scheduler has {len(betas)} trained_betas, but num_train_timesteps={wanted}: set it to {len(betas)}."
        )
    return cast(Any, cls).from_config(config, **speed)


def speed_scheduler_class(host: type | str) -> type:
    """The SpeeD class of a scheduler class, made on first use and then kept.

    Args:
        host: A scheduler class, or the name of one of diffusers, with or without "SpeeD" before it.

    Raises:
        InputError: Not a scheduler class.
    """
    if isinstance(host, str):
        host = _host_named(host.removeprefix(NAME_PREFIX))
    if not (isinstance(host, type) and issubclass(host, SchedulerMixin)):
        raise InputError(f"{host!r} is not a scheduler class of diffusers.")
    if issubclass(host, SpeeDSchedulerMixin):
        return host
    if host not in _CLASSES:
        _CLASSES[host] = _make_class(host)
    return _CLASSES[host]


def _host_named(name: str) -> type:
    known = {cls.__name__: cls for cls in _CLASSES}
    found = known.get(name) or (getattr(diffusers, name, None) if name.endswith("Scheduler") else None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        listed = [entry for entry in dir(diffusers) if entry.endswith("Scheduler")]
        raise unknown_name("scheduler class", name, listed)
    return found


def _make_class(host: type) -> type:
    """A subclass of the mixin and the host whose constructor spells out the host's parameters and ours.

    diffusers reads config keys off the signature of `__init__`, so that is set explicitly.
    """
    theirs = inspect.signature(cast(Any, host).__init__)
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in SPEED_DEFAULTS.items()
    ]
    parameters = [p for p in theirs.parameters.values() if p.kind is not p.VAR_KEYWORD]
    signature = theirs.replace(parameters=[*parameters, *ours])

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        values = {k: v for k, v in given.arguments.items() if k != "self" and not k.startswith(PREFIX)}
        cast(Any, host).__init__(self, **values)
        require_training_noise(self, host)

    cast(Any, __init__).__signature__ = signature
    flow = hasattr(host, "scale_noise") and "shift" in theirs.parameters
    body: dict[str, Any] = {
        "__init__": register_to_config(__init__),
        "__module__": __name__,
        "__doc__": f"`{host.__name__}` with SpeeD: its parameters, and SpeeD's.\n\n",
    }
    if not flow and not hasattr(host, "get_velocity"):
        # The target of v-prediction, for hosts that can sample with it but not give it.
        body["get_velocity"] = DDPMScheduler.get_velocity
    return type(f"{NAME_PREFIX}{host.__name__}", (SpeeDFlowMixin if flow else SpeeDSchedulerMixin, host), body)


def require_training_noise(scheduler: Any, host: type) -> None:
    """Checks that a scheduler with SpeeD noises as its schedule says, whatever `set_timesteps` has done to it.

    Raises:
        InputError: It does not, or a `speed_` value is outside its range.
    """
    if problem := _training_problem(scheduler):
        raise InputError(f"{host.__name__} cannot be used for training: {problem}. {_instead(scheduler, host)}")
    _ = scheduler.speed_tables


def _training_problem(scheduler: Any) -> str | None:
    """Why a scheduler cannot be used for training; None if it can."""
    if is_rectified_flow(scheduler):
        return None if _noises_as_flow(scheduler) else "its scale_noise is not (1 - sigma) x_0 + sigma eps"
    if not isinstance(getattr(scheduler, "betas", None), torch.Tensor):
        return "its noise schedule is given neither by betas nor as a rectified flow"
    process = ForwardProcess.from_scheduler(scheduler)
    fresh = _noising_problem(scheduler, process, None)
    return fresh or _noising_problem(scheduler, process, min(10, process.num_train_timesteps))


def _noising_problem(scheduler: Any, process: ForwardProcess, num_inference_steps: int | None) -> str | None:
    """What is wrong with add_noise, fresh or after set_timesteps; None if it is sqrt(1 - n) x_0 + sqrt(n) eps."""
    if not hasattr(scheduler, "add_noise"):
        return "it has no add_noise"
    probe = copy.deepcopy(scheduler)
    last = process.num_train_timesteps - 1
    timesteps = torch.tensor([0, last // 4, last // 2, last])
    clean, noise = torch.full((4, 1), 1.0), torch.full((4, 1), -0.5)
    level = process.noise_level[timesteps, None]
    state = "" if num_inference_steps is None else "after set_timesteps "
    try:
        if num_inference_steps is not None:
            probe.set_timesteps(num_inference_steps)
        noisy = probe.add_noise(clean, noise, timesteps).double()
    except Exception as error:  # whatever it is, such a scheduler noises no batch
        return f"{state}add_noise fails ({type(error).__name__})"
    if torch.allclose(noisy, (1.0 - level).sqrt() * clean + level.sqrt() * noise, rtol=0, atol=1e-3):
        return None
    return f"{state}its add_noise is not sqrt(1 - n) x_0 + sqrt(n) eps at the noise level n of the timestep"


def _noises_as_flow(scheduler: Any) -> bool:
    clean, noise = torch.full((1, 1), 1.0), torch.full((1, 1), -0.5)
    steps = scheduler.training_timesteps
    for index in (0, len(steps) // 2, len(steps) - 1):
        timestep = steps[index : index + 1]
        try:
            noisy = copy.deepcopy(scheduler).scale_noise(clean, timestep, noise)
        except Exception:  # its own table has other timesteps
            return False
        if not torch.allclose(noisy, scheduler.add_noise(clean, noise, timestep), rtol=0, atol=1e-5):
            return False
    return True


def _instead(scheduler: Any, host: type) -> str:
    """What to train with instead: values rather than `from_config`, which leaves out what is a default of the host."""
    config = scheduler.config
    if config.get("use_flow_sigmas", False):
        values = {"num_train_timesteps": config["num_train_timesteps"], "shift": config.get("flow_shift", 1.0)}
        trains = _call("SpeeDFlowMatchEulerDiscreteScheduler", values)
    elif "beta_start" in config:
        values = {name: config[name] for name in SCHEDULE_KEYS if config.get(name) is not None}
        trains = _call("SpeeDDDPMScheduler", values)
    else:
        return "Train with SpeeDDDPMScheduler, or a rectified flow with SpeeDFlowMatchEulerDiscreteScheduler."
    return f"Train with {trains} and sample with {host.__name__}."


def _call(name: str, values: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})"


def __getattr__(name: str) -> type:
    """Classes made here are attributes of this module, so that pickles and saved pipelines find them."""
    if name.startswith(NAME_PREFIX) and name.endswith("Scheduler"):
        try:
            return speed_scheduler_class(name)
        except InputError as error:
            raise AttributeError(str(error)) from None
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
