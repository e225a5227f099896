"""Trainers in processes of their own, forked from one that has imported everything: to be joined, killed and stalled.

Run as a script it is that process: it reads orders, a line of JSON each, and forks. To import torch and diffusers
takes ten seconds; a fork takes none.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from free_port import free_port

TESTS = Path(__file__).resolve().parent
LONGEST = 240.0
"""Seconds after which a trainer counts as hung, on a machine that has other things to do."""


@dataclass
class Trainer:
    """A trainer's process.

    Attributes:
        pid: Its number.
        output: What it prints.
    """

    pid: int
    output: Path
    forker: "Forker"

    def wait(self, seconds: float = LONGEST) -> int | None:
        """Its exit code, negative for a signal; None if it still runs after some seconds."""
        code: int | None = self.forker.ask(wait=self.pid, seconds=seconds)
        return code

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def text(self) -> str:
        return self.output.read_text(errors="replace")


class Forker:
    """Starts trainers.

    Args:
        environment: Of all of them, besides that of this process.
        imports: Modules to import before all forks, besides what every trainer needs.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, imports: Sequence[str] = ()) -> None:
        own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.environment = os.environ | own | dict(environment or {})
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
        )

    def ask(self, **order: Any) -> Any:
        """Gives an order and returns the answer."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        folder: Path,
        options: Sequence[str],
        *,
        changes: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        name: str = "output",
        script: str = "train_dit_speed",
    ) -> Trainer:
        """Starts a trainer.

        Args:
            folder: Where what it prints goes.
            options: Its command line.
            changes: Functions of `trainer_changes` to call first, each "name" or "name:argument".
            environment: Of this one.
            name: Of the file that takes what it prints.
            script: Of train_scripts.
        """
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / f"{name}.txt"
        pid = self.ask(
            start=list(map(str, options)),
            output=str(output),
            changes=list(changes),
            script=script,
            environment=dict(environment or {}),
        )
        return Trainer(pid, output, self)

    def start_ranks(
        self,
        folder: Path,
        options: Sequence[str],
        *,
        size: int = 2,
        changes: Sequence[str] = (),
        script: str = "train_dit_speed",
    ) -> list[Trainer]:
        """Starts the processes of one run, as torchrun does."""
        shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            self.start(
                folder,
                options,
                changes=changes,
                environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                name=f"rank-{rank}",
                script=script,
            )
            for rank in range(size)
        ]

    def run(
        self,
        folder: Path,
        options: Sequence[str],
        *,
        size: int = 1,
        changes: Sequence[str] = (),
        script: str = "train_dit_speed",
    ) -> str:
        """Starts the processes of one run, waits for their good end, and returns what the first printed."""
        if size == 1:
            trainers = [self.start(folder, options, changes=changes, script=script)]
        else:
            trainers = self.start_ranks(folder, options, size=size, changes=changes, script=script)
        codes = [trainer.wait() for trainer in trainers]
        said = "\n".join(trainer.text()[-3000:] for trainer in trainers)
        self.end(trainers)
        assert codes == [0] * size, f"{codes}\n{said}"
        return trainers[0].text()

    def end(self, trainers: Sequence[Trainer]) -> None:
        """Kills those that still run."""
        for trainer in trainers:
            if trainer.wait(0) is None:
                trainer.send(signal.SIGKILL)
                trainer.wait()

    def close(self) -> None:
        """Ends the process that forks."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(60)


@contextlib.contextmanager
def forking(environment: Mapping[str, str] | None = None, imports: Sequence[str] = ()) -> Iterator[Forker]:
    """A `Forker` that is closed at the end."""
    forker = Forker(environment, imports)
    try:
        yield forker
    finally:
        forker.close()


def run_options(tiny_options: Sequence[str], folder: Path, *options: str) -> list[str]:
    """The command line of a tiny run in a folder; options replace those of the run."""
    given = {"output_dir", *(option.split("=")[0] for option in options)}
    kept = [option for option in tiny_options if option.split("=")[0] not in given]
    return [*kept, f"output_dir={folder}", *options]


def serve() -> None:
    """Forks and waits as ordered, until there are no more orders."""
    import matplotlib.pyplot
    import torch
    import torch.utils.tensorboard
    from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

    import trainer_changes
    from speed_diffusers.config.command_line import run_script
    from speed_diffusers.train_scripts import train_dit_speed
    from speed_diffusers.training import results
    from tiny_pictures import save_dot

    # As in conftest.py's `tiny_options`.
    results.save_error_map = save_dot
    # Once for all forks, also what is imported late.
    assert train_dit_speed and matplotlib.pyplot and torch.utils.tensorboard
    assert AutoencoderKL and DiTPipeline and DiTTransformer2DModel
    for name in sys.argv[1:]:
        importlib.import_module(name)
    torch.set_num_threads(1)
    codes: dict[int, int] = {}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" not in order:
            pid = os.fork()
            if pid == 0:
                null, output = os.open(os.devnull, os.O_RDONLY), os.open(order["output"], os.O_WRONLY | os.O_CREAT)
                for number, descriptor in enumerate((null, output, output)):
                    os.dup2(descriptor, number)
                os.ftruncate(output, 0)
                os.environ.update(order["environment"])
                sys.argv = [f"{order['script']}.py", *order["start"]]
                script = importlib.import_module(f"speed_diffusers.train_scripts.{order['script']}")
                for change in order["changes"]:
                    name, _, argument = change.partition(":")
                    getattr(trainer_changes, name)(*([argument] if argument else []))
                run_script(script.main)
            answer: int | None = pid
        else:
            answer, deadline = codes.get(order["wait"]), time.monotonic() + order["seconds"]
            while answer is None:
                found, status = os.waitpid(order["wait"], os.WNOHANG)
                if found:
                    answer = codes[found] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    break
                else:
                    time.sleep(0.02)
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # to take torch down in good order takes seconds


if __name__ == "__main__":
    serve()
