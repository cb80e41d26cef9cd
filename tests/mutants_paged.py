"""Breaks of the pool of pages: copies left out, books kept wrongly, hashes that say too little."""

from tools.mutants import Mutant

PAGED, BATCH = "mla/cache/paged.py", "mla/cache/batch.py"
PAGES, PREFIX = "mla/cache/pages.py", "mla/cache/prefix.py"
CASES = "tests/test_paged.py"
FOUND = "tests/test_paged_prefix.py"
REFUSED = "tests/test_paged_refuse.py"
MACHINE = "tests/test_paged_machine.py::TestPool"
PLACES = "tests/test_paged_decode.py"

# (name, file, the line, the broken line, the tests that must notice)
_BREAKS = [
    (
        "paged-writes-into-shared-pages",
        PAGED,
        "if slot > 0 and self._pages.references(record.pages[column]) > 1:",
        "if False:",
        (f"{CASES}::test_forks_share_until_they_write", MACHINE),
    ),
    (
        "paged-copies-a-page-in-the-first-layer-only",
        PAGED,
        "rows[target] = rows[source]",
        "self._rows[0][target] = self._rows[0][source]",
        (f"{CASES}::test_forks_share_until_they_write",),
    ),
    (
        "paged-quantises-copied-rows-twice",
        PAGED,
        "rows[target] = rows[source]",
        "c = self.configs[0]; sizes = c.kv_lora_rank, c.qk_rope_head_dim; rows[target] = "
        "self.codec.encode("
        "*self.codec.decode(rows[source], *sizes, torch.float32).split(sizes, -1)).to(rows.dtype)",
        (f"{CASES}::test_copies_are_those_of_the_stored_bytes",),
    ),
    (
        "paged-takes-pages-until-there-are-none",
        PAGED,
        "if needed > self.num_free_pages:",
        "if False:",
        (f"{REFUSED}::test_full",),
    ),
    (
        "paged-forgets-that-copies-need-pages",
        PAGED,
        "needed += min(num_writers, self._pages.references(page) - 1)",
        "pass",
        (f"{REFUSED}::test_full",),
    ),
    (
        "paged-copies-for-every-writer",
        PAGED,
        "needed += min(num_writers, self._pages.references(page) - 1)",
        "needed += num_writers",
        (f"{CASES}::test_two_rows_of_one_batch_that_share_a_page_may_both_write",),
    ),
    (
        "paged-frees-a-sequence-twice",
        PAGED,
        "if len(records) != len(sequences):",
        "if False:",
        (f"{REFUSED}::test_what_it_refuses",),
    ),
    (
        "paged-frees-pages-that-others-use",
        PAGES,
        "if self._references[page] > 0:",
        "if False:",
        (f"{CASES}::test_forks_share_until_they_write", MACHINE),
    ),
    (
        "paged-does-not-notice-a-page-released-twice",
        PAGES,
        "if self._references[page] < 1:",
        "if False:",
        (f"{REFUSED}::test_the_books_notice_a_page_released_twice",),
    ),
    (
        "paged-table-is-off-by-one",
        BATCH,
        "self.page_table[row_idx, column] = page.to(torch.int32)",
        "self.page_table[row_idx, column] = page.to(torch.int32) + 1",
        (
            f"{CASES}::test_forks_share_until_they_write",
            f"{PLACES}::test_pool_beyond_2_31_elements",
        ),
    ),
    (
        "paged-table-shows-the-page-before-its-copy",
        PAGED,
        "first_columns[record] = column",
        "pass",
        (f"{CASES}::test_two_rows_of_one_batch_that_share_a_page_may_both_write", MACHINE),
    ),
    (
        "paged-batches-miss-what-others-do",
        PAGED,
        "batch._follow(first_columns)",
        "pass",
        (f"{CASES}::test_batches_follow_what_happens_to_their_sequences_elsewhere",),
    ),
    (
        "paged-grows-rows-beyond-a-fixed-table",
        PAGED,
        'other._check_follows("PagedBatch.reserve", lengths)',
        "pass",
        (f"{REFUSED}::test_no_other_batch_grows_a_row_beyond_the_table_of_a_fixed_one",),
    ),
    (
        "paged-counts-a-step-again-for-another-batch",
        BATCH,
        "if record is not None and record.written < record.length:",
        "if False:",
        (f"{REFUSED}::test_layers_do_not_reserve_on_top_of_a_step_that_others_have_not_written",),
    ),
    (
        "paged-gives-tokens-to-idle-rows",
        BATCH,
        "return [0 if record is None else count for record, count in rows]",
        "return counts",
        (f"{CASES}::test_idle_rows_get_nothing",),
    ),
    (
        "paged-hashes-a-page-without-those-before-it",
        PREFIX,
        "digest = page_digest(digest, token_ids[first : first + page_size])",
        "digest = page_digest(root, token_ids[first : first + page_size])",
        (f"{FOUND}::test_a_prompt_finds_the_pages_of_the_same_tokens_and_leaves_one_to_compute",),
    ),
    (
        "paged-hashes-without-the-salt",
        PREFIX,
        'return sha256(b"mla:" + salt.encode()).digest()',
        'return sha256(b"mla:").digest()',
        (f"{FOUND}::test_a_prompt_finds_the_pages_of_the_same_tokens_and_leaves_one_to_compute",),
    ),
    (
        "paged-finds-the-whole-prompt",
        PAGED,
        "for digest in prefix_digests(record.root, ids[:-1], self.span):",
        "for digest in prefix_digests(record.root, ids, self.span):",
        (f"{FOUND}::test_a_prompt_finds_the_pages_of_the_same_tokens_and_leaves_one_to_compute",),
    ),
    (
        "paged-finds-pages-that-are-being-written",
        PAGED,
        "finished = [step for step in self._steps if not any(step.pending)]",
        "finished = list(self._steps)",
        (f"{FOUND}::test_pages_are_found_only_after_every_layer_has_written_them",),
    ),
    (
        "paged-finds-rows-that-a-failed-step-left-out",
        PREFIX,
        "if self.written == begin and self.length >= end:",
        "if self.length >= end:",
        (f"{FOUND}::test_rows_that_a_failed_step_left_out_are_never_found",),
    ),
    (
        "paged-keeps-the-ids-of-rejected-tokens",
        PREFIX,
        "del self.pages[num_pages:], self.token_ids[length:], self.digests[length // page_size :]",
        "del self.pages[num_pages:], self.digests[length // page_size :]",
        (f"{FOUND}::test_a_rolled_back_draft_is_not_taken_for_what_followed",),
    ),
    (
        "paged-finds-a-page-that-was-rewritten",
        PAGED,
        "self._pages.forget(record.pages[column])",
        "pass",
        (f"{FOUND}::test_rewriting_a_page_that_others_find_leaves_theirs_alone",),
    ),
    (
        "paged-evicts-what-was-freed-last",
        PAGES,
        "page = next(iter(self._kept))",
        "page = next(reversed(self._kept))",
        (
            f"{FOUND}::"
            "test_a_freed_prompt_is_found_until_its_pages_are_needed_tail_and_oldest_first",
        ),
    ),
    (
        "paged-evicts-the-beginning-of-a-prompt-first",
        PAGES,
        "for page in reversed(pages):",
        "for page in pages:",
        (
            f"{FOUND}::"
            "test_a_freed_prompt_is_found_until_its_pages_are_needed_tail_and_oldest_first",
        ),
    ),
    (
        "paged-leaves-freed-rows-readable",
        PAGED,
        "if discarded and self.scrub_on_free:",
        "if False:",
        (f"{CASES}::test_scrubbing_clears_what_nobody_can_come_to", MACHINE),
    ),
]
MUTANTS = [Mutant(*entry) for entry in _BREAKS]
