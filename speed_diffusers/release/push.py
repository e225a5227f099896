"""The way of a release to the Hub: by hand, or at the end of a training, which it never fails."""

import logging
import os
import shlex
from pathlib import Path

from ..files import remove
from ..hub import Destination, check_destination, upload
from ..training.run import TrainingRun
from ..training.run_folder import RELEASE_FOLDER
from .folder import make_release
from .licences import Licences

logger = logging.getLogger(__name__)


def push(folder: Path, destination: Destination) -> str:
    """Uploads a release; its files and their address are those of `make_release` and `upload`.

    Raises:
        InputError: The Hub refuses it.
        ConnectionError: Server or network are in trouble.
    """
    return upload(folder, destination, message="Release of speed_diffusers")


def push_after_training(run: TrainingRun) -> None:
    """Releases what a run has left, if its options say so; what fails is a warning with the command that repeats it.

    Args:
        run: A run whose results are saved; every process must call this.
    """
    config = run.config
    if not config.push_to_hub or config.hub_model_id is None:
        return
    run.ranks.at(config.max_train_steps, "push to the Hub")
    if run.accelerator.is_main_process:
        folder = run.output_dir / f".tmp-{RELEASE_FOLDER}-{os.getpid()}"
        destination = Destination(config.hub_model_id, config.hub_private_repo, config.hub_revision)
        try:
            destination = check_destination(destination)
            licences = Licences(weights=config.hub_license)
            make_release(str(run.output_dir), folder, destination.repo_id, licences, branch=destination.revision)
            print(f"Pushed to the Hub: {push(folder, destination)}")
        except Exception as error:  # the training is done and saved, whatever this is
            logger.warning("Not pushed to the Hub: %s Once that is mended: %s", error, _command(run, destination))
        finally:
            remove(folder)
    run.ranks.meet()


def _command(run: TrainingRun, destination: Destination) -> str:
    """The command that pushes a run again."""
    words = [f"model={run.output_dir}", f"hub_model_id={destination.repo_id}"]
    if destination.private is not None:
        words.append(f"private={str(destination.private).lower()}")
    if destination.revision != "main":
        words.append(f"revision={destination.revision}")
    if run.config.hub_license is not None:
        words.append(f"license={run.config.hub_license}")
    return shlex.join(["python", "train_scripts/push_to_hub.py", *words])
