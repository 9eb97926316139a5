"""The page as a document: whole, self-contained, and safe against what a folder's texts hold."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from reported_run import MACHINE, evaluation, pruned, write_run
from tiny_models import llama

import headprune as hp
from headprune.errors import InvalidInput
from headprune.report.page_data import finite, short_labels

VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """Elements by id, whether tags close as they opened, and every address that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.open, self.fetched, self.scripts = [], [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.fetched += [value for name, value in attributes if name in ("src", "href") and not value.startswith("data:")]
        if tag not in VOID:
            self.open.append((tag, given.get("id")))

    def handle_endtag(self, tag):
        opened, _ = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1]] = self.scripts.get(self.open[-1][1], "") + data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    scores, plan = write_run(folder)
    return folder, scores, plan, hp.report(folder)


def test_the_page_is_one_well_formed_file_that_fetches_nothing(written):
    text = written[3].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert len(page.ids) == len(set(page.ids))
    assert {"map", "budget", "criterion", "download", "chart", "sensitivity", "agreement", "criteria"} <= set(page.ids)
    assert not re.search(r"@import|url\((?!data:)|fetch\(|XMLHttpRequest", text)
    assert len(text) < 200_000
    assert f"Measured on {MACHINE}." in text
    assert "one line with &lt;b&gt;markup&lt;/b&gt; &amp; &lt;/script&gt;" in text


def test_the_page_carries_the_scores_and_the_plan(written):
    folder, scores, plan, path = written
    data = json.loads(Page(path.read_text(encoding="utf-8")).scripts["data"])
    assert [one["name"] for one in data["criteria"]] == list(scores)
    for one in data["criteria"]:
        assert one["scores"] == [values.tolist() for values in scores[one["name"]].values()]
    assert data["plan_document"] == json.loads((folder / "plan.json").read_text())
    kept = [[head for head, bit in enumerate(bits) if bit == "1"] for bits in data["plan"]]
    assert kept == [list(heads) for heads in plan.values()]
    assert [site["label"] for site in data["sites"]] == ["0", "1"]
    agreed = scores["fisher"].compare(scores["magnitude_l1"])
    assert data["agreement"]["spearman"][0][1] == pytest.approx(agreed.spearman)
    assert data["agreement"]["overlap"][1][0] == agreed.overlap
    assert data["portraits"][0][3]["labels"]
    assert [one["chosen"] for one in data["measured"]] == [False, True, False, False]
    assert data["counted"]["parameters"] == evaluation(llama(), 0.0, 1.0).parameters
    assert data["measured"][1]["parameters"] == evaluation(pruned(plan), 0.0, 1.0).parameters


def test_a_model_without_a_cache_has_no_tile_of_it(written, tmp_path):
    def text(folder):
        return hp.report(folder).read_text(encoding="utf-8")

    assert "key/value cache<strong>" in text(written[0])
    shutil.copytree(written[0], tmp_path / "run")
    for name in ("result.json", "sweep.json"):
        found = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(re.sub(r'("kv_cache_bytes_per_token": )\d+', r"\1null", found))
    page = text(tmp_path / "run")
    assert "key/value cache<strong>" not in page
    assert "key/value bytes per token" not in page
    assert json.loads(Page(page).scripts["data"])["counted"]["kv_cache_bytes_per_token"] is None


def test_scores_alone_make_a_page(written, tmp_path):
    written[1]["magnitude_l1"].save(tmp_path / "scores.json")
    page = Page(hp.report(tmp_path, tmp_path / "other.html").read_text(encoding="utf-8"))
    assert {"map", "budget", "download"} <= set(page.ids)
    assert not {"chart", "sensitivity", "agreement"} & set(page.ids)
    kept = json.loads(page.scripts["data"])["plan_document"]["sites"]["model.layers.0.self_attn"]["keep"]
    assert kept == list(range(8))


def test_a_page_of_the_folder_one_is_in_has_its_name(written, tmp_path, monkeypatch):
    shutil.copy(written[0] / "scores.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert f"<title>Heads of {tmp_path.name}</title>" in hp.report(".").read_text()


def test_a_name_in_the_recipe_cannot_end_the_script(written, tmp_path):
    written[1]["fisher"].save(tmp_path / "scores.json")
    (tmp_path / "recipe.yaml").write_text("model: '</script><img src=x>'\n")
    page = Page(hp.report(tmp_path).read_text(encoding="utf-8"))
    assert page.fetched == []
    assert json.loads(page.scripts["data"])["model"] == "</script><img src=x>"


def test_a_folder_without_scores_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InvalidInput, match="scores"):
        hp.report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["model.layers.0.self_attn", "model.layers.11.self_attn"], ["0", "11"]),
        (["encoder.0.attn", "decoder.0.attn", "decoder.0.cross"], ["encoder.0.attn", "decoder.0.attn", "decoder.0.cross"]),
        (["attn"], ["attn"]),
        (["a.b", "a.b.b"], ["a.b", "a.b.b"]),
    ],
)
def test_labels_are_what_differs(names, labels):
    assert list(short_labels(names).values()) == labels


def test_what_json_does_not_have_becomes_null():
    assert finite({"a": [float("nan"), 1.0, (float("inf"),)]}) == {"a": [None, 1.0, [None]]}


def test_a_quality_or_a_loss_that_is_no_number_is_a_dash(tmp_path):
    write_run(tmp_path)
    for name in ("sweep.json", "sensitivity.json"):
        path = tmp_path / name
        text = path.read_text()
        number = re.search(r'"(?:perplexity|dense)": ([0-9.]+)', text)
        path.write_text(text.replace(number.group(0), number.group(0).replace(number.group(1), "Infinity"), 1))
    page = hp.report(tmp_path).read_text(encoding="utf-8")
    assert "<td>–</td>" in page
    assert "dense loss –," in page
