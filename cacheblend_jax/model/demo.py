"""Where the bundled model lies: trained by `scripts/train_demo_model.py` on records of an invented company."""

from __future__ import annotations

from pathlib import Path


def demo_directory() -> Path:
    """Returns the directory of the bundled checkpoint, in Hugging Face form."""
    return Path(__file__).with_name("demo_checkpoint")
