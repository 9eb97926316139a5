"""Static plots of a run: which there are, what they hold, that they are the same every time."""

import sys
import xml.etree.ElementTree as ElementTree

import pytest
from reported_run import write_run

from headprune.errors import InvalidInput
from headprune.report.figures import beaten, figures, head_maps, quality_latency, sensitivity
from headprune.report.page_data import page_data
from headprune.report.run_folder import read_run

pytest.importorskip("matplotlib", reason="matplotlib (the report extra) is not installed")
NAMES = ("heads-fisher", "heads-magnitude_l1", "quality-latency", "sensitivity", "agreement")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder, page_data(read_run(folder))


def test_every_plot_is_a_png_and_an_svg_and_the_same_every_time(written, tmp_path):
    first, second = (figures(written[0], tmp_path / name) for name in ("one", "two"))
    assert [path.name for path in first] == [f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")]
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes()
        if one.suffix == ".svg":
            assert ElementTree.fromstring(one.read_text()).tag.endswith("svg")
        else:
            assert one.read_bytes().startswith(b"\x89PNG")


def test_a_map_shows_the_percentiles_and_crosses_what_the_plan_removes(written):
    data = written[1]
    _, figure = next(head_maps(data))
    (axes, _) = figure.axes
    assert axes.collections[0].get_array().ravel().tolist() == [value for row in data["criteria"][0]["percentile"] for value in row]
    crossed = {(int(y), int(x)) for line in axes.lines if line.get_marker() == "X" for x, y in zip(*line.get_data())}
    assert crossed == {(row, head) for row, bits in enumerate(data["plan"]) for head, bit in enumerate(bits) if bit == "0"}


def test_the_curve_joins_the_models_that_none_beats(written):
    ((_, figure),) = quality_latency(written[1])
    (front,) = figure.axes[0].lines
    assert list(zip(*front.get_data())) == [(0.75, 12.0), (18 / 21, 10.5), (1.0, 10.0), (1.0, 10.0)]
    worse = {"latency_share": 0.9, "quality": {"perplexity": 11.0}}
    assert beaten(worse, written[1]["measured"], "perplexity", higher=False)
    fastest = {"latency_share": 0.5, "quality": {"perplexity": 90.0}}
    assert not beaten(fastest, written[1]["measured"], "perplexity", higher=False)


def test_sensitivity_has_a_curve_for_every_attention(written):
    ((_, figure),) = sensitivity(written[1])
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == written[1]["sensitivity"]["increase"]


def test_without_matplotlib_the_error_says_what_to_install(written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidInput, match=r"headprune\[report\]"):
        figures(written[0], tmp_path)
