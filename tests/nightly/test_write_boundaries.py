"""Every change that a run makes to a file is once its last: killed before it, or the disk full from then on.

Changes are seen where they reach the system (tests/nightly/file_faults.c), whoever makes them: Python, safetensors,
Arrow, TensorBoard's thread. They are those of the start, the latent cache, checkpoints and their pruning, metrics,
grids, the tracker and the export.
"""

import re
import shutil
import signal
from collections.abc import Callable

import pytest

import kills
from faulty_runs import FaultyRuns

pytestmark = [pytest.mark.nightly, pytest.mark.slow]

PARTS = 8
"""So that several test processes can share the work."""


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_that_is_killed_before_any_change_resumes_to_the_same_bits(
    faulty_runs: FaultyRuns, part: int, record_property: Callable[[str, object], None]
) -> None:
    fail_at_each(faulty_runs, part, record_property, full=False)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_disk_that_is_full_from_any_change_on_is_one_line_and_the_run_resumes_to_the_same_bits(
    faulty_runs: FaultyRuns, part: int, record_property: Callable[[str, object], None]
) -> None:
    fail_at_each(faulty_runs, part, record_property, full=True)


def fail_at_each(runs: FaultyRuns, part: int, record: Callable[[str, object], None], *, full: bool) -> None:
    """Fails at every `PARTS`-th place, resumes, and compares all that is left, bit by bit."""
    places = runs.places()[part::PARTS]
    record("places", len(places))
    wrong = []
    for number in places:
        what = f"{number}. {runs.changes[number - 1]}"
        folder = runs.place / f"{'full' if full else 'kill'}-{number}"
        code = runs.start(folder, number=number, full=full)
        said = (folder / "output.txt").read_text()
        errors = re.findall(r"error: .*", said)  # it may stand behind a progress bar
        if not full and code != -signal.SIGKILL:
            wrong.append(f"{what}: the end was not reached, but {code}")
        tracebacks = said.count("Traceback")
        if full and not (code == 0 or (code in (1, 2) and len(errors) == 1 and not tracebacks)):
            wrong.append(f"{what}: ends with {code} and says {said[-1500:]}")
        if full and errors and "space" not in errors[0].lower():
            wrong.append(f"{what}: does not say what is wrong: {errors[0]}")
        again = runs.start(folder, "resume_from_checkpoint=latest")
        if again != 0:
            wrong.append(f"{what}: does not resume: {(folder / 'output.txt').read_text()[-1500:]}")
        elif found := kills.differences(runs.whole / "run", folder / "run"):
            wrong.append(f"{what}: {found}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
