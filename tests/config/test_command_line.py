"""What scripts do with help, wrong input and interruptions, alone and under a launcher."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from speed_diffusers.config import command_line
from speed_diffusers.errors import InputError

PACKAGE = Path(command_line.__file__).parents[1]

# A script whose one argument says how it ends. The package's `__init__` is stepped around because importing torch
# takes longer than all the rest.
SCRIPT = f'''
"""A toy."""
import signal, sys, types
from dataclasses import dataclass

package = types.ModuleType("speed_diffusers")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["speed_diffusers"] = package

from speed_diffusers.config.command_line import run_script
from speed_diffusers.errors import InputError

@dataclass
class Settings:
    steps: int = 3

def main(argv):
    signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", file=sys.stderr))
    print("torch" in sys.modules, flush=True)
    if argv == ["steps=0"]:
        raise InputError("steps: 0 is\\nbelow 1")
    if argv == ["steps=1"]:
        raise ZeroDivisionError("a bug")
    if argv == ["steps=2"]:
        print("na\\u00efve \\u2192", flush=True)
        print("warning: \\u2192", file=sys.stderr)
    if argv == ["steps=9"]:
        for number in range(20000):
            print(number)
        print("all printed", file=sys.stderr)

run_script(main, __doc__, Settings)
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "toy.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, whatever runs the tests."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, *argv: str, **environment: str) -> int:
    """The exit code of a script whose `main` ends with `error`, run in this process."""

    def main(given: list[str]) -> None:
        assert given == list(argv)
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["toy.py", *argv])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        command_line.run_script(main, "A toy.", Settings)
    return int(caught.value.code)


@dataclass
class Settings:
    steps: int = field(default=3, metadata={"help": "How many."})


def test_wrong_input_is_one_line_and_exit_code_2(script):
    result = run([sys.executable, str(script), "steps=0"])
    assert (result.returncode, result.stderr) == (2, "error: steps: 0 is below 1\n")
    assert result.stdout == "False\n"


def test_other_errors_keep_their_traceback(script):
    result = run([sys.executable, str(script), "steps=1"])
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback") and result.stderr.endswith("ZeroDivisionError: a bug\n")


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_what_a_terminal_cannot_encode_is_escaped(script, flags):
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = run([sys.executable, *flags, str(script), "steps=2"], **environment)
    assert (result.returncode, result.stdout) == (0, "False\nna\\xefve \\u2192\n")
    assert result.stderr == "warning: \\u2192\n"


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_reader_who_leaves_does_not_end_the_script(script, flags):
    command = [sys.executable, *flags, str(script), "steps=9"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "False\n"
        process.stdout.close()
        assert process.stderr.read() == "all printed\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "run"), "error: OSError: [Errno 28] No space left on device: 'run'\n"),
        (FloatingPointError("the gradients\nof step 3"), "error: FloatingPointError: the gradients of step 3\n"),
    ],
)
def test_a_full_disk_and_a_diverged_run_are_one_line_and_exit_code_1(monkeypatch, capsys, error, line):
    assert ending(monkeypatch, error) == 1
    assert capsys.readouterr().err == line


def test_success_exits_with_0(monkeypatch, capsys):
    assert ending(monkeypatch, None, "steps=3") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"], ["steps=5", "--help"]])
def test_help_is_printed_instead_of_running(monkeypatch, capsys, argv):
    assert ending(monkeypatch, AssertionError("was run"), *argv) == 0
    output = capsys.readouterr()
    assert output.out.startswith("A toy.\n\nSettings: key=value")
    assert "  steps: a whole number, default 3\n      How many.\n" in output.out
    assert output.err == ""


def test_help_of_a_script_without_settings_is_its_docstring(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        command_line.run_script(lambda argv: None, "\nA toy.\n")
    assert (caught.value.code, capsys.readouterr().out) == (0, "A toy.\n")


def test_help_is_printed_by_one_rank(monkeypatch, capsys):
    assert ending(monkeypatch, None, "--help", RANK="1", WORLD_SIZE="2") == 0
    assert capsys.readouterr().out == ""


def test_an_interruption_is_one_line_and_exit_code_130(monkeypatch, capsys):
    assert ending(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert ending(monkeypatch, KeyboardInterrupt(), RANK="1", WORLD_SIZE="2") == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environment", "waits"),
    [
        ({}, []),
        ({"RANK": "0", "LOCAL_RANK": "0"}, []),
        ({"RANK": "1"}, []),  # alone, whatever its number
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, [command_line.SECONDS_FOR_RANK_0 + 1]),
        ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, [command_line.SECONDS_FOR_RANK_0]),
        ({"LOCAL_RANK": "2"}, [command_line.SECONDS_FOR_RANK_0 + 2]),
    ],
)
def test_other_ranks_leave_the_error_to_rank_0_for_a_while(monkeypatch, capsys, environment, waits):
    before = signal.getsignal(signal.SIGTERM)
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    try:
        assert ending(monkeypatch, InputError("steps: 0 is below 1"), **environment) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert slept == waits
    assert capsys.readouterr().err == "error: steps: 0 is below 1\n"


def test_torchrun_shows_the_line_once_and_reports_exit_code_2(script):
    # torchrun itself exits with 1 whatever its processes return, and adds a report, which has their codes.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run([*launcher, str(script), "steps=0"])
    assert result.stderr.splitlines().count("error: steps: 0 is below 1") == 1
    assert "asked to stop" not in result.stderr
    assert re.search(r"Root Cause.*rank +: 0 .*exitcode +: 2 ", result.stderr, flags=re.DOTALL)
    assert result.returncode == 1
