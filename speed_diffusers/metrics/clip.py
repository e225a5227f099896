"""CLIP's embeddings of images and texts, for CMMD and CLIP score."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .pixels import normalized, resized_bicubic, to_uint8
from .transformers_models import load_tokenizer, load_transformers_model

CLIP = "clip"
CLIP_MODEL = "openai/clip-vit-large-patch14-336"
"""CMMD's."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """Embeddings of length 1, (N, D), of images (N, 3, H, W) in [0, 1].

    Images are resized as CMMD's authors do, by the antialiased bicubic filter without rounding; CLIP's own processor
    rounds to eight bits after it.

    Args:
        model: A `CLIPModel`.
        name: Where it came from; the tokenizer is there too, and read when texts are asked for.
    """

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.size = int(model.config.vision_config.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images, (N, D)."""
        pixels = normalized(resized_bicubic(to_uint8(images), self.size), MEAN, STD)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return functional.normalize(self.model.visual_projection(pooled), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, (len(texts), D), of length 1, on the CPU."""
        tokenizer = load_tokenizer("clip_model", self.name)
        longest = self.model.config.text_config.max_position_embeddings
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        device = self.model.text_projection.weight.device
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        ).pooler_output
        return functional.normalize(self.model.text_projection(pooled), dim=1).cpu()


def load_clip(model: str, device: torch.device) -> Clip:
    """The network from a folder or Hub id; errors as in `load_transformers_model`."""
    return Clip(load_transformers_model("CLIPModel", "clip_model", model, device), model)
