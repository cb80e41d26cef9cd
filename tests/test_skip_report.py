from tools.skip_report import clean_reason, summary_line


def test_skips_are_counted_by_reason_most_frequent_first():
    reasons = ["Skipped: no CUDA device", "no C++ compiler", "Skipped: no CUDA device"]
    assert summary_line(8, 1, reasons) == (
        "mla tests: 8 passed, 1 failed, 3 skipped (2 no CUDA device, 1 no C++ compiler)"
    )


def test_a_run_without_skips_has_no_parentheses():
    assert summary_line(3, 0, []) == "mla tests: 3 passed, 0 failed, 0 skipped"


def test_a_long_reason_is_cut_to_one_short_line():
    assert clean_reason("Skipped: " + "x" * 100 + "\nmore") == "x" * 57 + "..."
    assert clean_reason("") == "no reason given"
