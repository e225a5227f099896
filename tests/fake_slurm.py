"""SLURM's commands for the tests of `accelerate_configs/slurm.sh`: local processes, a list of what was asked for."""

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "accelerate_configs" / "slurm.sh"

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    pids+=($!)
done
trap 'again=yes; kill -USR1 "${pids[@]}"' USR1
trap 'again=yes; kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
    while again=; wait "$pid"; code=$?; [[ -n $again ]]; do :; done
    ((code > worst)) && worst=$code
done
exit "$worst"
"""

SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$(dirname "$0")/asked.txt"
if [[ $1 == show ]]; then echo localhost; fi
"""


class FakeSlurm:
    """A cluster of one machine with two processes.

    Args:
        folder: Where the commands are put.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        # No link: by another name an interpreter does not find the packages of its virtual environment.
        python = f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} "$@"\n'
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
            (folder / name).write_text(text)
            (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)

    def asked(self) -> list[str]:
        """What `scontrol` was asked for."""
        return (self.folder / "asked.txt").read_text().splitlines()

    def submit(self, *options: str, output: Path, **environment: str) -> subprocess.Popen[str]:
        """Starts the job, as SLURM does."""
        job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[1-1]", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
        path = os.pathsep.join([str(self.folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        with output.open("w") as file:
            return subprocess.Popen(
                ["bash", str(SCRIPT), *options],
                cwd=ROOT,
                env=os.environ | job | {"PATH": path} | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
