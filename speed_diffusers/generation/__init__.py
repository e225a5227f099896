"""Images from trained models: pipelines by name, samplers by name, generation, and the export of a plain pipeline."""

from .generate import GenerationSettings, generate
from .pretrained import load_pipeline, load_transformer, load_vae
from .samplers import SAMPLERS, make_sampler

__all__ = [
    "SAMPLERS",
    "GenerationSettings",
    "generate",
    "load_pipeline",
    "load_transformer",
    "load_vae",
    "make_sampler",
]
