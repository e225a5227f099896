"""What the package embeds, by its one name and by its files."""

from pathlib import Path

EMBEDDED = "embedded"
"""Name of the embedded images, autoencoder and pipeline wherever a dataset or model is named; needs no network."""

FOLDER = Path(__file__).parent / "fashion_mnist"
EMBEDDED_IMAGES = FOLDER / "train.parquet"
EMBEDDED_HELD_OUT_IMAGES = FOLDER / "test.parquet"
EMBEDDED_PIPELINE = FOLDER / "pipeline"
EMBEDDED_CLASSIFIER = FOLDER / "classifier.safetensors"
EMBEDDED_REFERENCE = FOLDER / "reference_features.safetensors"
