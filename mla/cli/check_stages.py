"""The comparisons of `check` that come before the ops: rope, norms, scale, absorbing.

A stage asks `Question`s; each side of a question is computed only when it is asked.

Dims: B batch, L queries, H heads, C latent width, N unrotated width, R rotated width,
V value width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mla import absorb, rope
from mla.cli.check_compare import Question
from mla.cli.check_oracle import Oracle
from mla.cli.check_setup import Setup

FAR = (0, 1, 2, 17, 255, 1000, 4095, 9999)
SMALL_INPUT = 1e-3  # makes mean squares of about 1e-6, where a wrong eps shows


def rope_stage(setup: Setup) -> Iterator[Question]:
    """Frequencies, cos and sin far out, the rotation itself, and both in the layer."""
    config, R = setup.config, setup.config.qk_rope_head_dim
    if R and config.rope.pairing != "none":
        yield from _frequency_questions(setup)
        yield from _rotation_questions(setup)
    layer = setup.layer()
    hidden = setup.draw(2, 40, config.hidden_size, salt=1)
    positions = torch.arange(40, device=setup.device)
    # The layer may round cos and sin to the dtype, as transformers does.
    slack = 4 * torch.finfo(setup.dtype).eps
    yield Question(
        "rope",
        "queries of the layer",
        lambda: [layer.queries(hidden, positions)],
        lambda oracle: [oracle.queries(hidden, positions)],
        slack * 8,
    )
    yield Question(
        "rope",
        "shared key of the layer",
        lambda: [layer.latents(hidden, positions)[1]],
        lambda oracle: [oracle.latents(hidden, positions)[1]],
        slack * 4,
    )


def _frequency_questions(setup: Setup) -> Iterator[Question]:
    config, R = setup.config.rope, setup.config.qk_rope_head_dim
    contexts = {"frequencies": False}
    if config.scaling == "longrope":
        contexts["frequencies, long context"] = True
    for case, long in contexts.items():

        def expected(oracle: Oracle, long: bool = long) -> list[Tensor]:
            rules = oracle.conventions
            values = rules.inv_freq_long if long else rules.inv_freq
            return [rules.direction * torch.tensor(values, dtype=torch.float64)]

        def actual(long: bool = long) -> list[Tensor]:
            return [rope.inverse_frequencies(config, R, dtype=torch.float64, long=long)]

        yield Question("rope", case, actual, expected)


def _rotation_questions(setup: Setup) -> Iterator[Question]:
    config, R = setup.config, setup.config.qk_rope_head_dim
    far = torch.tensor(FAR, device=setup.device)
    near = torch.arange(7, device=setup.device)
    x = setup.draw(2, 7, R, salt=2)
    rounding = torch.finfo(setup.wide).eps

    def table(oracle: Oracle) -> list[Tensor]:
        angles = oracle.angles(far)
        return [oracle.conventions.amplitude * torch.cat([angles.cos(), angles.sin()], dim=-1)]

    yield Question(
        "rope",
        f"cos and sin up to position {FAR[-1]}",
        lambda: [torch.cat(rope.cos_sin(config.rope, R, far, dtype=setup.wide), dim=-1)],
        table,
        4 * rounding * FAR[-1],  # an angle of 1e4 has lost four digits
    )

    def rotated() -> list[Tensor]:
        cos, sin = rope.cos_sin(config.rope, R, near, dtype=setup.wide)
        return [rope.rotate(x, cos, sin, config.rope.pairing)]

    yield Question(
        "rope",
        "rotation of pairs",
        rotated,
        lambda oracle: [oracle.rotate(oracle.take(x), oracle.angles(near))],
        100 * rounding,
    )


def norm_stage(setup: Setup) -> Iterator[Question]:
    """Latent and query norm, on inputs so small that eps counts and on normal ones."""
    layer, D = setup.layer(), setup.config.hidden_size
    positions = torch.zeros(6, dtype=torch.int64, device=setup.device)
    for words, size in (("", 1.0), (", tiny inputs", SMALL_INPUT)):
        hidden = setup.draw(2, 6, D, salt=3, size=size)

        def latent(hidden: Tensor = hidden) -> list[Tensor]:
            return [layer.latents(hidden, positions)[0]]

        def expected_latent(oracle: Oracle, hidden: Tensor = hidden) -> list[Tensor]:
            return [oracle.latents(hidden, positions)[0]]

        yield Question("norm", f"latent{words}", latent, expected_latent)
        if setup.config.q_lora_rank is None:
            continue

        def query(hidden: Tensor = hidden) -> list[Tensor]:
            return [layer.queries(hidden, positions)]

        def expected_query(oracle: Oracle, hidden: Tensor = hidden) -> list[Tensor]:
            return [oracle.queries(hidden, positions)]

        slack = 16 * torch.finfo(setup.dtype).eps
        yield Question("norm", f"query{words}", query, expected_query, slack)


def scale_stage(setup: Setup) -> Iterator[Question]:
    """The number that scores are multiplied with; one key alone could not show it."""
    yield Question(
        "scale",
        "config.scale",
        lambda: [torch.tensor([setup.config.scale], dtype=torch.float64)],
        lambda oracle: [torch.tensor([oracle.conventions.scale], dtype=torch.float64)],
    )


def absorb_stage(setup: Setup) -> Iterator[Question]:
    """W_UK onto queries and W_UV onto outputs."""
    config = setup.config
    H, N, V = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    layer, query = setup.layer(), setup.queries(2, 3)
    out = setup.draw(2, 3, H, config.kv_lora_rank, salt=4)

    def cut() -> absorb.KeyValueWeights:
        return absorb.split_kv_b(absorb.effective_weight(layer.kv_b_proj), H, N, V)

    yield Question(
        "absorb",
        "W_UK onto queries",
        lambda: [absorb.absorb_queries(query[..., :N], cut().w_uk)],
        lambda oracle: [oracle.absorb(oracle.take(query))[0]],
    )
    yield Question(
        "absorb",
        "W_UV onto outputs",
        lambda: [absorb.absorb_output(out, cut().w_uv)],
        lambda oracle: [oracle.values(oracle.take(out))],
    )
