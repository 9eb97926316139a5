"""What importing headprune brings along, in processes of their own, and that its names are there whatever was imported first."""

import json
import os
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import headprune as hp

ROOT = Path(__file__).parents[1]
TRAINERS = {"transformers.trainer", "transformers.trainer_callback", "peft", "bitsandbytes", "datasets"}
# Of the whole command line: what a shell asks for while a user types.
HELP = """
import os, sys
from headprune.cli import app, main

def called(*words, **environment):
    os.environ.update(environment)
    sys.argv = ["headprune", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words

def completed(*words):
    called(_HEADPRUNE_COMPLETE="complete_bash", COMP_WORDS=" ".join(["headprune", *words]), COMP_CWORD=str(len(words)))

names = [command.name or command.callback.__name__ for command in app.registered_commands]
assert len(names) > 15, names
called("--help")
called("--version")
for name in names:
    called(name, "--help")
completed("sco")
completed("score", "min")
completed("prune", "minilm", "--st")
"""
PICKLED = """
import pickle, sys
budget = pickle.loads(open(sys.argv[1], "rb").read())
import headprune
assert type(budget) is headprune.Budget and budget.heads == 0.5, budget
"""


def modules_after(script: str, *arguments: object) -> set[str]:
    """What has been imported when `script` has run in a new process."""
    script += '\nimport json, sys; print("\\n" + json.dumps(sorted(sys.modules)))'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_headprune_registers_the_operators_and_imports_nothing_of_transformers():
    found = modules_after("import headprune, torch; torch.ops.headprune.attention; headprune.nn.VariableHeadAttention")
    assert not {name for name in found if name.split(".")[0] in ("transformers", "tokenizers", "peft", "bitsandbytes")}


def test_all_public_names_together_bring_no_trainer():
    found = modules_after("from headprune import *; recover, lottery_ticket, compare_methods, report, evaluate")
    assert found & TRAINERS == set()


def test_help_versions_and_completed_words_do_without_the_models_of_transformers():
    found = modules_after(HELP)
    assert "headprune.cli" in found
    assert found & {"transformers", *TRAINERS} == set()


@pytest.mark.parametrize(
    "script",
    [
        "import headprune; from transformers import AutoModel, AttentionInterface",
        "from transformers import AutoModel, AttentionInterface; import headprune",
        "import importlib.util, headprune\n"
        "spec = importlib.util.find_spec('transformers.modeling_utils')\n"
        "assert spec.loader.get_source(spec.name)\n"
        "from transformers import AttentionInterface, AutoModel\n"
        "import transformers.modeling_utils as models\n"
        "assert type(models.__loader__) is type(models.__spec__.loader) is type(headprune.__loader__)\n",
        "import headprune.cli; from transformers import AutoModel, AttentionInterface",
        "import headprune; headprune.plan; from transformers import AutoModel, AttentionInterface",
    ],
    ids=["before", "after", "looked for before", "by the command line", "by a public name"],
)
def test_the_attention_is_registered_whatever_is_imported_first(script):
    check = """
from headprune.attention_interface import headprune_attention, headprune_mask
from transformers import AttentionMaskInterface
assert AttentionInterface()["headprune"] is headprune_attention
assert AttentionMaskInterface()["headprune"] is headprune_mask
import sys
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "headprune.when_imported"]
"""
    modules_after(f"{script}\n{check}")


@pytest.mark.parametrize("first", ["headprune.report.figures", "headprune.sources", "headprune.cli"])
def test_public_names_stay_what_they_are_whatever_is_imported_first(first):
    script = f"""
import importlib, types
importlib.import_module({first!r})
import headprune as hp
from headprune import compat, nn, ops, plan, recovery, report, schedules
assert isinstance(report, types.FunctionType) and hp.report is report, report
import headprune.report.web_page
assert hp.report is report
assert isinstance(plan, types.FunctionType), plan
assert all(isinstance(module, types.ModuleType) for module in (compat, nn, ops, recovery, schedules))
assert hp.surgery.prune is hp.prune
assert importlib.reload(hp).report is report
"""
    modules_after(script)


def test_of_the_public_names_that_submodules_have_too_report_alone_is_something_else():
    """Importing a submodule sets the attribute of the package; headprune/__init__.py sees to `report`."""
    submodules = {module.name for module in pkgutil.iter_modules(hp.__path__)}
    alike = submodules & set(hp.__all__)
    assert {name for name in alike if getattr(hp, name) is not sys.modules[f"headprune.{name}"]} == {"report"}


def test_names_are_listed_and_unknown_ones_refused():
    assert set(hp.__all__) <= set(dir(hp))
    assert all(getattr(hp, name) is not None for name in hp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        hp.plans  # noqa: B018
    with pytest.raises(ImportError, match="plans"):
        from headprune import plans  # noqa: F401


def test_a_value_is_read_back_where_nothing_was_imported(tmp_path):
    (tmp_path / "budget").write_bytes(pickle.dumps(hp.Budget(heads=0.5)))
    modules_after(PICKLED, tmp_path / "budget")
