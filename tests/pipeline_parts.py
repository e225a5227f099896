"""Small pipelines whose right answer is known, for the tests of the pipeline and of the samplers."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel
from torch import Tensor

from speed_diffusers.pipelines import SpeeDDiTPipeline

MEAN, STD = 0.7, 0.5
SIZE = (4, 4, 4)
BETAS = np.linspace(1e-4, 0.02, 1000)
"""DiT's schedule, worked out here and not taken from diffusers."""
ALPHAS_CUMPROD = np.cumprod(1.0 - BETAS)
SCHEDULE: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
# Half of diffusers' schedulers have other betas by default, so they are always given.


class GaussianDiT(DiTTransformer2DModel):
    """The best denoiser of data N(MEAN, STD^2), plus `ripple` times what a DiT with random weights says."""

    ripple = 0.0
    flow = False
    prediction_type = "epsilon"
    alphas_cumprod = ALPHAS_CUMPROD

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        sample, dtype = hidden_states, hidden_states.dtype
        if self.flow:
            signal, noise = 1 - timestep / 1000, timestep / 1000
        else:
            # Between timesteps diffusers' solvers interpolate the noise-to-signal ratio, which must be finite.
            ratio = np.sqrt(1 / np.maximum(self.alphas_cumprod, 2.0**-24) - 1)
            found = torch.from_numpy(np.interp(timestep.double().numpy(), np.arange(len(ratio)), ratio))
            signal = (1 + found**2).rsqrt()
            noise = found * signal
        signal, noise = (value.double()[:, None, None, None] for value in (signal, noise))
        excess = (sample.double() - signal * MEAN) / ((signal * STD) ** 2 + noise**2)
        epsilon, clean = noise * excess, MEAN + signal * STD**2 * excess
        answers = {"epsilon": epsilon, "v_prediction": signal * epsilon - noise * clean, "sample": clean}
        mean = (epsilon - clean if self.flow else answers[self.prediction_type]).to(dtype)
        if self.ripple:
            said = super().forward(sample, timestep, class_labels, return_dict=False)[0].tanh()
            mean = mean + self.ripple * said[:, :4]
            mean = torch.cat([mean, said[:, 4:]], dim=1)
        return (mean,)


def transformer(
    kind: type[DiTTransformer2DModel] = DiTTransformer2DModel, *, rows: int = 10, out_channels: int = 4, **values: Any
) -> Any:
    """A tiny real DiT whose output is not zero; `values` are set on it."""
    torch.manual_seed(0)
    model = kind(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=4,
        in_channels=4,
        out_channels=out_channels,
        num_embeds_ada_norm=rows,
    )
    for name, value in values.items():
        setattr(model, name, value)
    return model.eval()


def autoencoder() -> AutoencoderKL:
    """A tiny real autoencoder: 4 latent channels, factor 1, a scaling factor that is not 1."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        mid_block_add_attention=False,
        scaling_factor=0.6,
    ).eval()


def pipeline_of(model: Any, scheduler: Any = None, **options: Any) -> SpeeDDiTPipeline:
    """A pipeline without a progress bar; its scheduler is DDPM with DiT's schedule unless given."""
    if scheduler is None:
        scheduler = DDPMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="linspace")
    pipeline = SpeeDDiTPipeline(transformer=model, vae=autoencoder(), scheduler=scheduler, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    """One an image."""
    return [torch.Generator().manual_seed(100 + first + index) for index in range(count)]


def noise_of(sources: list[torch.Generator], dtype: torch.dtype = torch.float32) -> Tensor:
    """The next noise of each generator, (N, 4, 4, 4)."""
    return torch.stack([torch.randn((1, *SIZE), generator=source, dtype=dtype)[0] for source in sources])
