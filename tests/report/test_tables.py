from headprune.report.tables import check_rows


def test_checks_are_shown_whatever_they_found():
    rows = check_rows({"reload": 0.0, "generates_as_gated": True, "another": False, "counted": 3})
    assert [found for _, found in rows] == ["0.0e+00", "yes", "no", "3"]
    assert rows[0][0].startswith("loaded from disk")
    assert rows[2][0] == "another"
