"""The model that comes with decal: small enough for a laptop, pretrained for real, a base to fine-tune at once."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"  # what every `from_pretrained` of transformers takes
