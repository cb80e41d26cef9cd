"""One-line breaks of what ours is timed against, and of the figures."""

from tools.mutants import Mutant

BASELINES = "tests/test_bench_baselines.py"
PLOTS = "tests/test_benchmark_plots.py"
ENGINE = f"{BASELINES}::test_an_engine_gets_our_cache_as_its_own_layout_and_gives_our_result"

# (name, file, the line, the broken line, the tests that must notice)
_BREAKS = [
    (
        "engines-leave-the-last-page-out",
        "benchmarks/engines.py",
        "counts = -(-view.lengths.long() // Z)",
        "counts = view.lengths.long() // Z",
        (ENGINE,),
    ),
    (
        "engines-take-pages-for-slots",
        "benchmarks/engines.py",
        "places = (view.page_table.long()[..., None] * Z + slots).flatten(1)  # [B, M*Z]",
        "places = (view.page_table.long()[..., None] + slots).flatten(1)",
        (ENGINE,),
    ),
    (
        "plain-forms-see-later-tokens",
        "benchmarks/baselines.py",
        "last = S - L + torch.arange(L, device=device)",
        "last = S + torch.arange(L, device=device)",
        (f"{BASELINES}::test_every_form_is_the_oracles_attention",),
    ),
    (
        "peak-memory-is-what-is-left",
        "benchmarks/memory.py",
        "highest = max(highest, total)",
        "highest = total",
        (f"{BASELINES}::test_peak_counts_what_is_held_at_once_and_frees_what_is_not",),
    ),
    (
        "page-check-counts-the-whole-call",
        "benchmarks/bench_paging.py",
        "check = times[ALL] - times[ONE] if ALL in times else None",
        "check = times[ALL] if ALL in times else None",
        (f"{BASELINES}::test_the_page_check_is_the_difference_of_two_refusals",),
    ),
    (
        "roofline-takes-the-lowest-ceiling",
        "benchmarks/plot_decode.py",
        "found[bound] = max(rates)",
        "found[bound] = min(rates)",
        (f"{PLOTS}::test_speedups_are_over_our_fastest_form_and_roofline_has_the_rows_ceilings",),
    ),
]

MUTANTS = [Mutant(*entry) for entry in _BREAKS]
