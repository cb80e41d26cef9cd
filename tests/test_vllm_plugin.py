"""The vLLM plugin beside a stand-in for vLLM: what it registers, when it is chosen, its step.

`tests/vllm_engine` holds the same backend against the real vLLM; `make test-vllm` runs it.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_stand_in
from helpers import poison_
from hypothesis import given
from hypothesis import strategies as st
from strategies import DecodeCase
from vllm_stand_in import AttentionBackendEnum, CPUMLABackend, resolve
from vllm_steps import cases, check_step, metadata_of, step

from mla.checks import ShapeError, UnsupportedError
from mla.codec import PlainCodec
from mla.view import CacheView

OURS = "mla.integrations.vllm"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config() -> Iterator[SimpleNamespace]:
    """vLLM's configuration; while it is there, imports find the stand-in."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield vllm_stand_in.install(monkeypatch)
    vllm_stand_in.forget()


@pytest.fixture
def plugin(config: SimpleNamespace) -> Iterator[ModuleType]:
    """The plugin, registered; settings of the test before are gone."""
    vllm_stand_in.OVERRIDES.clear()
    before = {name: vars(part).copy() for name, part in vars(config).items() if part is not None}
    module = importlib.import_module(OURS)
    module.register()
    yield module
    config.kv_transfer_config = None
    for name, values in before.items():
        vars(getattr(config, name)).update(values)


@pytest.fixture(scope="module")
def backend(config: SimpleNamespace) -> ModuleType:
    return importlib.import_module(f"{OURS}.backend")


def impl_of(backend: ModuleType, case: DecodeCase, **options: Any) -> Any:
    return backend.MLAImpl(scale=case.scale, kv_lora_rank=case.C, **options)


def example(**changes: Any) -> DecodeCase:
    fields = {
        "L": 3,
        "H": 2,
        "C": 24,
        "R": 6,
        "lengths": (5, 9, 7),
        "starts": None,
        "query_lengths": (2, 1, 3),
        "page_size": 4,
        "codec": PlainCodec(),
        "dtype": torch.float32,
        "magnitudes": (1.0, 1.0),
        "seed": 1,
    }
    return DecodeCase(**{**fields, **changes})


def test_without_vllm_the_import_says_what_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(OURS)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"{OURS}: vllm is not installed, exp")):
        importlib.import_module(OURS)
    assert OURS not in sys.modules


def test_the_package_names_the_entry_point(plugin):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    name, _, path = section.splitlines()[0].partition(" = ")
    module, _, function = path.split('"')[1].partition(":")
    assert name == "mla"
    assert getattr(importlib.import_module(module), function) is plugin.register


def test_custom_is_ours_and_others_are_left(plugin, backend, config):
    plugin.register()  # vLLM may call it again
    assert resolve(AttentionBackendEnum.CUSTOM.get_path()) is backend.MLABackend
    assert backend.MLABackend.get_name() == "CUSTOM"
    assert not AttentionBackendEnum.TRITON_MLA.is_overridden()
    for asked in (None, AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.TRITON_MLA):
        config.attention_config.backend = asked
        assert resolve(AttentionBackendEnum.CPU_MLA.get_path()) is CPUMLABackend
        assert resolve(AttentionBackendEnum.AMX_MLA.get_path()) is vllm_stand_in.AMXMLABackend


def test_the_cpu_platform_takes_ours_when_custom_is_asked(plugin, backend, config):
    attention = config.attention_config
    attention.backend = AttentionBackendEnum.CUSTOM
    assert resolve(AttentionBackendEnum.CPU_MLA.get_path()) is backend.MLABackend
    attention.backend_per_kind = {"mla_attention": AttentionBackendEnum.CPU_MLA}
    assert resolve(AttentionBackendEnum.CPU_MLA.get_path()) is CPUMLABackend
    attention.backend = None
    attention.backend_per_kind = {"mla_attention": AttentionBackendEnum.CUSTOM}
    assert resolve(AttentionBackendEnum.CPU_MLA.get_path()) is backend.MLABackend
    with pytest.raises(UnsupportedError, match=r"this CPU has AMX.*expected a CPU without"):
        resolve(AttentionBackendEnum.AMX_MLA.get_path())
    with pytest.raises(AttributeError, match="no attribute 'OTHER'"):
        resolve(f"{OURS}.choose.OTHER")


def test_another_plugin_keeps_the_place_it_took(plugin):
    vllm_stand_in.OVERRIDES.clear()
    vllm_stand_in.register_backend(AttentionBackendEnum.CPU_MLA, "theirs.Backend")
    plugin.register()
    assert AttentionBackendEnum.CPU_MLA.get_path() == "theirs.Backend"


def test_on_other_platforms_only_custom_is_registered(plugin, monkeypatch):
    vllm_stand_in.OVERRIDES.clear()
    platform = sys.modules["vllm.platforms"].current_platform
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    plugin.register()
    assert list(vllm_stand_in.OVERRIDES) == [AttentionBackendEnum.CUSTOM]


def test_a_vllm_without_the_table_is_left_with_a_warning(plugin, monkeypatch, caplog):
    vllm_stand_in.OVERRIDES.clear()
    monkeypatch.delattr(sys.modules["vllm.v1.attention.backends.registry"], "register_backend")
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "this vLLM has no table of backends" in caplog.text
    assert not vllm_stand_in.OVERRIDES


def test_what_is_not_tested_is_not_said_to_be_there(backend):
    found = backend.MLABackend
    assert not found.supports_compute_capability(None)
    assert not found.supports_kv_connector()
    assert not found.supports_device_cpu_query_lens_mismatch()
    assert found.supported_kv_cache_dtypes == ["auto"]
    impl = found.get_impl_cls()
    assert (impl.supports_pcp, impl.supports_dcp) == (False, False)
    assert (impl.can_return_lse_for_decode, impl.lse_base_on_e) == (True, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_transfer_config", SimpleNamespace()),
        ("decode_context_parallel_size", 2),
        ("prefill_context_parallel_size", 2),
    ],
)
def test_engines_that_are_not_tested_are_refused(plugin, backend, config, name, value):
    target = config if hasattr(config, name) else config.parallel_config
    setattr(target, name, value)
    with pytest.raises(UnsupportedError, match=f"{re.escape(OURS)}: {name} has a value, expected"):
        impl_of(backend, example())


def test_coded_caches_are_refused(plugin, backend):
    with pytest.raises(UnsupportedError, match="kv_cache_dtype has value 'fp8', expected 'auto'"):
        impl_of(backend, example(), kv_cache_dtype="fp8")


@given(case=cases(), whole=st.booleans())
def test_the_decode_step_matches_the_oracle(backend, case, whole):
    check_step(impl_of(backend, case), backend, case, whole=whole)


def test_the_builder_adds_where_the_tokens_stand(backend):
    case = example()
    view = case.view()
    starts = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    builder = object.__new__(backend.MLAMetadataBuilder)
    built = builder._build_decode(
        block_table_tensor=view.page_table,
        seq_lens_device=view.lengths,
        max_seq_len=9,
        query_start_loc_cpu=starts,
        query_start_loc_device=starts,
        num_decode_tokens=6,
        max_query_len=3,
        dcp_tot_seq_lens_device=None,
    )
    assert isinstance(built, vllm_stand_in.MLACommonDecodeMetadata)
    assert built.block_table is view.page_table and built.seq_lens is view.lengths
    assert built.most_queries == 3
    assert built.query_lengths.tolist() == [2, 1, 3] and built.query_lengths.dtype == torch.int32
    assert built.places.tolist() == [0, 1, 3, 6, 7, 8]
    alike = metadata_of(backend, replace(case, query_lengths=None), view)
    assert (alike.most_queries, alike.query_lengths, alike.places) == (3, None, None)


def test_the_cache_is_read_in_place(plugin, backend, monkeypatch):
    case = example()
    view = case.view()
    seen = []
    original = CacheView.paged

    def paged(rows: Any, table: Any, *arguments: Any, **options: Any) -> CacheView:
        seen.append((rows, table))
        return original(rows, table, *arguments, **options)

    monkeypatch.setattr(CacheView, "paged", staticmethod(paged))
    impl = impl_of(backend, case)
    expected = step(impl, backend, case, view=view)
    # Pages of several layers in turns, as in vLLM's default layout.
    layers = poison_(torch.empty(len(view.rows), 3, *view.rows.shape[1:]))
    layers[:, 1] = view.rows
    apart = replace(view, rows=layers[:, 1])
    found = step(impl, backend, case, view=apart)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert [(rows.data_ptr(), table.data_ptr()) for rows, table in seen] == [
        (x.rows.data_ptr(), x.page_table.data_ptr()) for x in (view, apart)
    ]
    assert apart.rows.data_ptr() == layers[:, 1].data_ptr()


def test_a_table_of_another_dtype_is_named(plugin, backend):
    case = example()
    view = case.view()
    wrong = replace(view, page_table=view.page_table.long())
    with pytest.raises(ShapeError, match=r"page_table has dtype torch\.int64, expected torch"):
        step(impl_of(backend, case), backend, case, view=wrong)
