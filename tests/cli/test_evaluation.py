"""Commands that measure models and this machine."""


def test_doctor_says_what_runs_each_operator(call):
    code, out, err = call("doctor")
    assert code == 0, err
    assert "attention_backward" in out
    assert "runs through" in out
