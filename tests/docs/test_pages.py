"""The pages name only what exists: commands, options, names, keywords, keys of recipes."""

import re
from pathlib import Path

import pytest
import yaml
from pages import PAGES, ROOT, blocks, commands, has, inline, mentioned_command, mentioned_names, parse_command, text_of, unknown

import headprune as hp
from headprune.recipe import parse_recipe

RECIPE = {"model": "minilm", "task": {"name": "docstring-retrieval"}, "output": "runs/minilm"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_every_command_of_a_page_parses(page: Path):
    for words in commands(text_of(page)):
        parse_command(words)
    mentioned = [code for code in inline(text_of(page)) if code.startswith("headprune ")]
    assert [wrong for code in mentioned for wrong in mentioned_command(code)] == []


@each_page
def test_python_of_a_page_compiles_and_uses_names_and_keywords_that_exist(page: Path):
    for code in blocks(text_of(page), "python"):
        compile(code, str(page), "exec")
        assert unknown(code) == []
    assert [name for code in inline(text_of(page)) for name in mentioned_names(code)] == []


@each_page
def test_keys_of_recipes_in_a_page_are_known(page: Path):
    for block in blocks(text_of(page), "yaml"):
        parse_recipe(RECIPE | yaml.safe_load(block), page.name)


def test_every_public_name_is_in_the_python_api():
    shown = set(re.findall(r"\bhp\.(\w+)", text_of(ROOT / "docs" / "python-api.md")))
    assert set(hp.__all__) - shown == {"__version__"}


def test_names_that_docstrings_and_messages_send_to_exist():
    texts = {path: text_of(path) for path in (ROOT / "headprune").rglob("*.py")}
    found = {f"headprune{name}" for text in texts.values() for name in re.findall(r"`hp((?:\.\w+)+)", text)}
    assert "headprune.prune" in found
    assert [name for name in sorted(found) if not has(name)] == []


def test_what_does_not_exist_is_found():
    assert unknown("import headprune as hp\nhp.prune_all(model)") == ["headprune.prune_all"]
    assert unknown("hp.plan(scores, hp.Budget(head=0.5))") == ["headprune.Budget(head=)"]
    assert unknown("from headprune.scoring import fischer") == ["headprune.scoring.fischer"]
    assert mentioned_names("hp.nn.Nothing ...") == ["headprune.nn.Nothing"]
    assert mentioned_command("headprune plan --head") == ["headprune plan --head: no option --head"]
    assert mentioned_command("headprune compile") == ["headprune compile: no command compile"]
    assert commands("```\nA=1 headprune plan s.json --heads 0.5; vllm serve out  # headprune x\n```") == [
        ["plan", "s.json", "--heads", "0.5"]
    ]
    for wrong, message in ((["plan", "s.json", "--head", "1"], "--head"), (["plan"], "scores"), (["pln"], "pln")):
        with pytest.raises(Exception, match=re.escape(message)):
            parse_command(wrong)
