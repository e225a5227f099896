"""`open_images` with a Hub id, against a server on this machine that plays the Hub."""

import hashlib
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import datasets
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "a" * 40
SHARD = "data/train-00000-of-00001.parquet"
JSON = {"Content-Type": "application/json"}


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub as `load_dataset` asks for: one good set, gated ones, and nothing else."""

    parquet = b""
    ranges: ClassVar[list[tuple[int, int]]] = []
    """Of the file, as they were asked for; the second is refused once."""

    def log_message(self, *args: object) -> None:
        """Keeps the test's output clean."""

    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers for the requested path."""
        path = self.path.split("?")[0]
        if "gated" in path or "imagenet-1k" in path:
            # Without a log-in the Hub says 401, with one that has not accepted the terms 403.
            return 403 if "gated-403" in path else 401, b"", {"X-Error-Code": "GatedRepo"}
        if "broken" in path:
            return 500, b"", {}
        if "team/good" not in path:
            return 404 if "missing" in path else 401, b"", {"X-Error-Code": "RepoNotFound"}
        shard = {"type": "file", "oid": "b" * 40, "size": len(self.parquet), "path": SHARD}
        if path.endswith("no-such-revision") or "/no-such-revision/" in path:
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        if path in ("/api/datasets/team/good", f"/api/datasets/team/good/revision/{COMMIT}"):
            info = {"id": "team/good", "sha": COMMIT, "siblings": [{"rfilename": SHARD}]}
            return 200, json.dumps(info).encode(), JSON
        if path == f"/api/datasets/team/good/tree/{COMMIT}":
            return 200, json.dumps([{"type": "directory", "oid": "c" * 40, "size": 0, "path": "data"}]).encode(), JSON
        if path == f"/api/datasets/team/good/tree/{COMMIT}/data":
            return 200, json.dumps([shard]).encode(), JSON
        if path == f"/datasets/team/good/resolve/{COMMIT}/{SHARD}":
            etag = {"ETag": hashlib.sha256(self.parquet).hexdigest(), "X-Repo-Commit": COMMIT}
            if (asked := self.headers.get("Range")) is None:
                return 200, self.parquet, etag
            begin, end = map(int, asked.removeprefix("bytes=").split("-"))
            self.ranges.append((begin, end))
            if len(self.ranges) == 2:
                return 503, b"", {}
            return 206, self.parquet[begin : end + 1], etag
        return 404, b"", {"X-Error-Code": "EntryNotFound"}

    def do_GET(self) -> None:
        status, body, headers = self.answer()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


HUB_CASES: dict[str, dict[str, str]] = {
    "streamed": {"dataset_name": "team/good"},
    "streamed split": {"dataset_name": "team/good", "split": "tset"},
    "streamed gated": {"dataset_name": "team/gated"},
    "streamed missing": {"dataset_name": "team/missing"},
    "good": {"dataset_name": "team/good"},
    "gated": {"dataset_name": "team/gated"},
    "gated-403": {"dataset_name": "team/gated-403"},
    "imagenet": {"dataset_name": "imagenet-1k"},
    "missing": {"dataset_name": "team/missing"},
    "private": {"dataset_name": "team/private"},
    "broken": {"dataset_name": "team/broken"},
    "malformed": {"dataset_name": "bad id!"},
    "split": {"dataset_name": "team/good", "split": "tset"},
    "config": {"dataset_name": "team/good", "dataset_config_name": "big"},
    "revision": {"dataset_name": "team/good", "revision": "no-such-revision"},
    "unreachable": {"dataset_name": "team/other"},
    "streamed unreachable": {"dataset_name": "team/other"},
    "streamed before": {},
    "good from the cache": {"dataset_name": "team/good"},
}

# The endpoint is read when huggingface_hub is imported, so all cases run in one process of their own. Before
# "unreachable" it waits until the server is gone; the client's pauses between its retries are skipped.
HUB_CLIENT = """
    import json, sys, time
    import numpy
    from speed_diffusers.data import streaming_reader
    from speed_diffusers.data.batch_sampler import BatchLayout
    from speed_diffusers.data.images import open_images
    from speed_diffusers.data.streaming import open_stream
    from speed_diffusers.data.streaming_order import StreamOrder
    time.sleep = lambda seconds: None
    streaming_reader.PAUSES = (0.0,)
    before = None
    for case, arguments in json.loads(sys.argv[1]).items():
        if case == "unreachable":
            print(json.dumps("stop"), flush=True)
            sys.stdin.readline()
        try:
            source = before
            if arguments:
                source = (open_stream if case.startswith("streamed") else open_images)(**arguments)
            if case.startswith("streamed"):
                rows = numpy.diff(source.starts)
                order = StreamOrder(rows, BatchLayout(4), shuffle_buffer_size=9, seed=0, first_step=1, max_steps=3)
                batches = list(streaming_reader.StreamReader(source, order))
                assert [[image.row for image in images] for images in batches] == list(order)
                before = source
            answer = [source.label_names, source.labels_of(range(2)).tolist(), int(source.load(1, 8).sum())]
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps([case, answer]), flush=True)
"""


def small_parquet() -> bytes:
    """Two grey images of two named classes, as a parquet file."""
    rows = []
    for grey in (0, 9):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    parquet = io.BytesIO()
    datasets.Dataset.from_dict({"image": rows, "label": [1, 0]}, features=features).to_parquet(parquet)
    return parquet.getvalue()


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What `open_images` does for each of HUB_CASES: [names, labels, sum of image 1], or the error's text."""
    handler = type("Handler", (FakeHub,), {"parquet": small_parquet()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", textwrap.dedent(HUB_CLIENT), json.dumps(HUB_CASES)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as client:
        assert client.stdout is not None and client.stdin is not None and client.stderr is not None
        threading.Thread(target=client.stderr.read, daemon=True).start()
        answers = {}
        for line in client.stdout:
            message = json.loads(line)
            if message == "stop":
                server.shutdown()
                server.server_close()
                client.stdin.write("\n")
                client.stdin.flush()
            else:
                answers[message[0]] = message[1]
    assert set(answers) == set(HUB_CASES)
    return answers


def test_hub_set_is_loaded_and_then_found_in_the_cache(hub_answers: dict[str, object]) -> None:
    expected = [["cat", "dog"], [1, 0], 9 * 8 * 8 * 3]
    assert hub_answers["good"] == expected
    assert hub_answers["good from the cache"] == expected


def test_hub_set_is_streamed_by_ranges_over_a_fault_of_the_server(hub_answers: dict[str, object]) -> None:
    assert hub_answers["streamed"] == hub_answers["good"]
    assert len(FakeHub.ranges) > 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("streamed gated", "team/gated is gated: accept its terms at https://huggingface.co/datasets/team/gated and"),
        ("streamed missing", "There is no data set 'team/missing' on the Hub"),
        ("streamed split", "Unknown split 'tset'. Allowed: train."),
        (
            "streamed unreachable",
            "Cannot reach the Hub for 'team/other', and it is not in the cache. Check the network",
        ),
        ("streamed before", f"Cannot read 'hf://datasets/team/good@{COMMIT}/{SHARD}': "),
        (
            "imagenet",
            "imagenet-1k is gated: accept its terms at https://huggingface.co/datasets/ILSVRC/imagenet-1k and log in "
            "with `hf auth login`.",
        ),
        ("gated", "team/gated is gated: accept its terms at https://huggingface.co/datasets/team/gated and"),
        ("gated-403", "team/gated-403 is gated: accept its terms at"),
        ("missing", "There is no data set 'team/missing' on the Hub"),
        ("private", "There is no data set 'team/private' on the Hub, or it is private and you are not logged in"),
        ("malformed", "There is no data set 'bad id!' on the Hub"),
        ("broken", "Cannot load 'team/broken': the Hub answered with status 500. Try again later."),
        ("split", "Cannot load 'team/good' from the Hub: Unknown split \"tset\". Should be one of ['train']."),
        ("config", "Cannot load 'team/good' from the Hub: BuilderConfig 'big' not found. Available: ['default']"),
        ("revision", "Revision 'no-such-revision' doesn't exist for dataset 'team/good' on the Hub."),
        ("unreachable", "Cannot reach the Hub for 'team/other', and it is not in the cache. Check the network"),
    ],
)
def test_hub_failures_are_one_line(hub_answers: dict[str, object], case: str, message: str) -> None:
    answer = hub_answers[case]
    assert isinstance(answer, str)
    assert answer.startswith(f"InputError: {message}")
    assert "\n" not in answer
