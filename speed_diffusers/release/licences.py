"""Licences of what a release is made of: weights, autoencoder and data."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..assets import EMBEDDED


@dataclass(frozen=True)
class Licence:
    """A licence that is known.

    Attributes:
        identifier: As the Hub lists it; "other" for one that it does not list.
        words: What to call it, and whose it is.
        link: Where it stands.
    """

    identifier: str
    words: str
    link: str


_FASHION_MNIST = Licence(
    "mit", "MIT, Zalando SE (Fashion-MNIST)", "https://github.com/zalandoresearch/fashion-mnist/blob/master/LICENSE"
)
_SD_VAE = Licence("mit", "MIT, Stability AI", "https://huggingface.co/stabilityai")
_DIT = Licence("cc-by-nc-4.0", "CC BY-NC 4.0, Meta", "https://github.com/facebookresearch/DiT/blob/main/LICENSE.txt")

DATA: Mapping[str, Licence] = {
    EMBEDDED: _FASHION_MNIST,
    "zalando-datasets/fashion_mnist": _FASHION_MNIST,
    "ILSVRC/imagenet-1k": Licence(
        "other",
        "ImageNet's terms of access: non-commercial research and education",
        "https://image-net.org/download.php",
    ),
}
VAES: Mapping[str, Licence] = {
    EMBEDDED: Licence(
        "apache-2.0",
        "Apache-2.0, part of speed_diffusers, trained on Fashion-MNIST (MIT, Zalando SE)",
        "https://www.apache.org/licenses/LICENSE-2.0",
    ),
    "stabilityai/sd-vae-ft-ema": _SD_VAE,
    "stabilityai/sd-vae-ft-mse": _SD_VAE,
}
MODELS: Mapping[str, Licence] = {"facebook/DiT-XL-2-256": _DIT, "facebook/DiT-XL-2-512": _DIT}


@dataclass(frozen=True)
class Licences:
    """What the one who releases says of the licences; None: what is known by itself.

    Attributes:
        weights: Identifier of the Hub, such as "apache-2.0"; it goes into the card's metadata.
        vae: Of the autoencoder, in words.
        data: Of the training images, in words.
    """

    weights: str | None = None
    vae: str | None = None
    data: str | None = None

    def of_weights(self, base_model: str | None) -> str | None:
        """The identifier for the weights: as given, else that of the model they were fine-tuned from."""
        base = MODELS.get(base_model or "")
        return base.identifier if self.weights is None and base is not None else self.weights

    def lines(self, *, base_model: str | None, vae: str | None, data: str | None) -> dict[str, str]:
        """What the card says, by the thing that is licensed.

        Args:
            base_model: Id of the model that was fine-tuned, if one was.
            vae: Id of the autoencoder on the Hub, or "embedded"; None: not known.
            data: Id of the dataset on the Hub, or "embedded"; None: not known.
        """
        weights = self.of_weights(base_model)
        lines = {
            "weights of the transformer": f"`{weights}`" if weights else "not stated by who released them",
            "autoencoder (`vae/`)": self.vae or _known(VAES, vae),
            "training images (not in this repository)": self.data or _known(DATA, data),
        }
        if base := MODELS.get(base_model or ""):
            lines[f"fine-tuned from `{base_model}`"] = _linked(base)
        return lines


def _known(table: Mapping[str, Licence], name: str | None) -> str:
    if name is None:
        return "not stated by who released this"
    if name not in table:
        return f"that of [{name}](https://huggingface.co/{name}), not stated by who released this"
    return _linked(table[name])


def _linked(licence: Licence) -> str:
    return f"[{licence.words}]({licence.link})"
