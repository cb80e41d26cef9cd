"""One-line breaks of caches in files and of the faces of other libraries."""

from tools.mutants import Mutant

FILES = "tests/test_cache_files.py"
PAGED = "tests/test_cache_files_paged.py"
FLASH_MLA = "tests/test_flash_mla.py"
FLASHINFER = "tests/test_flashinfer.py"

# (name, file, the line, the broken line, the tests that must notice)
_BREAKS = [
    (
        "file-trusts-its-rows",
        "mla/cache/files.py",
        'if _digest(tensor) != header["sha256"].get(name):',
        'if header["sha256"].get(name) is None:',
        (f"{FILES}::test_every_byte_of_the_rows_is_under_a_checksum",),
    ),
    (
        "file-trusts-its-header",
        "mla/cache/files.py",
        'if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):',
        'if "sha256" not in metadata:',
        (f"{FILES}::test_files_of_others_are_refused",),
    ),
    (
        "file-of-another-version-is-read",
        "mla/cache/files.py",
        'if metadata.get("version") != VERSION:',
        'if "version" not in metadata:',
        (f"{FILES}::test_files_of_others_are_refused",),
    ),
    (
        "file-checksum-leaves-out-the-last-byte",
        "mla/cache/files.py",
        "content = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())",
        "content = (ctypes.c_char * max(tensor.nbytes - 7, 0)).from_address(tensor.data_ptr())",
        (f"{FILES}::test_every_byte_of_the_rows_is_under_a_checksum",),
    ),
    (
        "file-is-written-in-place",
        "mla/cache/files.py",
        "unfinished = Path(name)",
        "unfinished = path",
        (f"{FILES}::test_a_crash_leaves_the_old_file",),
    ),
    (
        "file-of-a-crash-stays",
        "mla/cache/files.py",
        "unfinished.unlink(missing_ok=True)",
        "pass",
        (f"{FILES}::test_a_crash_leaves_the_old_file",),
    ),
    (
        "file-config-is-compared-in-its-widths-only",
        "mla/cache/files.py",
        '"rope",',
        "",
        (f"{FILES}::test_what_is_refused_by_name",),
    ),
    (
        "file-forgets-left-padding",
        "mla/cache/stored.py",
        "cache._set_starts(starts)",
        "pass",
        (f"{FILES}::test_restores_every_bit_and_goes_on",),
    ),
    (
        "file-of-a-fixed-cache-grows",
        "mla/cache/stored.py",
        '"max_length": cache.capacity if cache._is_fixed else None,',
        '"max_length": None,',
        (f"{FILES}::test_restores_every_bit_and_goes_on",),
    ),
    (
        "file-stores-a-step-that-is-not-finished",
        "mla/cache/stored.py",
        "if record.written < record.length:",
        "if record.written > record.length:",
        (f"{PAGED}::test_rows_that_are_not_written_are_refused",),
    ),
    (
        "file-cuts-a-shared-page-at-its-last-user",
        "mla/cache/stored.py",
        "used[page] = max(used.get(page, 0), end)",
        "used[page] = end",
        (f"{PAGED}::test_a_shared_page_is_stored_as_far_as_its_longest_user_has_it",),
    ),
    (
        "file-counts-restored-pages-once-too-often",
        "mla/cache/stored.py",
        "pool._pages.release(taken)  # their sequences use them now",
        "pass",
        (f"{PAGED}::test_another_number_of_pages",),
    ),
    (
        "file-forgets-what-the-pages-hold",
        "mla/cache/stored.py",
        "pool._pages.publish(page, digest)",
        "pass",
        (f"{PAGED}::test_tokens_find_the_same_pages_after_loading",),
    ),
    (
        "face-masks-what-is-not-causal",
        "mla/integrations/faces.py",
        "if causal or L <= 1:",
        "if causal or L >= 1:",
        (f"{FLASH_MLA}::test_matches_the_oracle", f"{FLASHINFER}::test_matches_the_oracle"),
    ),
    (
        "flash-mla-gives-minus-infinity-for-empty-rows",
        "mla/integrations/flash_mla.py",
        "return out, lse.masked_fill(lse == -math.inf, math.inf).transpose(1, 2).contiguous()",
        "return out, lse.transpose(1, 2).contiguous()",
        (f"{FLASH_MLA}::test_a_row_without_keys_is_zero_and_plus_infinity",),
    ),
    (
        "flash-mla-scales-by-the-latent-width",
        "mla/integrations/flash_mla.py",
        "scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,",
        "scale=head_dim_v**-0.5 if softmax_scale is None else softmax_scale,",
        (f"{FLASH_MLA}::test_the_default_scale_is_that_of_the_whole_query_width",),
    ),
    (
        "flashinfer-gives-the-natural-logarithm",
        "mla/integrations/flashinfer.py",
        "if not return_lse_base_on_e:",
        "if return_lse_base_on_e:",
        (f"{FLASHINFER}::test_matches_the_oracle",),
    ),
    (
        "flashinfer-takes-pages-of-the-row-before",
        "mla/integrations/flashinfer.py",
        "columns = torch.tensor(page_ends[:-1], dtype=torch.int64)[:, None]",
        "columns = torch.tensor([0, *page_ends[:-2]], dtype=torch.int64)[:, None]",
        (f"{FLASHINFER}::test_matches_the_oracle",),
    ),
    (
        "flashinfer-reads-any-two-buffers-as-one",
        "mla/integrations/flashinfer.py",
        "and kpe.storage_offset() == ckv.storage_offset() + ckv.shape[2]",
        "and kpe.storage_offset() >= ckv.storage_offset()",
        (f"{FLASHINFER}::test_slices_in_another_order_are_no_neighbours",),
    ),
]
MUTANTS = [Mutant(*entry) for entry in _BREAKS]
