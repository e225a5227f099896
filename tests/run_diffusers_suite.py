"""Runs diffusers' own tests of schedulers and of the DiT pipeline, as they are and with our classes in place.

    git clone https://github.com/huggingface/diffusers
    python tests/run_diffusers_suite.py path/to/diffusers

The checkout should be of the installed version. Needs what its tests import: `pip install parameterized requests_mock
transformers peft`, and whatever else they name. Prints the tests that fail with our classes only; the exit code is 1
if there is one that should not.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

OURS = "SPEED_DIFFUSERS_IN_PLACE"
HOSTS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "SASolverScheduler",
    "UnCLIPScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
"""Schedulers of diffusers that have a SpeeD class."""

FILES = (
    *(f"tests/schedulers/test_scheduler_{name}.py" for name in ("ddpm", "ddim", "ddpm_parallel", "ddim_parallel")),
    *(f"tests/schedulers/test_scheduler_{name}.py" for name in ("pndm", "lcm", "tcd", "sasolver", "unclip")),
    "tests/schedulers/test_schedulers.py",
    "tests/pipelines/dit/test_dit.py",
)


REASONS = {
    "test_trained_betas": "two betas for 1,000 timesteps: nothing can be trained with them, and SpeeD's tables say so",
    "SchedulerTest.test_timesteps": "one timestep: SpeeD needs two; UnCLIP's own add_noise divides by zero",
}
"""Tests that fail with our classes on purpose, by the end of their names."""


def put_in_place() -> None:
    """Makes diffusers give our classes under its own names, for the tests that import them from it."""
    import diffusers

    from speed_diffusers.pipelines import SpeeDDiTPipeline
    from speed_diffusers.schedulers import speed_scheduler_class

    for name in HOSTS:
        setattr(diffusers, name, speed_scheduler_class(getattr(diffusers, name)))
    diffusers.DiTPipeline = SpeeDDiTPipeline


# Loaded by pytest as a plugin of this name, before it collects.
if os.environ.get(OURS):
    put_in_place()


def outcomes(checkout: Path, files: list[str], *, ours: bool) -> dict[str, str]:
    """Each test's outcome: "passed", "skipped", or the first line of its failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-p", Path(__file__).stem, "-p", "no:cacheprovider", "-q", "--no-header", f"--junitxml={report}"]
        environment = {key: value for key, value in os.environ.items() if key not in (OURS, "PYTEST_ADDOPTS")}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
        environment |= {OURS: "1"} if ours else {}
        subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=checkout, env=environment, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.get('classname')}.{case.get('name')}": outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> str:
    """The outcome of a test in a JUnit report."""
    for kind in ("failure", "error"):
        if (found := case.find(kind)) is not None:
            return (found.get("message") or kind).splitlines()[0]
    return "passed" if case.find("skipped") is None else "skipped"


def main(argv: list[str]) -> int:
    """Runs the suite twice and compares."""
    checkout = Path(argv[0]) if len(argv) == 1 else None
    if checkout is None or not (checkout / FILES[0]).is_file():
        print(f"error: give the folder of a diffusers checkout, with {FILES[0]} in it", file=sys.stderr)
        return 2
    files = [name for name in FILES if (checkout / name).is_file()]
    stock, ours = (outcomes(checkout, files, ours=with_ours) for with_ours in (False, True))
    unrun = [name for name, result in stock.items() if "collection failure" in result]
    if unrun or not stock:
        print(
            f"error: diffusers' own tests cannot be collected here: {', '.join(unrun) or 'none found'}",
            file=sys.stderr,
        )
        return 2
    fails = [name for name, result in ours.items() if result not in ("passed", "skipped", stock.get(name))]
    meant = {name: why for name in fails for end, why in REASONS.items() if name.endswith(end)}
    passed = sum(result == "passed" for result in ours.values())
    print(
        f"{len(stock)} tests; with our classes {passed} pass, {len(fails)} fail that do not fail so with diffusers':"
    )
    for name in fails:
        print(f"  {name}: {meant.get(name, ours[name])} (diffusers': {stock.get(name)})")
    return 0 if set(fails) == set(meant) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
