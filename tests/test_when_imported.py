import importlib
import importlib.util
import sys
import threading
from importlib.machinery import SourceFileLoader

import pytest

from headprune.when_imported import when_imported

NAME = "imported_later"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The file of a module that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    path = tmp_path / f"{NAME}.py"
    path.write_text("value = 3\n")
    yield path
    sys.modules.pop(NAME, None)


@pytest.fixture
def seen():
    """What the module held each time that it was seen."""
    return []


def look(seen):
    return lambda: seen.append(sys.modules[NAME].value)


def test_it_is_done_when_the_module_has_been_imported_once_and_by_nobody_left_behind(module, seen):
    before = list(sys.meta_path)
    when_imported(NAME, look(seen))
    assert (seen, NAME in sys.modules) == ([], False)
    found = importlib.import_module(NAME)
    assert (seen, sys.meta_path) == ([3], before)
    importlib.reload(found)
    assert seen == [3]


def test_it_is_done_at_once_where_the_module_is_there(module, seen):
    importlib.import_module(NAME)
    before = list(sys.meta_path)
    when_imported(NAME, look(seen))
    assert (seen, sys.meta_path) == ([3], before)


def test_several_may_wait_for_one_module(module, seen):
    for _ in range(3):
        when_imported(NAME, look(seen))
    importlib.import_module(NAME)
    assert seen == [3, 3, 3]


def test_a_spec_that_is_looked_for_can_be_read_and_changes_nothing(module, seen):
    when_imported(NAME, look(seen))
    spec = importlib.util.find_spec(NAME)
    assert spec.origin == str(module)
    assert spec.loader.get_source(NAME) == "value = 3\n"
    assert seen == []
    assert importlib.import_module(NAME).value == 3
    assert seen == [3]


def test_the_module_has_the_loader_that_it_would_have(module, seen):
    when_imported(NAME, look(seen))
    found = importlib.import_module(NAME)
    assert type(found.__loader__) is type(found.__spec__.loader) is SourceFileLoader


def test_an_import_that_fails_is_waited_for_again(module, seen):
    when_imported(NAME, look(seen))
    module.write_text("raise ValueError('not today')\n")
    with pytest.raises(ValueError, match="not today"):
        importlib.import_module(NAME)
    module.write_text("value = 45\n")
    importlib.invalidate_caches()
    assert importlib.import_module(NAME).value == 45
    assert seen == [45]


def test_a_module_that_does_not_exist_is_not_found(module):
    when_imported("nothing_of_that_name", lambda: None)
    assert importlib.util.find_spec("nothing_of_that_name") is None
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        importlib.import_module("nothing_of_that_name")


def test_threads_see_the_module_after_it_was_done(module, seen):
    module.write_text("import time\ntime.sleep(0.2)\nvalue = 3\n")
    when_imported(NAME, look(seen))
    counted = []

    def use():
        importlib.import_module(NAME)
        counted.append(len(seen))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == [1] * 8


def test_what_is_asked_for_while_another_thread_imports_waits_for_the_end(module, seen):
    module.write_text("import threading\nbegun, go = threading.Event(), threading.Event()\nbegun.set()\ngo.wait(20)\nvalue = 3\n")
    other = threading.Thread(target=importlib.import_module, args=(NAME,))
    other.start()
    while NAME not in sys.modules or not hasattr(sys.modules[NAME], "begun"):
        pass
    sys.modules[NAME].begun.wait(20)
    threading.Timer(0.2, sys.modules[NAME].go.set).start()
    when_imported(NAME, look(seen))
    other.join()
    assert seen == [3]
