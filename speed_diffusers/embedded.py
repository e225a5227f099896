"""What the package ships, by its one name and by its files."""

from pathlib import Path

EMBEDDED = "embedded"
"""Name of the shipped images, autoencoder and pipeline wherever a dataset or model is named; needs no network."""

FOLDER = Path(__file__).parent / "assets" / "fashion_mnist"
EMBEDDED_IMAGES = FOLDER / "train.parquet"
EMBEDDED_PIPELINE = FOLDER / "pipeline"
SHIPPED_CLASSIFIER = FOLDER / "classifier.safetensors"
SHIPPED_REFERENCE = FOLDER / "reference_features.safetensors"
