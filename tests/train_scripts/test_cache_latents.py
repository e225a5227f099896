"""Caching latents before a training: the same by one process and two, and found by the training's own options."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from forked import Forker
from speed_diffusers.errors import InputError
from speed_diffusers.train_scripts import cache_latents

EMBEDDED = ["max_train_samples=600", "random_flip=true"]
"""Three shards of the quickstart's images."""


def contents(cache_dir: Path) -> dict[str, bytes]:
    """Bytes of a cache's files by name."""
    return {path.name: path.read_bytes() for path in sorted(cache_dir.rglob("*")) if path.is_file()}


def test_two_processes_make_the_bytes_of_one(
    forker: Forker, tmp_path: Path, fresh_accelerate: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    cache_latents.main([*EMBEDDED, f"cache_dir={tmp_path / 'one'}"])
    alone = capsys.readouterr()
    together = forker.run(
        tmp_path / "output", [*EMBEDDED, f"cache_dir={tmp_path / 'two'}"], size=2, script="cache_latents"
    )
    assert "images in" not in (tmp_path / "output" / "rank-1.txt").read_text(), "once, though there are two"
    for name, output in {"one": alone.err + alone.out, "two": together}.items():
        (header,) = (tmp_path / name).rglob("header.json")
        size = 600 * (2 * 8 * 8 * 8 * 2 + 16)
        said = rf"^600 images in 3 shards, {size:,} bytes, after .* s: {re.escape(str(header.parent))}$"
        assert len(re.findall(said, output, re.MULTILINE)) == 1
        assert "Caching latents: 100%" in output and "600/600" in output
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert [name for name in one if name.startswith("shard")] == [
        f"shard-0000{index}.safetensors" for index in range(3)
    ]
    assert two == one


def test_a_training_finds_what_its_own_options_made_and_damage_is_mended(
    train: Callable[..., Path],
    tiny_options: list[str],
    tmp_path: Path,
    fresh_accelerate: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = f"cache_dir={tmp_path / 'cache'}"
    options = [option for option in tiny_options if not option.startswith("cache_dir")] + [own]
    cache_latents.main(options)
    made = contents(tmp_path / "cache")
    assert "26 images in 1 shard, " in capsys.readouterr().out
    train(tmp_path / "run", "max_train_steps=1", "num_validation_images=1", own)
    assert "Caching" not in capsys.readouterr().err
    (shard,) = (tmp_path / "cache").rglob("shard-*")
    shard.write_bytes(made[shard.name][:-1])
    fresh_accelerate()
    caplog.set_level(logging.WARNING)
    cache_latents.main(options)
    assert f"'{shard}' of the latent cache (rows 0 to 25): it has " in caplog.text
    assert contents(tmp_path / "cache") == made


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("cache_latents=false", "cache_latents=false: then there is nothing to do here"),
        ("resolution=33", r"Image size 33 is not a multiple of the VAE's factor 4 .*Nearest: 32 or 36"),
        ("verify=perhaps", "verify: 'perhaps' is not true or false"),
        ("batch=3", "Unknown config key 'batch'"),
        ("train_data_dir=nowhere", "nowhere"),
    ],
    ids=lambda value: value if "=" in str(value) and " " not in str(value) else "",
)
def test_wrong_input_is_one_line(
    wrong: str, message: str, tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    options = [option for option in tiny_options if option.split("=")[0] not in (wrong.split("=")[0], "cache_dir")]
    with pytest.raises(InputError, match=message) as caught:
        cache_latents.main([*options, wrong, f"cache_dir={tmp_path / 'cache'}"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
