"""Releases a model on the Hugging Face Hub: a plain DiTPipeline, its model card, and nothing else.

Of a run, finished or not, or of a pipeline folder; with the token of HF_TOKEN or of `hf auth login`:

    python train_scripts/push_to_hub.py model=runs/quickstart hub_model_id=OWNER/NAME license=apache-2.0

To look at everything first, without asking the Hub for anything:

    python train_scripts/push_to_hub.py model=runs/quickstart hub_model_id=OWNER/NAME output_dir=release dry_run=true

The same command again goes on with an upload that was interrupted, and replaces an older release.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_writable
from speed_diffusers.hub import Destination, check_destination, check_name
from speed_diffusers.release import Licences, make_release, push


@dataclass(frozen=True)
class PushConfig(Options):
    """Options of `push_to_hub.py`."""

    model: str | None = option(None, "Run, finished or not, pipeline folder, Hub id, or 'embedded'.", path=True)
    hub_model_id: str | None = option(None, "Where to, OWNER/NAME; a NAME alone is one of yours.")
    private: bool | None = option(None, "Make the repository private; None: as the owner's default is.")
    revision: str = option("main", "Branch to push to; made if it is not there.")
    license: str | None = option(
        None, "Of the weights, as the Hub lists it (apache-2.0, mit, cc-by-nc-4.0, other, ...); None: not stated."
    )
    vae_license: str | None = option(None, "Of the autoencoder, in words; None: as far as it is known.")
    data_license: str | None = option(None, "Of the training images, in words; None: as far as it is known.")
    scores_dir: str | None = option(
        None, "Folder of scores for the card, besides those of the run (evaluate.py writes them).", path=True
    )
    num_images_per_class: int = option(
        4, "Images per class of the grid, where the run has left none; 0: no grid.", interval="[0, 1000]"
    )
    output_dir: str | None = option(None, "Keep the release in this new folder too.", path=True)
    dry_run: bool = option(False, "Make the release, and ask the Hub for nothing.")


def main(argv: list[str]) -> None:
    """Makes the release and uploads it.

    Raises:
        InputError: Wrong options, nothing to release, or the Hub refuses it.
        ConnectionError: Server or network are in trouble.
    """
    config = load_config(PushConfig, argv, Path(__file__).resolve().parent)
    if config.model is None or config.hub_model_id is None:
        raise InputError("model and hub_model_id are needed: model=RUN hub_model_id=OWNER/NAME.")
    if config.scores_dir is not None and not Path(config.scores_dir).is_dir():
        raise InputError(f"scores_dir={config.scores_dir}: there is no such folder.")
    destination = Destination(config.hub_model_id, config.private, config.revision)
    licences = Licences(config.license, config.vae_license, config.data_license)
    if config.dry_run:
        check_name(destination)
    else:
        destination = check_destination(destination)
    with release_folder(config.output_dir) as folder:
        release = make_release(
            config.model,
            folder,
            destination.repo_id,
            licences,
            branch=destination.revision,
            scores_dir=None if config.scores_dir is None else Path(config.scores_dir),
            num_images_per_class=config.num_images_per_class,
        )
        print(release.listing())
        if config.license is None and licences.of_weights(release.facts.record.base_model) is None:
            print("The card states no licence for the weights; license=... does.")
        if config.dry_run:
            print("Nothing was pushed (dry_run=true).")
        else:
            print(f"Pushed to the Hub: {push(folder, destination)}")


@contextmanager
def release_folder(output_dir: str | None) -> Iterator[Path]:
    """The folder that a release is made in: the one asked for, or one that is gone afterwards.

    Raises:
        InputError: There is something in it already, or it cannot be written.
    """
    if output_dir is not None:
        folder = Path(output_dir)
        check_writable("output_dir", folder)
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"output_dir={output_dir}: is not empty; give a new folder.")
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="speed_diffusers_release_") as place:
            yield Path(place) / "release"


if __name__ == "__main__":
    run_script(main, __doc__, PushConfig)
