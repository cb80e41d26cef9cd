"""The decode step of vLLM's real classes against the oracle, built by hand, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from hypothesis import given
from hypothesis import strategies as st
from strategies import DecodeCase
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms.interface import DeviceCapability
from vllm_steps import cases, check_step

from mla.checks import UnsupportedError
from mla.codec import PlainCodec
from mla.integrations.vllm import backend


@pytest.fixture(scope="module")
def config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


def impl_of(case: DecodeCase, **changes: Any) -> backend.MLAImpl:
    options: dict[str, Any] = {
        "num_heads": case.H,
        "head_size": case.C + case.R,
        "scale": case.scale,
        "num_kv_heads": 1,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        "logits_soft_cap": None,
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
        "q_lora_rank": None,
        "kv_lora_rank": case.C,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": case.R,
        "qk_head_dim": 8 + case.R,
        "v_head_dim": 8,
        "kv_b_proj": None,
    }
    return backend.MLAImpl(**{**options, **changes})


@given(case=cases(), whole=st.booleans())
def test_the_decode_step_matches_the_oracle(config, case, whole):
    check_step(impl_of(case), backend, case, whole=whole)


@pytest.mark.parametrize("dtype", backend.MLABackend.supported_dtypes)
@pytest.mark.parametrize("width", backend.MLABackend.get_supported_head_sizes())
def test_every_size_and_dtype_that_is_promised(config, width, dtype):
    case = example(C=width - 64, R=64, H=5, dtype=dtype)
    check_step(impl_of(case), backend, case, whole=False)
    case = replace(case, page_size=5, query_lengths=(1, 4, 2), L=4)
    check_step(impl_of(case), backend, case, whole=True)


def example(**changes: Any) -> DecodeCase:
    options: dict[str, Any] = {
        "L": 1,
        "lengths": (33, 4, 16),
        "starts": None,
        "query_lengths": None,
        "page_size": 16,
        "codec": PlainCodec(),
        "magnitudes": (1.0, 1.0),
        "seed": 3,
    }
    return DecodeCase(**{**options, **changes})


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"head_size": 288}, "head_size not supported"),
        ({"use_mla": False}, "non-MLA not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"use_kv_connector": True}, "KV connector not supported"),
        ({"use_pcp": True}, "PCP not supported"),
        ({"use_dcp": True}, "DCP not supported"),
    ],
)
def test_what_is_not_tested_is_not_promised(asked, reason):
    """As a platform that asks hears it; the CPU platform does not ask."""
    options: dict[str, Any] = {
        "head_size": 576,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": True,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
    }
    on_a_gpu = "compute capability not supported"
    assert backend.MLABackend.validate_configuration(**options) == [on_a_gpu]
    found = backend.MLABackend.validate_configuration(**{**options, **asked})
    assert set(found) == {on_a_gpu, reason}


def test_coded_caches_and_engines_that_are_not_tested_are_refused(config, monkeypatch):
    with pytest.raises(UnsupportedError, match="kv_cache_dtype has value 'fp8', expected 'auto'"):
        impl_of(example(H=1, C=8, R=4, dtype=torch.float32), kv_cache_dtype="fp8")
    monkeypatch.setattr(config.parallel_config, "decode_context_parallel_size", 2)
    with pytest.raises(UnsupportedError, match="decode_context_parallel_size has a value"):
        impl_of(example(H=1, C=8, R=4, dtype=torch.float32))
