"""One-line breaks of batch generation on Ray; the tests run it without Ray."""

from tools.mutants import Mutant

EXAMPLE = "tests/test_ray_example.py"
RESULTS = (f"{EXAMPLE}::test_results_are_those_of_each_prompt_alone_in_the_order_of_the_file",)
RESUMED = (f"{EXAMPLE}::test_a_run_that_was_cut_off_goes_on_and_computes_what_is_missing",)

# (name, file, the line, the broken line, the tests that must notice)
_BREAKS = [
    (
        "padding-of-a-prompt-is-attended",
        "examples/ray_generate.py",
        "mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) "
        "for prompt in prompts])",
        "mask = torch.ones_like(ids)",
        RESULTS,
    ),
    (
        "tokens-follow-the-end-token",
        "examples/ray_generate.py",
        "return tokens[: last + 1]",
        "return tokens",
        RESULTS,
    ),
    (
        "results-in-the-order-of-workers",
        "examples/batch_files.py",
        "found = [tokens for part in sorted(journal.parts) for tokens in journal.parts[part]]",
        "found = [tokens for part in journal.parts for tokens in journal.parts[part]]",
        RESULTS,
    ),
    (
        "finished-parts-are-computed-again",
        "examples/ray_generate.py",
        "missing = {part: rows for part, rows in parts.items() if part not in journal.parts}",
        "missing = dict(parts)",
        RESUMED,
    ),
    (
        "half-a-line-stays-in-the-journal",
        "examples/batch_files.py",
        'whole = whole[: whole.rfind(b"\\n") + 1]  # the last line may have been cut off',
        "whole = whole[:]",
        RESUMED,
    ),
]
MUTANTS = [Mutant(*entry) for entry in _BREAKS]
