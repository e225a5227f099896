"""Randomness as a function of (seed, purpose, step): there is no generator state to save, lose or restore."""

import hashlib

import torch


def keyed_seed(seed: int, purpose: str, step: int) -> int:
    """A 32-bit seed for one purpose at one step, unrelated to that of any other purpose or step.

    Torch's CPU generator keeps only 32 bits of its seed, hence a hash rather than shifted fields.
    """
    key = f"{seed}:{purpose}:{step}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")


def keyed_generator(seed: int, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` seeded by `keyed_seed`."""
    return torch.Generator(device).manual_seed(keyed_seed(seed, purpose, step))
