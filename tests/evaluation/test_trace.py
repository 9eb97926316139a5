import json
from pathlib import Path

import pytest
from tiny_models import bert, tokens

from headprune.errors import HeadpruneError
from headprune.evaluation import write_trace


def test_the_trace_has_a_span_for_every_pass_in_turn(tmp_path):
    path = write_trace({"dense": bert(), "pruned": bert(seed=1)}, {"input_ids": tokens(2, 6)}, tmp_path / "trace.json", passes=2)
    events = json.loads(path.read_text())["traceEvents"]
    spans = sorted((one["ts"], one["name"]) for one in events if one.get("name") in ("dense", "pruned") and one.get("ph") == "X")
    assert [name for _, name in spans] == ["dense", "pruned", "dense", "pruned"]
    assert any(one.get("name") == "aten::addmm" for one in events)
    assert [found.name for found in tmp_path.iterdir()] == ["trace.json"]


def test_a_trace_that_the_profiler_could_not_write_is_told(tmp_path, monkeypatch):
    """On a full disk it leaves an empty file and a part of the trace under another name, and says nothing."""
    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", lambda _, path: Path(f"{path}.tmp").write_text("{"))
    with pytest.raises(HeadpruneError, match="the disk is full"):
        write_trace({"dense": bert()}, {"input_ids": tokens(2, 8)}, tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []
