"""The forms that ours is timed against, the engines' adaptors, and each new benchmark at its least.

FlexAttention compiles C++ and is tested where the marker `inductor` runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import (
    baselines,
    bench_append,
    bench_conversion,
    bench_decode,
    bench_merge,
    bench_paging,
    bench_prefill,
    engines,
    flex,
    memory,
    notes,
)
from benchmarks.baselines import FLEX, HEADS, IN_HEAD_SPACE, PLAIN, SCALE
from benchmarks.harness import GateError, gate
from benchmarks.sweep import TOLERANCES, Options
from mla.codec import Int4Codec, Int8Codec, PlainCodec
from mla.ops import mla_decode
from mla.view import CacheView

OPTIONS = Options(quick=True, rounds=3, seconds=0.5)
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes and names of a CPU run")


@pytest.fixture(autouse=True)
def own_notes():
    """Lines that one test has seen are printed again in the next."""
    notes.skipped.cache_clear()


@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("codec", [PlainCodec(), Int4Codec()], ids=lambda codec: codec.kind)
def test_every_form_is_the_oracles_attention(L, codec):
    x = baselines.draw(torch.float32, B=2, H=3, S=37, L=L, codec=codec)
    runs = baselines.forms(x, (*PLAIN, *HEADS), bench="test")
    assert list(runs) == [*PLAIN, *HEADS]
    point = {"L": L, "codec": codec.kind}
    absorbed = {name: run() for name, run in runs.items() if name not in IN_HEAD_SPACE}
    gate(absorbed, expected=baselines.expected(x), tolerance=1e-4, point=point)
    baselines.check_heads(x, runs, tolerance=1e-4, point=point)
    ours = mla_decode(x.q_latent, x.q_rope, bench_decode.view_of(x, codec, 16), scale=SCALE).out
    gate({"ours": ours}, expected=baselines.expected(x), tolerance=1e-4, point=point)


@pytest.mark.inductor
@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_is_the_oracles_where_it_runs(name):
    reason = flex.reason_absent()
    if reason is not None:
        pytest.skip(reason)
    x = baselines.draw(torch.float32, B=1, H=2, S=19, L=2)
    runs = baselines.forms(x, (name,), bench="test")
    if name in IN_HEAD_SPACE:
        baselines.check_heads(x, runs, tolerance=1e-4, point={"S": 19})
    else:
        results = {name: runs[name]()}
        gate(results, expected=baselines.expected(x), tolerance=1e-4, point={"S": 19})


def test_a_wrong_form_in_head_space_is_refused():
    x = baselines.draw(torch.float32, B=1, H=2, S=9)
    runs = {"kept heads": lambda: 1.1 * baselines.kept_heads(x)()}
    with pytest.raises(GateError, match="kept heads at S=9"):
        baselines.check_heads(x, runs, tolerance=1e-4, point={"S": 9})


def test_what_is_left_out_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(flex, "reason_absent", lambda: "needs a C++ compiler: none")
    monkeypatch.setattr(baselines, "MAX_EXPANDED", 1)
    x = baselines.draw(torch.float32, B=1, H=2, S=9)
    for _ in range(2):
        assert list(baselines.forms(x, (*PLAIN, *HEADS, *FLEX), bench="test")) == [*PLAIN]
    assert capsys.readouterr().err.splitlines() == [
        "test: decompressed left out: H=2 B=1 S=9 has too many keys to expand",
        "test: kept heads left out: H=2 B=1 S=9 has too many keys to expand",
        "test: flex rows left out: needs a C++ compiler: none",
        "test: flex heads left out: H=2 B=1 S=9 has too many keys to expand",
    ]


def test_peak_counts_what_is_held_at_once_and_frees_what_is_not():
    x = torch.zeros(1 << 18)  # 1 MiB

    def run():
        y = x + 1
        z = y + 1
        del y
        return z + 1

    memory.peak_bytes(run)  # PyTorch's profiler may keep something at its first use
    assert memory.peak_bytes(run) == pytest.approx(2 << 20, rel=0.05)


def paged_case(*, L=1, lengths=(70, 130), Z=64, seed=0):
    """16-bit rows in pages of Z; unused table entries are garbage."""
    H, B = 3, len(lengths)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(9, Z, 576, generator=generator).bfloat16()
    table = torch.full((B, 4), 2**31 - 1, dtype=torch.int32)
    free = torch.randperm(9, generator=generator).tolist()
    for b, length in enumerate(lengths):
        for column in range(-(-length // Z)):
            table[b, column] = free.pop()
    view = CacheView.paged(rows, table, torch.tensor(lengths, dtype=torch.int32), C=512, R=64)
    queries = torch.randn(B, L, H, 576, generator=generator).bfloat16()
    return *queries.split([512, 64], dim=-1), view


def attention_of(query, keys, lengths, scale):
    """``[B, L, H, 512]`` in float64: queries ``[B, L, H, 576]``, ``keys[b]`` ``[S, 576]``."""
    out = []
    for b, length in enumerate(lengths):
        L = query.shape[1]
        rows = keys[b].double()
        scores = scale * torch.einsum("lhw,sw->lhs", query[b].double(), rows)
        seen = torch.arange(length) <= (length - L + torch.arange(L))[:, None]
        weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
        out.append(torch.einsum("lhs,sc->lhc", weights, rows[:, :512]))
    return torch.stack(out)


class FakeFlashMLA(ModuleType):
    def get_mla_metadata(self, cache_seqlens, heads_per_key_head, num_key_heads):
        self.metadata = (cache_seqlens.tolist(), heads_per_key_head, num_key_heads)
        return "plan", "splits"

    def flash_mla_with_kvcache(
        self, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
        num_splits, softmax_scale=None, causal=False,
    ):  # fmt: skip
        assert (tile_scheduler_metadata, num_splits, head_dim_v, causal) == (
            "plan", "splits", 512, True,
        )  # fmt: skip
        assert k_cache.shape == (9, 64, 1, 576) and block_table.dtype == torch.int32
        assert q.is_contiguous() and q.dtype == torch.bfloat16
        keys = [
            k_cache[row[: -(-n // 64)].long(), :, 0].flatten(0, 1)[:n]
            for row, n in zip(block_table, cache_seqlens.tolist(), strict=True)
        ]
        out = attention_of(q, keys, cache_seqlens.tolist(), softmax_scale)
        return out.to(q.dtype), None


class FakeFlashInfer(ModuleType):
    class BatchMLAPagedAttentionWrapper:
        def __init__(self, workspace, backend):
            assert workspace.dtype == torch.uint8 and workspace.numel() == 128 << 20
            assert backend == "auto"

        def plan(
            self, *, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv,
            head_dim_kpe, page_size, causal, sm_scale, q_data_type, kv_data_type,
        ):  # fmt: skip
            for tensor in (qo_indptr, kv_indptr, kv_indices, kv_len_arr):
                assert tensor.dtype == torch.int32
            assert (num_heads, head_dim_ckv, head_dim_kpe, causal) == (3, 512, 64, True)
            assert q_data_type == kv_data_type == torch.bfloat16
            self.made = SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"})

        def run(self, q_nope, q_pe, ckv_cache, kpe_cache, return_lse):
            assert not return_lse and q_nope.shape[1:] == (3, 512) and q_pe.shape[1:] == (3, 64)
            made = self.made
            cache = torch.cat([ckv_cache, kpe_cache], dim=-1)  # [P, Z, 576]
            assert cache.shape[1] == made.page_size
            ends, lengths = made.kv_indptr.tolist(), made.kv_len_arr.tolist()
            keys = [
                cache[made.kv_indices[ends[b] : ends[b + 1]].long()].flatten(0, 1)[:n]
                for b, n in enumerate(lengths)
            ]
            query = torch.cat([q_nope, q_pe], dim=-1).unflatten(0, (len(lengths), -1))
            assert made.qo_indptr.tolist() == [b * query.shape[1] for b in range(len(lengths) + 1)]
            out = attention_of(query, keys, lengths, made.sm_scale)
            return out.flatten(0, 1).to(q_nope.dtype)


class FakeSGLang(ModuleType):
    def decode_attention_fwd(
        self, q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse,
        num_kv_splits, max_kv_splits, sm_scale, k_scale, v_scale, logit_cap=0.0,
    ):  # fmt: skip
        B, H, _ = q.shape
        assert k_buffer.shape[1:] == (1, 576) and v_buffer.data_ptr() == k_buffer.data_ptr()
        assert attn_logits.shape == (B, H, max_kv_splits, 512) == (*attn_lse.shape, 512)
        assert attn_logits.dtype == attn_lse.dtype == torch.float32
        assert num_kv_splits.tolist() == [max_kv_splits] * B and k_scale == v_scale == 1.0
        assert kv_indptr.dtype == torch.int32 and kv_indices.dtype == torch.int64
        ends = kv_indptr.tolist()
        keys = [k_buffer[kv_indices[ends[b] : ends[b + 1]], 0] for b in range(B)]
        lengths = [len(rows) for rows in keys]
        o.copy_(attention_of(q[:, None], keys, lengths, sm_scale)[:, 0])


class FakeVLLM(ModuleType):
    def decode_attention_fwd(
        self, q, k_buffer, v_buffer, o, lse, req_to_token, b_seq_len, attn_logits,
        num_kv_splits, sm_scale, page_size=1, logit_cap=0.0,
    ):  # fmt: skip
        B, H, _ = q.shape
        assert k_buffer.shape[1:] == (page_size, 1, 576) and v_buffer.shape[-1] == 512
        assert attn_logits.shape == (B, H, num_kv_splits, 513) and lse.shape == (B, H)
        lengths = b_seq_len.tolist()
        keys = [
            k_buffer[row[: -(-n // page_size)].long(), :, 0].flatten(0, 1)[:n]
            for row, n in zip(req_to_token, lengths, strict=True)
        ]
        o.copy_(attention_of(q[:, None], keys, lengths, sm_scale)[:, 0])


FAKES = {
    "flash_mla": (engines.FLASH_MLA, FakeFlashMLA),
    "flashinfer": (engines.FLASHINFER, FakeFlashInfer),
    "sglang": (engines.SGLANG, FakeSGLang),
    "vllm": (engines.VLLM[0], FakeVLLM),
}


def install(monkeypatch, name):
    module, kind = FAKES[name]
    parts = module.split(".")
    for i in range(1, len(parts)):
        package = ModuleType(".".join(parts[:i]))
        package.__path__ = []
        package.__spec__ = importlib.util.spec_from_loader(package.__name__, None, is_package=True)
        monkeypatch.setitem(sys.modules, package.__name__, package)
    fake = kind(module)
    fake.__spec__ = importlib.util.spec_from_loader(module, None)
    monkeypatch.setitem(sys.modules, module, fake)
    return fake


@ON_CPU
@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize(("L", "Z"), [(1, 64), (2, 64), (1, 16)])
def test_an_engine_gets_our_cache_as_its_own_layout_and_gives_our_result(name, L, Z, monkeypatch):
    fake = install(monkeypatch, name)
    assert engines.available()[name] is None
    lengths = (70, 130) if Z == 64 else (17, 48)
    q_latent, q_rope, view = paged_case(L=L, Z=Z, lengths=lengths)
    if (name in ("sglang", "vllm") and L > 1) or (name == "flash_mla" and Z != 64):
        assert engines.refusal(name, view, L)
        return
    assert engines.refusal(name, view, L) is None
    run, reason = engines.prepared(name, q_latent, q_rope, view, SCALE)
    assert reason is None
    out = run()
    ours = mla_decode(q_latent.double(), q_rope.double(), _in_float64(view), scale=SCALE).out
    assert out.shape == q_latent.shape and out.dtype == torch.bfloat16
    gate({name: out}, expected=ours, tolerance=TOLERANCES["bfloat16"], point={"L": L})
    if name == "flash_mla":
        assert fake.metadata == ([70, 130], L * 3, 1)


def _in_float64(view):
    return CacheView.paged(view.rows.double(), view.page_table, view.lengths, C=512, R=64)


def test_engines_that_are_not_there_are_named_with_the_reason(capsys):
    x = baselines.draw(torch.bfloat16, B=1, H=2, S=70)
    missing = {name: reason for name, reason in engines.available().items() if reason}
    if len(missing) < len(FAKES):
        pytest.skip("an engine is installed here")
    assert missing["vllm"] == "vllm is not installed"
    assert "flash_mla" not in bench_decode.others(x, bench_decode.view_of(x, PlainCodec(), 64))
    assert "decode: flash_mla left out: flash_mla is not installed" in capsys.readouterr().err


def test_an_engine_that_raises_is_left_out_with_its_words(monkeypatch, capsys):
    fake = install(monkeypatch, "flash_mla")
    fake.flash_mla_with_kvcache = None
    x = baselines.draw(torch.bfloat16, B=1, H=2, S=70)
    found = bench_decode.others(x, bench_decode.view_of(x, PlainCodec(), 64))
    assert "flash_mla" not in found
    assert "flash_mla left out: TypeError: 'NoneType'" in capsys.readouterr().err


def test_engines_refuse_what_they_do_not_read():
    q_latent, _, view = paged_case()
    dense = CacheView.dense(view.rows, torch.ones(9, dtype=torch.int32), C=512, R=64)
    assert engines.refusal("vllm", dense, 1) == "needs a paged cache, neither padded nor sharded"
    assert "16-bit rows" in engines.refusal("vllm", _in_float64(view), 1)
    coded = Int8Codec().encode(*view.rows.split([512, 64], dim=-1))
    int8 = CacheView.paged(coded, view.page_table, view.lengths, C=512, R=64, codec=Int8Codec())
    assert engines.refusal("sglang", int8, 1) == "int8 rows are not attended densely"
    assert q_latent.shape[-1] == 512


DECODE = {**bench_decode.BASE, "S": 70, "H": 2}
TINY = bench_conversion.MODELS["tiny"]._asdict()
LEAST = [
    (bench_decode, {**DECODE, "L": 2}, {"bmm", "kept heads", "torch"}),
    (bench_decode, {**DECODE, "codec": "int8", "Z": 16}, {"bmm", "torch"}),
    (bench_prefill, {"mode": "forward", "dtype": "bfloat16", "H": 2, "L": 9}, {"sdpa", "torch"}),
    (bench_prefill, {"mode": "training", "dtype": "float32", "H": 2, "L": 9}, {"sdpa heads"}),
    (bench_append, {"form": "append", "dtype": "bfloat16", "codec": "plain", "B": 2, "L": 3,
                    "Z": 16}, {"index copy", "torch"}),
    (bench_append, {"form": "fused", "dtype": "bfloat16", "codec": "int4", "B": 1, "L": 2,
                    "Z": 0}, {"separate steps", "torch"}),
    (bench_merge, {"X": 3, "B": 1, "H": 2}, {"plain", "torch"}),
    (bench_paging, {"dtype": "bfloat16", "B": 2, "S": 64, "Z": 16}, {"dense", "paged"}),
    (bench_conversion, {"step": "convert", "model": "tiny", **TINY}, {"gqa_to_mla"}),
    (bench_conversion, {"step": "calibrate", "model": "tiny", **TINY, "T": 16}, {"moments"}),
]  # fmt: skip


@ON_CPU
@pytest.mark.parametrize(("bench", "point", "names"), LEAST)
def test_each_benchmark_measures_its_least_point(bench, point, names, monkeypatch):
    monkeypatch.setattr(flex, "reason_absent", lambda: "compiling takes seconds")
    rows = bench.BENCHMARK.rows_at(point, OPTIONS, lambda: None)
    assert {str(row["impl"]) for row in rows} >= names
    for row in rows:
        assert row["median_ms"] > 0 and row["device"] == "cpu"
        assert all(row[key] == value for key, value in point.items())


@ON_CPU
def test_figures_beside_the_times_are_of_the_right_form(monkeypatch):
    monkeypatch.setattr(flex, "reason_absent", lambda: "compiling takes seconds")
    rows = {r["impl"]: r for r in bench_decode.rows_at(DECODE, OPTIONS, lambda: None)}
    assert rows["bmm"]["bytes_per_token"] == rows["torch"]["bytes_per_token"] == 2 * 576
    assert rows["kept heads"]["bytes_per_token"] == 2 * 2 * (128 + 64 + 128)
    assert max(rows[name]["x_plain"] for name in PLAIN) == pytest.approx(1.0)
    assert rows["kept heads"]["x_heads"] == pytest.approx(1.0)
    assert rows["decompressed"]["peak_MiB"] > rows["bmm"]["peak_MiB"]


@ON_CPU
def test_the_page_check_is_the_difference_of_two_refusals():
    point = {"dtype": "bfloat16", "B": 2, "S": 64, "Z": 16}
    for impl in (bench_paging.ALL, bench_paging.ONE):
        assert bench_paging.setup(point, impl).units == bench_paging.CALLS
    view = bench_decode.view_of(bench_paging.of(point), PlainCodec(), 16)
    one = bench_paging.refused(view, pages=1)
    assert one.lengths.tolist() == [16, 0] and view.lengths.tolist() == [64, 64]
    for bad in (one, bench_paging.refused(view, pages=None)):
        with pytest.raises(bench_paging.ShapeError, match="page_table has pages"):
            bench_paging.decode(bench_paging.of(point), bad)
    rows = {r["impl"]: r for r in bench_paging.rows_at(point, OPTIONS, lambda: None)}
    paged, refusals = rows["paged"], (rows[bench_paging.ALL], rows[bench_paging.ONE])
    check = 1e3 * (refusals[0]["cpu_ms"] - refusals[1]["cpu_ms"])
    assert paged["check_us"] == pytest.approx(check)
    assert paged["check_share"] == pytest.approx(1e-3 * check / paged["cpu_ms"])


@pytest.mark.parametrize(
    ("bench", "name", "point"),
    [
        (bench_prefill, "mla_prefill", {"mode": "training", "dtype": "float32", "H": 2, "L": 9}),
        (bench_append, "mla_append", {**LEAST[4][1]}),
        (bench_merge, "merge_partials", {"X": 3, "B": 1, "H": 2}),
    ],
)
def test_a_wrong_implementation_is_not_timed(bench, name, point, monkeypatch):
    right = getattr(bench, name)

    def wrong(*tensors, **options):
        if name == "mla_append":
            return right(tensors[0], 1.5 * tensors[1], *tensors[2:], **options)
        result = right(*tensors, **options)
        return result._replace(out=1.5 * result.out)

    monkeypatch.setattr(bench, name, wrong)
    monkeypatch.setattr(flex, "reason_absent", lambda: "compiling takes seconds")
    with pytest.raises(GateError):
        bench.rows_at(point, OPTIONS, lambda: None)
