"""The code of docs/migration.md, run from top to bottom, must do what the page says."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "migration.md"


def test_the_code_of_the_migration_page_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 7
    torch.manual_seed(0)
    found = {"folder": tmp_path / "model"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), found)
    assert found["bart"].encoder.layers[0].self_attn.q_proj.out_features == 40
    assert found["bart"].decoder.layers[1].encoder_attn.q_proj.out_features == 24
    assert sorted(found["scores"]) == ["encoder.layer.0.attention", "encoder.layer.1.attention"]
