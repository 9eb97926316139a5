"""What is said of the compiled library: where it lies, or why it is not there."""

from headprune.ops.extension import Extension, cpu_extension


def test_libraries_that_do_not_load_are_named(tmp_path):
    """Whichever this processor would take, none of these is one."""
    for name in ("default", "avx2", "avx512"):
        (tmp_path / f"_cpu_{name}.so").write_text("no library")
    found = cpu_extension(tmp_path)
    assert found.path is None
    assert "_cpu_default.so does not load" in str(found)


def test_without_a_library_the_way_out_is_that_of_a_tree_or_of_an_installation(tmp_path):
    (tmp_path / "package").mkdir()
    assert "install from the source archive, with a C++ compiler" in str(cpu_extension.__wrapped__(tmp_path / "package"))
    (tmp_path / "setup.py").touch()
    assert "run `python setup.py build_ext --inplace`" in str(cpu_extension.__wrapped__(tmp_path / "package"))


def test_what_is_loaded_names_the_better_ones_that_were_not(tmp_path):
    found = Extension("default", tmp_path / "_cpu_default.so", None, ("_cpu_avx2.so does not load: too old",))
    assert str(found) == f"{tmp_path}/_cpu_default.so (_cpu_avx2.so does not load: too old)"
