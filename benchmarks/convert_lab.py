"""One model to convert, the text it is judged on, and every way of making its cache smaller.

    Lab.converted    `convert_model`, sizes of layers allocated, at most a number of bytes
    Lab.published    the published objective (`mla.convert.published`), at most as many bytes
    Lab.losses       of any of them, its rows coded, over the same windows

The model is surveyed once, into a folder: a run that was cut off goes on there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla.cli.costs import grouped_sizes
from mla.codec import Codec
from mla.config import MLAConfig
from mla.convert import token_losses
from mla.convert.allocate import allocate
from mla.convert.choose import size_step
from mla.convert.survey import Survey
from mla.integrations.converted import (
    coded_rows,
    convert_model,
    read_host,
    survey_model,
)
from mla.integrations.converted.heal import HealOptions, heal
from mla.integrations.converted.hosts import decoder_layers
from mla.integrations.converted.quantised_gqa import GroupedCodec, quantised_rows
from mla.plan import grouped_bytes_per_token

SURVEYED = (0.25, 0.5, 0.75)  # mean shares of numbers; sizes of a layer are from half to 1.5 times
HEAL_STEPS, HEAL_CONTEXT = 10_000, 512  # more steps than there is time for
Progress = Callable[[str, int, int], None]  # (what is done, steps done, steps in all)


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


class Converted(NamedTuple):
    """A converted model, and the share of the cached numbers that it keeps."""

    model: Any
    kv_budget: float

    @property
    def configs(self) -> list[MLAConfig]:
        """Of its layers."""
        return [layer.self_attn.mla.config for layer in decoder_layers(self.model)]


class Lab:
    """A model, its calibration windows and its evaluation windows.

    Args:
        model: a Llama-type causal language model of transformers, in eval mode; never changed.
        calibration, evaluation: ``[W, T]`` token ids of different text.
        folder: for the survey; None: in memory.
        progress: called while something long is done.
    """

    def __init__(
        self,
        model: Any,
        calibration: Tensor,
        evaluation: Tensor,
        *,
        folder: Path | None = None,
        progress: Progress = silent,
    ) -> None:
        self.model, self.calibration, self.evaluation = model, calibration, evaluation
        self.folder, self.progress = folder, progress
        self.host = read_host(model)
        # Conversions share all but the attention, so some of them fit into memory.
        self._held = lru_cache(maxsize=4)(self.convert)

    @cached_property
    def survey(self) -> Survey:
        """What is known about the layers; made once."""
        return survey_model(
            self.model,
            self.calibration,
            kv_budgets=SURVEYED,
            folder=self.folder,
            progress=lambda done, total: self.progress("survey layers", done, total),
        )

    @cached_property
    def original_losses(self) -> Tensor:
        """``[W, T-1]`` of the unconverted model."""
        return self._losses(self.model, "evaluate original")

    @property
    def original_bytes(self) -> int:
        """That all layers of the unconverted model cache for one token, in 16 bits."""
        _, _, G, d = grouped_sizes(self.model.config)
        return self.host.num_layers * grouped_bytes_per_token(G, d)

    def losses(self, converted: Converted, codec: Codec) -> Tensor:
        """``[W, T-1]`` with rows as ``codec`` stores them."""
        with coded_rows(converted.model, codec):
            return self._losses(converted.model, "evaluate converted")

    def grouped_losses(self, codec: GroupedCodec) -> Tensor:
        """``[W, T-1]`` of the unconverted model with a quantised cache."""
        with quantised_rows(self.model, codec):
            return self._losses(self.model, "evaluate quantised")

    def converted(self, share: float, codec: Codec) -> Converted:
        """At most ``share`` of the original's bytes in rows of ``codec``; at best full rank."""
        return self._held(self.numbers(share, codec))

    def numbers(self, share: float, codec: Codec) -> int:
        """Cached numbers of all layers whose rows fit into ``share`` of the original's bytes.

        Raises:
            ValueError: the smallest sizes that were surveyed take more.
        """
        room, step = share * self.original_bytes, self.size_step
        if self.bytes_of(self.full, codec) <= room:
            return self.full
        least = sum(min(option.size for option in layer) for layer in self.options)
        low, high = -(-least // step), self.full // step  # low fits, high does not
        if self.bytes_of(low * step, codec) > room:
            raise ValueError(f"convert-report: {codec.spec} rows do not fit into {share:.0%}")
        while high - low > 1:
            middle = (low + high) // 2
            is_small = self.bytes_of(middle * step, codec) <= room
            low, high = (middle, high) if is_small else (low, middle)
        return low * step

    @property
    def full(self) -> int:
        """Cached numbers of the original, all layers together."""
        return 2 * self.host.num_layers * self.host.num_kv_heads * self.host.head_dim

    @property
    def size_step(self) -> int:
        return size_step(self.host.num_kv_heads, self.host.head_dim)

    @cached_property
    def options(self) -> list[Any]:
        """Measured errors of every layer by size."""
        return [layer.options for layer in self.survey]

    def _sizes(self, numbers: int) -> list[tuple[int, int]]:
        """(R, C) of each layer."""
        if numbers == self.full:
            half = self.host.num_kv_heads * self.host.head_dim
            return [(half, half)] * self.host.num_layers
        return [(option.rope_dim, option.latent_dim) for option in allocate(self.options, numbers)]

    def bytes_of(self, numbers: int, codec: Codec) -> int:
        """Bytes of a token when that many numbers are shared out among the layers."""
        return sum(row_bytes(codec, R, C) for R, C in self._sizes(numbers))

    def convert(self, numbers: int) -> Converted:
        """With that many cached numbers in all layers together; shares all but the attention."""
        share = 1.0 if numbers == self.full else (numbers + 0.5) / self.full  # rounded down there
        found = convert_model(
            self.model,
            self.calibration,
            kv_budget=share,
            survey=self.survey,
            convert_progress=lambda done, total: self.progress("convert layers", done, total),
        )
        return Converted(found.model, numbers / self.full)

    def healed(self, numbers: int, *, minutes: float) -> Converted:
        """The same after a distillation of at most ``minutes``, on the calibration text."""
        found = self.convert(numbers)  # a model of its own: its attention is trained
        length = min(HEAL_CONTEXT, self.calibration.shape[1])
        count = self.calibration.shape[1] // length
        windows = self.calibration[:, : count * length].reshape(-1, length)
        state = None
        if self.folder is not None:
            state = self.folder / f"heal-{numbers}-{minutes:g}.pt"
        heal(
            found.model,
            self.model,
            windows,
            steps=HEAL_STEPS,
            seconds=60 * minutes,
            # Matching layer by layer gains less than the same time of distillation.
            options=HealOptions(bfloat16=True, match_steps=0),
            state=state,
            resume=state is not None and state.exists(),
            progress=lambda phase, done, total, loss: self.progress(f"heal: {phase}", done, total),
        )
        return found

    def published(self, share: float, codec: Codec, fold: int) -> Converted:
        """The published objective: the same R = d and C in all layers, within the same bytes."""
        R = self.host.head_dim
        full, room = self.full // self.host.num_layers, share * self.original_bytes
        step, most = self.size_step, full - R
        fitting = [
            C
            for C in {most, *range(step, most, step)}
            if self.host.num_layers * row_bytes(codec, R, C) <= room
        ]
        if not fitting:
            raise ValueError(f"convert-report: {codec.spec} rows of R = {R} take over {share:.0%}")
        return Converted(self.published_model((R, max(fitting)), fold), (R + max(fitting)) / full)

    def published_model(self, sizes: tuple[int, int], fold: int) -> Any:
        """The published objective with (R, C) in all layers."""
        return convert_model(
            self.model,
            self.calibration,
            kv_budget=sizes,
            objective="published",
            fold=fold,
            survey=self.survey,
            convert_progress=lambda done, total: self.progress("published objective", done, total),
        ).model

    def _losses(self, model: Any, what: str) -> Tensor:
        return token_losses(
            model, self.evaluation, progress=lambda done, total: self.progress(what, done, total)
        )


def row_bytes(codec: Codec, R: int, C: int) -> int:
    """Bytes of one row of one layer, plain values in 16 bits."""
    return codec.row_width(C, R) * codec.storage_dtype(torch.bfloat16).itemsize
