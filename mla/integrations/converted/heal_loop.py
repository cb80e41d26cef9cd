"""The loop of a healing: match layers, distil logits, measure, keep the best, write the state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mla.convert import compare_losses
from mla.integrations.converted.heal_match import layer_tasks, match_layer
from mla.integrations.converted.heal_measure import Judge, logits_of
from mla.integrations.converted.heal_records import HealOptions, HealReport, Measure
from mla.integrations.converted.heal_state import HealState, load_state, save_state, task_of

LEAST_SCALE = 1e-3  # of a parameter's values: a bias that is zero learns too
LAST_RATE = 0.1  # of the cosine, relative to the first

HealProgress = Callable[[str, int, int, float], None]  # (phase, done, in all, last loss)


def window_of(step: int, count: int, seed: int) -> int:
    """Every one of ``count`` windows once before any twice, in an order of its own each time."""
    epoch, index = divmod(step, count)
    rng = torch.Generator().manual_seed(seed + epoch)
    return int(torch.randperm(count, generator=rng)[index])


def rate_at(step: int, done: float, warmup: int) -> float:
    """Share of the learning rate: warm up by steps, fall with ``done``, the share of the way."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return min(1.0, (step + 1) / (warmup + 1)) * (LAST_RATE + (1.0 - LAST_RATE) * cosine)


class Healing:
    """One call of `heal`; what it has to remember is in `HealState`."""

    progress: HealProgress | None = None
    file: Path | None = None
    state: HealState

    def __init__(
        self,
        converted: Any,
        original: Any,
        windows: Tensor,
        steps: int,
        seconds: float | None,
        options: HealOptions,
        attentions: Sequence[nn.Module],
    ) -> None:
        self.converted, self.original = converted, original
        self.windows, self.steps, self.limit, self.options = windows, steps, seconds, options
        self.attentions = attentions
        self.parameters = [x for attention in attentions for x in attention.parameters()]
        self.scales = {
            id(x): max(float(x.detach().float().square().mean().sqrt()), LEAST_SCALE)
            for x in self.parameters
        }
        self.start, self.start_processor = time.perf_counter(), time.process_time()
        self.base = self.base_processor = 0.0  # seconds of earlier processes
        self.evaluation_seconds = 0.0

    def run(self, resume: bool) -> HealReport:
        """All of it; the converted model has the best weights afterwards."""
        held_out = self.options.held_out
        self.task = task_of(
            self.options, self.steps, self.limit, windows=[self.windows], weights=self.parameters
        )
        self.train, test = self.windows[:-held_out], self.windows[-held_out:]
        if resume and self.file is not None:
            self.state = load_state(self.file, self.task)
            self.base, self.base_processor = self.state.seconds, self.state.processor_seconds
            self._load(self.state.weights)
        self.judge = Judge(self.original, test, bfloat16=self.options.bfloat16)
        if not resume:
            measure, losses = self._measure(0)
            weights = self._weights()
            self.state = HealState(weights, weights, losses, measure, measure, losses)
        if not self.state.held_out:
            self._match()
        if self.state.stopped is None:
            self._distil()
        self._load(self.state.best)
        return self._report()

    def _match(self) -> None:
        """Layer by layer; taken back if the logits on held-out windows are no better for it."""
        state, options = self.state, self.options
        if options.match_steps:
            windows = torch.cat([self.train[: options.match_windows], self.judge.windows])
            with self.judge.arithmetic():
                for index, layer in enumerate(layer_tasks(self.original, windows)):
                    if index < len(state.layers):
                        continue  # done before an interruption
                    matched = match_layer(
                        self.attentions[index],
                        layer,
                        held_out=options.held_out,
                        steps=options.match_steps,
                        optimizer=self._optimizer(list(self.attentions[index].parameters())),
                        set_rate=self._set_match_rate,
                    )
                    state.layers.append(matched)
                    self._tell("match", len(state.layers), len(self.attentions), matched.after)
                    if len(state.layers) % options.save_every == 0:
                        self._save()
            self._consider(*self._measure(0))
            if state.best_measure == state.before:
                self._load(state.best)
        state.held_out.append(state.best_measure)
        state.match_seconds = self._spent()
        self._save()

    def _distil(self) -> None:
        """Step by step, until steps, time or patience end."""
        state, options = self.state, self.options
        optimizer = self._optimizer(self.parameters)
        if state.optimizer is not None:
            optimizer.load_state_dict(state.optimizer)
        while state.stopped is None:
            step = len(state.losses)
            if step == self.steps or self._share_of_time() >= 1.0:
                state.stopped = "steps" if step == self.steps else "time"
            else:
                state.losses.append(self._step(optimizer, step))
                step += 1
                self._tell("distil", step, self.steps, state.losses[-1])
                if not math.isfinite(state.losses[-1]):
                    state.stopped = "divergence"
            is_due = step % options.evaluate_every == 0 or state.stopped is not None
            if is_due and state.held_out[-1].step < step:
                measure, losses = self._measure(step)
                state.held_out.append(measure)
                self._consider(measure, losses)
                waited = sum(x.step > state.best_measure.step for x in state.held_out)
                if state.stopped is None and waited >= options.patience:
                    state.stopped = "no improvement"
            if step % options.save_every == 0 or state.stopped is not None:
                state.optimizer = optimizer.state_dict()
                self._save()

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """One window; returns its loss before the step."""
        window = self.train[window_of(step, len(self.train), self.options.seed)]
        with self.judge.arithmetic():
            with torch.no_grad():
                hidden = self.judge.hidden(window)
            loss = self.judge.divergence(hidden, logits_of(self.converted, window)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.options.clip)
        done = max(step / self.steps, self._share_of_time())
        self._set_rate(optimizer, self.options.learning_rate, step, done)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def _optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": [x], "scale": self.scales[id(x)]} for x in parameters]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def _set_rate(
        self, optimizer: torch.optim.Optimizer, rate: float, step: int, done: float
    ) -> None:
        share = rate_at(step, done, self.options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * share * group["scale"]

    def _set_match_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        self._set_rate(optimizer, self.options.match_rate, step, step / self.options.match_steps)

    def _measure(self, step: int) -> tuple[Measure, Tensor]:
        start = time.perf_counter()
        result = self.judge.measure(self.converted, step)
        self.evaluation_seconds = time.perf_counter() - start
        return result

    def _consider(self, measure: Measure, losses: Tensor) -> None:
        """Keep the weights of now if they are the best ones."""
        if measure.divergence < self.state.best_measure.divergence:
            self.state.best, self.state.best_losses = self._weights(), losses
            self.state.best_measure = measure

    def _spent(self) -> float:
        return self.base + time.perf_counter() - self.start

    def _share_of_time(self) -> float:
        """Of the distillation's, whose end leaves time to measure once more."""
        if self.limit is None:
            return 0.0
        begin = self.state.match_seconds
        left = self.limit - self.evaluation_seconds - begin
        return 1.0 if left <= 0 else (self._spent() - begin) / left

    def _tell(self, phase: str, done: int, of: int, loss: float) -> None:
        if self.progress is not None:
            self.progress(phase, done, of, loss)

    def _weights(self) -> list[Tensor]:
        return [x.detach().to("cpu", copy=True) for x in self.parameters]

    @torch.no_grad()
    def _load(self, weights: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, weights, strict=True):
            parameter.copy_(value)

    def _save(self) -> None:
        state = self.state
        state.seconds = self._spent()
        state.processor_seconds = self.base_processor + time.process_time() - self.start_processor
        if self.file is not None:
            is_best = bool(state.held_out) and state.best_measure.step == len(state.losses)
            state.weights = state.best if is_best else self._weights()  # stored once if the same
            save_state(self.file, state, self.task)

    def _report(self) -> HealReport:
        state = self.state
        return HealReport(
            steps=len(state.losses),
            tokens=len(state.losses) * self.windows.shape[1],
            stopped=str(state.stopped),
            best_step=state.best_measure.step,
            seconds=state.seconds,
            processor_seconds=state.processor_seconds,
            before=compare_losses(self.judge.losses, state.before_losses),
            after=compare_losses(self.judge.losses, state.best_losses),
            divergence_before=state.before.divergence,
            divergence_after=state.best_measure.divergence,
            layers=tuple(state.layers),
            held_out=tuple(state.held_out),
            losses=tuple(state.losses),
        )
