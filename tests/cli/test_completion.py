"""What the shell is told when it asks how a word could go on."""

import pytest

from headprune import cli
from headprune.scoring import criteria


@pytest.fixture
def offered(monkeypatch, capsys):
    """words -> what bash would be offered for the last of them."""

    def complete(*words: str) -> list[str]:
        monkeypatch.setenv("_HEADPRUNE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(["headprune", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        monkeypatch.setattr("sys.argv", ["headprune"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        return capsys.readouterr().out.split()

    return complete


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sens"], ["sensitivity"]),
        (["score", "min"], ["minilm"]),
        (["score", "./some/folder"], []),
        (["score", "minilm", "--task", "doc"], ["docstring-retrieval"]),
        (["score", "minilm", "--criterion", "fisher_l"], ["fisher_least_squares"]),
        (["score", "minilm", "--criterion", "fisher,entropy_"], ["fisher,entropy_inverted"]),
        (["score", "minilm", "--criterion", "fisher,fish"], ["fisher,fisher_least_squares"]),
        (["score", "minilm", "--normalize", "layer_l"], ["layer_l2"]),
        (["plan", "scores.json", "--allocation", "opt"], ["optimal"]),
        (["plan", "scores.json", "--granularity", "kv"], ["kv_group"]),
        (["plan", "scores.json", "--target", "ll"], ["llama.cpp"]),
        (["sweep", "minilm", "scores.json", "--quantity", "kv"], ["kv_cache"]),
        (["prune", "minilm", "plan.json", "--task", "standard"], ["standard-library-text"]),
        (["export", "./pruned", "--to", "gg"], ["gguf"]),
        (["recover", "./pruned", "--method", "lo"], ["lora"]),
        (["recover", "./pruned", "--teacher", "std"], ["stdlib-lm"]),
        (["compare", "minilm", "--methods", "heads,chan"], ["heads,channels"]),
        (["estimate", "./llama", "--device", "h"], ["h100", "h200"]),
        (["demo", "--model", "std"], ["stdlib-lm"]),
    ],
)
def test_names_are_completed(offered, words, expected):
    assert offered(*words) == expected


def test_every_criterion_is_offered(offered):
    assert offered("score", "minilm", "--criterion", "") == list(criteria())


def test_the_script_for_the_shell_asks_headprune(call, monkeypatch):
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    code, out, _ = call("--show-completion")
    assert code == 0
    assert "_HEADPRUNE_COMPLETE=complete_bash" in out
    assert "complete -o default -F" in out


def test_completing_behind_the_version_prints_no_version(offered):
    assert offered("--version", "sens") == ["sensitivity"]
