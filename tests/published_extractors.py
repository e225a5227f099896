"""Published feature extractors: their real classes with random weights, in the files that their loaders read."""

import json
from pathlib import Path

import torch


def write_dinov2(folder: Path, *, small: bool = False) -> Path:
    """DINOv2-small, or the same of one narrow layer."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"hidden_size": 24, "num_hidden_layers": 1} if small else {"hidden_size": 384, "num_hidden_layers": 12}
    config = Dinov2Config(**size, num_attention_heads=6, image_size=518, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    """CLIP of two narrow layers on images of 56x56, its processor and a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-/"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**size, **ends, "vocab_size": len(words)},
        vision_config={**size, "image_size": 56, "patch_size": 14},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    sides = {"height": 56, "width": 56}
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=sides).save_pretrained(folder)
    return folder
