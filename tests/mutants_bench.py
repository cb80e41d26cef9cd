"""One-line breaks of the benchmark harness and of the comparison of versions."""

from tools.mutants import Mutant

COMPARE = "tests/test_bench_compare.py"
RESUME = "tests/test_bench_resume.py"

# (name, file, the line, the broken line, the tests that must notice)
_BREAKS = [
    (
        "compare-looks-at-the-median-alone",
        "benchmarks/compare.py",
        "if self.low > 1 + TOLERANCE:",
        "if self.median > 1 + TOLERANCE:",
        (f"{COMPARE}::test_verdicts",),
    ),
    (
        "compare-takes-the-ratio-the-other-way-round",
        "benchmarks/compare.py",
        "ratios = sorted(here / base for base, here in rounds)",
        "ratios = sorted(base / here for base, here in rounds)",
        (f"{COMPARE}::test_a_few_rounds_beside_load_decide_nothing",),
    ),
    (
        "compare-believes-one-pair-of-processes",
        "benchmarks/compare.py",
        'verdict = "slower" if any(map(_is_slower, again)) else "unclear"',
        'verdict = "slower"',
        (f"{COMPARE}::test_slower_must_be_seen_twice",),
    ),
    (
        "compare-takes-our-kernels-for-those-of-another-version",
        "benchmarks/compare_tree.py",
        "if same_sources(root, folder):",
        "if built:",
        (f"{COMPARE}::test_kernels_are_built_where_their_sources_differ",),
    ),
    (
        "resume-takes-a-quick-run-for-a-thorough-one",
        "benchmarks/resume.py",
        "return has_price and self.quick <= other.quick and self.rounds >= other.rounds",
        "return has_price",
        (f"{RESUME}::test_a_thorough_run_serves_a_quick_one_but_not_the_other_way_round",),
    ),
    (
        "resume-takes-rows-of-other-sources",
        "benchmarks/resume.py",
        'if document.get("source") != source() or not _is_here(document["environment"]):',
        'if not _is_here(document["environment"]):',
        (f"{RESUME}::test_rows_of_other_code_or_another_machine_are_measured_again",),
    ),
    (
        "sweep-measures-what-is-there",
        "benchmarks/sweep.py",
        "missing = [point for point in points if journal.rows_of(point) is None]",
        "missing = points",
        (f"{RESUME}::test_a_run_that_is_cut_off_keeps_its_rows_and_the_next_one_goes_on",),
    ),
    (
        "harness-dies-where-memory-runs-out",
        "benchmarks/harness.py",
        "return isinstance(error, RuntimeError) and any(x in str(error) for x in _MEMORY_WORDS)",
        "return False",
        (f"{RESUME}::test_a_candidate_without_memory_is_a_row_and_the_run_goes_on",),
    ),
    (
        "ceilings-take-the-lower-bound",
        "benchmarks/ceilings.py",
        "if by_memory > by_arithmetic:",
        "if by_memory < by_arithmetic:",
        (f"{RESUME}::test_share_is_of_the_slower_of_memory_and_arithmetic",),
    ),
]
MUTANTS = [Mutant(*entry) for entry in _BREAKS]
