from headprune import processor


def told(tmp_path, monkeypatch, text):
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", path)


def test_generations_of_one_name_differ(tmp_path, monkeypatch):
    told(
        tmp_path, monkeypatch,
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n"
        "processor\t: 1\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\n",
    )  # fmt: skip
    assert processor.processor_name() == "AMD EPYC (family 26, model 2)"
    assert processor.is_amd()


def test_processors_that_tell_less(tmp_path, monkeypatch):
    told(tmp_path, monkeypatch, "processor\t: 0\nvendor_id\t: GenuineIntel\nBogoMIPS\t: 100.00\n")
    monkeypatch.setattr(processor.platform, "processor", lambda: "aarch64")
    assert processor.processor_name() == "aarch64"
    assert not processor.is_amd()
    (tmp_path / "cpuinfo").unlink()
    assert processor.processor_name() == "aarch64"
