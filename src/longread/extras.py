"""Packages that Longread can use and does not require, by the extra of pyproject.toml that lists them."""

from __future__ import annotations

PACKAGES = {
    "plots": "matplotlib",
    "parquet": "pyarrow",
    "hub": "datasets",
    "zarr": "zarr",
    "orbax": "tensorstore",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "fla": "fla-core",
    "hf": "transformers accelerate",
    "gguf": "gguf",
    "fsspec": "fsspec",
    "lm-eval": "lm_eval jinja2 tqdm",
    "serve": "fastapi uvicorn pydantic prometheus-client",
}


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra, wherever Longread itself was installed from."""
    return f"pip install {PACKAGES[extra]}"
