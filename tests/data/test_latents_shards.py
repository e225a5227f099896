"""Shards of the latent cache: the same whoever encodes them, killed or not, and each verified by itself."""

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from filelock import FileLock
from safetensors.torch import load_file

from speed_diffusers import locks
from speed_diffusers.data import latents as latents_module
from speed_diffusers.data import latents_encoding, latents_shard
from speed_diffusers.data.images import ImageSource, collate, from_dataset
from speed_diffusers.data.latents import LatentDataset
from speed_diffusers.data.latents_shard import CacheHeader, DamagedShard, rows_per_shard
from speed_diffusers.errors import InputError
from tiny_latents import COUNT, cache, count_encodings, shards_in, tiny_dataset, tiny_vae
from tiny_run import file_size_limit

FORK = multiprocessing.get_context("fork")
"""Starts in milliseconds where torch's import takes seconds."""

START = FORK.Barrier(3)
"""Three processes that share the work meet at the first image of each."""

SHARDS = [f"shard-{index:05d}.safetensors" for index in range(5)]
BYTES_OF_A_SHARD = 8 * (2 * 256 + 16)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 8 rows, five for the 40 images; batches of 3 do not fit into them."""
    monkeypatch.setattr(latents_shard, "MIN_SHARD_ROWS", 8)
    monkeypatch.setattr(latents_encoding, "SECONDS_BETWEEN_LOOKS", 0.01)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_vae()


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return from_dataset(tiny_dataset())


@pytest.fixture
def make(source: ImageSource, vae: AutoencoderKL, tmp_path: Path) -> Callable[..., LatentDataset]:
    """Makes, or finds, the cache in a folder: `make(name, **options)`."""

    def made(name: str = "cache", **options: object) -> LatentDataset:
        return cache(source, vae, tmp_path / name, batch_size=3, **options)

    return made


@pytest.fixture
def whole(make: Callable[..., LatentDataset]) -> dict[str, bytes]:
    """The bytes of the shards of a run that one process made without a stop."""
    return contents(make("whole").folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Of the files of shards, which change when these are written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")}


def test_shards_are_plain_safetensors_with_all_rows_in_order(make: Callable[..., LatentDataset]) -> None:
    latents = make()
    rows = latents.__getitems__(list(range(COUNT)))
    shards = [load_file(latents.folder / name) for name in SHARDS]
    assert sorted(shards[0]) == ["labels", "moments", "moments_flipped", "row_crc32"]
    for name, values in rows.items():
        assert torch.equal(torch.cat([shard[name] for shard in shards]), values)
    header = json.loads((latents.folder / "header.json").read_text())
    assert header["num_rows"] == COUNT and header["rows_per_shard"] == 8 and header["resolution"] == 16
    assert torch.equal(LatentDataset(latents.folder).__getitems__([39, 0])["moments"], rows["moments"][[39, 0]])
    with pytest.raises(IndexError, match="Row 40 of 40"):
        latents.__getitems__([40])
    with pytest.raises(InputError, match=r"holds no latent cache: there is no header\.json"):
        LatentDataset(latents.folder.parent)


@pytest.mark.parametrize(
    ("rows", "row_bytes", "expected"),
    [(1, 512, 256), (9_000, 512, 256), (1_281_167, 2**14, 4096), (1_281_167, 2**17, 2048), (10**6, 256, 2048)],
)
def test_shards_are_few_and_fit_in_memory(
    rows: int, row_bytes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_shard, "MIN_SHARD_ROWS", 256)
    assert rows_per_shard(rows, row_bytes) == expected


def encoded_by(process: int, processes: int, cache_dir: Path, counts: "multiprocessing.Queue[int]") -> None:
    """What one of several processes does; puts how many images it encoded."""
    vae = tiny_vae()
    calls = count_encodings(vae)

    def meet(*call: object) -> None:
        if processes > 1 and len(calls) == 1:
            START.wait(60)

    vae.encoder.register_forward_hook(meet)
    cache(from_dataset(tiny_dataset()), vae, cache_dir, batch_size=3, rank=process, num_processes=processes)
    counts.put(sum(calls) // 2)


def test_processes_share_the_work_and_leave_the_bytes_of_one(whole: dict[str, bytes], tmp_path: Path) -> None:
    counts = FORK.Queue()
    ranks = [FORK.Process(target=encoded_by, args=(rank, 3, tmp_path / "cache", counts)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    encoded = [counts.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert sum(encoded) == COUNT and min(encoded) > 0
    (header,) = (tmp_path / "cache").rglob("header.json")
    assert contents(header.parent) == whole
    assert shards_in(tmp_path / "cache") == SHARDS


def dies_writing(position: int, cache_dir: Path, shards: int) -> None:
    """Encodes so many shards, and is killed by the system at a byte of the next."""
    written = latents_encoding.write_shard
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def write(folder: Path, header: CacheHeader, index: int, *content: object) -> None:
        if len(list(folder.glob("*.safetensors"))) == shards:
            resource.setrlimit(resource.RLIMIT_FSIZE, (position, resource.RLIM_INFINITY))
        written(folder, header, index, *content)  # type: ignore[arg-type]

    latents_encoding.write_shard = write
    cache(from_dataset(tiny_dataset()), tiny_vae(), cache_dir, batch_size=3)


def test_killed_at_any_byte_of_a_shard_it_goes_on_with_the_next(
    make: Callable[..., LatentDataset], whole: dict[str, bytes], tmp_path: Path
) -> None:
    sizes = np.random.default_rng(0).integers(1, BYTES_OF_A_SHARD, 4).tolist()
    for position in (0, 1, *sizes, BYTES_OF_A_SHARD - 1):
        name = f"killed-at-{position}"
        run = FORK.Process(target=dies_writing, args=(position, tmp_path / name, 2))
        run.start()
        run.join(60)
        assert run.exitcode == -signal.SIGXFSZ
        (folder,) = (tmp_path / name).rglob("header.json")
        assert list(contents(folder.parent)) == SHARDS[:2], "nothing half-written has a shard's name"
        before = identities(folder.parent)
        # Another number of processes goes on.
        latents = make(name, rank=1, num_processes=4)
        assert contents(latents.folder) == whole
        assert identities(latents.folder).items() > before.items(), "finished shards were not encoded again"
        assert shards_in(tmp_path / name) == SHARDS, "leftovers are gone"


def test_kills_at_random_moments_lose_nothing(
    make: Callable[..., LatentDataset], whole: dict[str, bytes], tmp_path: Path
) -> None:
    counts = FORK.Queue()
    generator = np.random.default_rng(0)
    for _ in range(4):
        run = FORK.Process(target=encoded_by, args=(0, 1, tmp_path / "cache", counts))
        run.start()
        time.sleep(generator.uniform(0.02, 0.25))
        os.kill(run.pid or 0, signal.SIGKILL)
        run.join()
    latents = make()
    assert contents(latents.folder) == whole
    assert shards_in(tmp_path / "cache") == SHARDS


def test_locks_left_beside_whole_shards_are_removed_unless_held(make: Callable[..., LatentDataset]) -> None:
    folder = make().folder
    for name in ("shard-00000.lock", "shard-00000.holder", "shard-00001.lock", "shard-00002.holder"):
        (folder / name).write_text("process 7 on node3")
    with FileLock(folder / "shard-00001.lock"):
        make()
        assert shards_in(folder) == sorted([*SHARDS, "shard-00001.lock"])
    make()
    assert shards_in(folder) == SHARDS


def cut(content: bytearray, length: float) -> None:
    del content[int(length * len(content)) :]


def flip(content: bytearray, position: int) -> None:
    content[position] ^= 1


UNEQUAL = "its header does not match its checksum"
DAMAGES: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "empty": (lambda content: cut(content, 0), "the file ends too early"),
    "cut in the header": (lambda content: cut(content, 0.01), "it is not a safetensors file"),
    "cut in the middle": (lambda content: cut(content, 0.5), "it has [0-9,]+ bytes and should have [0-9,]+"),
    "cut at the end": (lambda content: cut(content, 0.999), "it has [0-9,]+ bytes and should have [0-9,]+"),
    "longer": (lambda content: content.extend(b"x"), "it has [0-9,]+ bytes and should have [0-9,]+"),
    "length": (lambda content: flip(content, 5), "it is not a safetensors file"),
    "name": (lambda content: flip(content, content.index(b"moments_flipped")), "its header is damaged"),
    "position": (lambda content: flip(content, content.index(b"data_offsets") + 16), "its header is damaged"),
    "checksum": (
        lambda content: flip(content, content.index(b"crc32") + 11),
        "its header does not match its checksum",
    ),
    "list of bad images": (lambda content: flip(content, content.index(b"bad_images")), "its header is damaged"),
    "label": (lambda content: flip(content, label_at(content)), UNEQUAL),
    "row": (lambda content: flip(content, content.index(b"}}") + 2000), r"row \d+ does not match its checksum"),
    "another cache's": (
        lambda content: content.__setitem__(slice(None), bytes(content).replace(b'n\\": 16', b'n\\": 48')),
        r"it is of another cache \(resolution is 48, not 16\)",
    ),
}


def label_at(content: bytearray) -> int:
    """Where the labels of the second shard stand."""
    return content.index(np.arange(8, 16).__mod__(3).astype(np.int64).tobytes())


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_is_named_and_alone_encoded_again(
    damage: str,
    make: Callable[..., LatentDataset],
    whole: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    latents = make()
    before = identities(latents.folder)
    change, reason = DAMAGES[damage]
    content = bytearray(whole[SHARDS[1]])
    change(content)
    assert content != whole[SHARDS[1]]
    (latents.folder / SHARDS[1]).write_bytes(content)
    assert contents(make().folder) == whole
    (line,) = caplog.messages
    named = rf"'{latents.folder / SHARDS[1]}' of the latent cache \(rows 8 to 15\)"
    assert re.fullmatch(rf"{named}: {reason}\. It alone is encoded again\.", line)
    after = identities(latents.folder)
    assert {name for name in SHARDS if before[name] != after[name]} == {SHARDS[1]}


def test_missing_shard_and_header_alone_are_made_again(
    make: Callable[..., LatentDataset], whole: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    latents = make()
    before = identities(latents.folder)
    (latents.folder / SHARDS[3]).unlink()
    (latents.folder / "header.json").write_text('{"images": "others"')
    assert contents(make().folder) == whole
    assert identities(latents.folder).items() > {name: before[name] for name in SHARDS if name != SHARDS[3]}.items()
    assert caplog.messages == [f"'{latents.folder / 'header.json'}' is damaged; writing it again."]
    (latents.folder / "header.json").rename(latents.folder / ".tmp-header.json-7")
    assert contents(make().folder) == whole
    assert shards_in(latents.folder) == SHARDS, "what a killed process left is gone"


def test_header_of_other_latents_is_said_in_one_line(
    make: Callable[..., LatentDataset], whole: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    latents = make()
    file = latents.folder / "header.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vae": "ab", "center_crop": False}))
    (latents.folder / SHARDS[0]).unlink()
    assert contents(make().folder) == whole
    (line,) = caplog.messages
    ours = latents.header.vae
    assert line == f"'{file}' is of other latents (vae is ab, not {ours}; center_crop is False, not True); " + (
        "writing it again."
    )


def test_large_cache_is_verified_row_by_row_as_it_is_read(
    make: Callable[..., LatentDataset],
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(latents_module, "VERIFIED_AT_ONCE", 0)
    latents = make()
    moments = latents.__getitems__(list(range(COUNT)))["moments"]
    content = bytearray(whole[SHARDS[1]])
    content[content.index(b"}}") + 2000] ^= 1
    (latents.folder / SHARDS[1]).write_bytes(content)
    latents = make()
    assert not caplog.messages, "only headers were looked at"
    with pytest.raises(DamagedShard, match=r"shard-00001.*rows 8 to 15.*: row \d+ does not match .* Start again"):
        latents.__getitems__(list(range(COUNT)))
    assert not (latents.folder / SHARDS[1]).exists()
    assert contents(make().folder) == whole
    # The reader still has the damaged file open, and finds the new one.
    assert torch.equal(latents.__getitems__(list(range(COUNT)))["moments"], moments)
    assert contents(latents.folder) == whole
    # The command for it reads every byte, however large the cache.
    (latents.folder / SHARDS[1]).write_bytes(content)
    assert contents(make(verify=True).folder) == whole
    assert len(caplog.messages) == 1


def test_disk_that_fails_is_named_and_costs_no_shard(
    make: Callable[..., LatentDataset], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = make()
    latents.__getitems__([0])

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match=f"Input/output error: '{latents.folder / SHARDS[0]}'"):
            latents.__getitems__([1])
        with pytest.raises(InputError, match=r"Cannot keep latents in .*: .*Input/output error: '.*shard-0000"):
            make()
    assert contents(make().folder) == whole


@pytest.mark.parametrize("positioned", [True, False])
def test_forked_and_threaded_readers_do_not_disturb_one_another(
    positioned: bool, make: Callable[..., LatentDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with one shard open at a time; and, without forks, as on Windows."""
    monkeypatch.setattr(latents_module, "MAX_SHARDS", 1)
    monkeypatch.setattr(latents_shard, "HAS_PREADV", positioned)
    latents = make()
    everything = latents.__getitems__(list(range(COUNT)))
    order = [np.random.default_rng(seed).permutation(COUNT).tolist() for seed in range(12)]
    if positioned:
        loader = torch.utils.data.DataLoader(
            latents, batch_sampler=order, collate_fn=collate, num_workers=2, multiprocessing_context="fork"
        )
        batches = list(loader)
    else:
        batches = [latents.__getitems__(rows) for rows in order]
    for rows, batch in zip(order, batches, strict=True):
        for name, values in batch.items():
            assert torch.equal(values, everything[name][rows])


def test_disk_that_fills_up_in_the_middle_is_one_line_and_leaves_whole_shards(
    make: Callable[..., LatentDataset], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = latents_encoding.write_shard

    def write(folder: Path, header: CacheHeader, index: int, *content: object) -> None:
        if index == 2:
            with file_size_limit(BYTES_OF_A_SHARD // 2):
                written(folder, header, index, *content)  # type: ignore[arg-type]
        written(folder, header, index, *content)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(latents_encoding, "write_shard", write)
        with pytest.raises(InputError, match=r"Cannot keep latents in .*: .*Could not write .*shard-00002") as caught:
            make()
    assert f"({BYTES_OF_A_SHARD:,} bytes needed, " in str(caught.value) and " free)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [name for name in shards_in(tmp_path / "cache") if name.startswith("shard")][:2] == SHARDS[:2]
    assert not [name for name in shards_in(tmp_path / "cache") if "tmp" in name]
    before = {file.name: file.stat().st_ino for file in (tmp_path / "cache").rglob("*.safetensors")}
    latents = make()
    assert contents(latents.folder) == whole
    assert {name: (latents.folder / name).stat().st_ino for name in before} == before


def test_shard_of_a_process_that_hangs_is_encoded_here_too(
    make: Callable[..., LatentDataset],
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    latents = make()
    (latents.folder / SHARDS[4]).unlink()
    (latents.folder / "shard-00004.holder").write_text("process 7 on node3")
    monkeypatch.setattr(latents_encoding, "SECONDS_BEFORE_TELLING", 0.1)
    monkeypatch.setattr(latents_encoding, "SECONDS_TO_WAIT", 0.3)
    with FileLock(latents.folder / "shard-00004.lock"):
        assert contents(make().folder) == whole
    assert caplog.messages == [
        "Waiting for 'shard-00004.safetensors', which process 7 on node3 encodes.",
        "'shard-00004.safetensors' does not come from process 7 on node3; encoding it here too.",
    ]


def test_where_no_locks_are_the_shards_are_the_same(
    make: Callable[..., LatentDataset], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoLock:
        def __init__(self, file: Path) -> None:
            pass

        def acquire(self, timeout: float) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        def release(self) -> None:
            pass

    monkeypatch.setattr(locks, "FileLock", NoLock)
    with ThreadPoolExecutor(2) as runs:
        for latents in runs.map(lambda rank: make(rank=rank, num_processes=2), range(2)):
            assert contents(latents.folder) == whole


def test_progress_counts_the_rows_of_all_processes(
    source: ImageSource, vae: AutoencoderKL, make: Callable[..., LatentDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make().folder
    for name in SHARDS[:3]:
        shutil.move(folder / name, folder / f"kept-{name}")
    capsys.readouterr()

    def other(module: object, inputs: object, output: object) -> None:
        # Another process finishes two shards while this one is at its first.
        for name in SHARDS[1:3]:
            (folder / f"kept-{name}").replace(folder / name) if (folder / f"kept-{name}").exists() else None

    hook = vae.encoder.register_forward_hook(other)
    try:
        make()
    finally:
        hook.remove()
    shown = capsys.readouterr().err
    assert "Caching latents:  40%" in shown and "16/40" in shown, "the two shards that are there"
    assert "40/40" in shown and "image/s" in shown
    (folder / SHARDS[0]).unlink()
    told: list[None] = []
    make(rank=1, num_processes=2, on_progress=lambda: told.append(None))
    assert told
    assert "Caching" not in capsys.readouterr().err, "only process 0 shows it"
