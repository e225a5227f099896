"""Single-file diffusers pipelines; they import torch and diffusers alone, so that each file also works by itself."""

from .pipeline_dit_speed import SpeeDDiTPipeline

__all__ = ["SpeeDDiTPipeline"]
