"""The loop of a healing: match layers, distil logits, measure, keep the best, write the state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mla.convert import compare_losses
from mla.integrations.converted.heal_match import layer_tasks, match_layer
from mla.integrations.converted.heal_records import HealOptions, HealReport, Measure
from mla.integrations.converted.heal_state import HealState, load_state, save_state, task_of

LEAST_SCALE = 1e-3  # of a parameter's values: a bias that is zero learns too
LAST_RATE = 0.1  # of the cosine, relative to the first

HealProgress = Callable[[str, int, int, float], None]  # (phase, done, in all, last loss)


class Healing:
    """The loop; what it has to remember is in `HealState`."""

    progress: HealProgress | None = None
    file: Path | None = None

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
        self.train, self.test = windows[: -options.held_out], windows[-options.held_out :]
        self.steps, self.limit, self.options = steps, seconds, options
        self.attentions = attentions
        self.parameters = [x for attention in attentions for x in attention.parameters()]
        self.scales = {
            id(x): max(float(x.detach().float().square().mean().sqrt()), LEAST_SCALE)
            for x in self.parameters
        }
        self.start, self.start_processor = time.perf_counter(), time.process_time()
        self.base = self.base_processor = 0.0  # seconds of earlier processes
        self.evaluation_seconds = 0.0

    # --- the whole ---------------------------------------------------------------------------

    def run(self, resume: bool) -> HealReport:
        task = task_of(
            self.options,
            self.steps,
            self.limit,
            windows=[self.train, self.test],
            weights=self.parameters,
        )
        self.task = task
        with torch.no_grad(), self._arithmetic():
            self.targets = [self._hidden(window) for window in self.test]
            self.original_losses = self._evaluate(self.original)[1]
        if resume:
            assert self.file is not None
            self.state = load_state(self.file, task, self.converted.device)
            self.base, self.base_processor = self.state.seconds, self.state.processor_seconds
            self._load(self.state.weights)
        else:
            measure, losses = self._measure(0)
            weights = self._weights()
            self.state = HealState(weights, weights, losses, measure, measure, losses)
        if not self.state.held_out:
            self._match()
        if self.state.stopped is None:
            self._distil()
        self._load(self.state.best)
        return self._report()

    def _report(self) -> HealReport:
        state = self.state
        return HealReport(
            steps=len(state.losses),
            tokens=len(state.losses) * self.train.shape[1],
            stopped=str(state.stopped),
            best_step=state.best_measure.step,
            seconds=state.seconds,
            processor_seconds=state.processor_seconds,
            before=compare_losses(self.original_losses, state.before_losses),
            after=compare_losses(self.original_losses, state.best_losses),
            divergence_before=state.before.divergence,
            divergence_after=state.best_measure.divergence,
            layers=tuple(state.layers),
            held_out=tuple(state.held_out),
            losses=tuple(state.losses),
        )

    def _match(self) -> None:
        """Layer by layer; taken back if the logits on held-out windows are no better for it."""
        state, options = self.state, self.options
        if options.match_steps:
            windows = torch.cat([self.train[: options.match_windows], self.test])
            with self._arithmetic():
                for index, layer in enumerate(layer_tasks(self.original, windows)):
                    if index < len(state.layers):
                        continue  # done before the interruption
                    matched = match_layer(
                        self.attentions[index],
                        layer,
                        held_out=options.held_out,
                        steps=options.match_steps,
                        make_optimizer=self._optimizer,
                        set_rate=lambda optimizer, step: self._set_rate(
                            optimizer, options.match_rate, step, step / options.match_steps
                        ),
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
        state, options = self.state, self.options
        optimizer = self._optimizer(self.parameters)
        if state.optimizer is not None:
            optimizer.load_state_dict(state.optimizer)
        while state.stopped is None:
            step = len(state.losses)
            if step == self.steps or self._share_of_time() >= 1.0:
                state.stopped = "steps" if step == self.steps else "time"
            else:
                loss = self._step(optimizer, step)
                state.losses.append(loss)
                self._tell("distil", step + 1, self.steps, loss)
                if not math.isfinite(loss):
                    state.stopped = "divergence"
            is_last = state.stopped is not None
            step = len(state.losses)
            if (is_last and state.held_out[-1].step < step) or step % options.evaluate_every == 0:
                if state.held_out[-1].step < step:
                    measure, losses = self._measure(step)
                    state.held_out.append(measure)
                    self._consider(measure, losses)
                waited = sum(x.step > state.best_measure.step for x in state.held_out)
                if not is_last and waited >= options.patience:
                    state.stopped = "no improvement"
            if state.stopped is not None or step % options.save_every == 0:
                state.optimizer = optimizer.state_dict()
                self._save()

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """One window; returns its loss before the step."""
        window = self.train[self._window_of(step)]
        with self._arithmetic():
            with torch.no_grad():
                hidden = self._hidden(window)
            loss = self._divergence(hidden, self._logits(self.converted, window)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.options.clip)
        done = max(step / self.steps, self._share_of_time())
        self._set_rate(optimizer, self.options.learning_rate, step, done)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    # --- parts -------------------------------------------------------------------------------

    def _window_of(self, step: int) -> int:
        """Every window once before any twice, in an order of its own each time."""
        epoch, index = divmod(step, len(self.train))
        rng = torch.Generator().manual_seed(self.options.seed + epoch)
        return int(torch.randperm(len(self.train), generator=rng)[index])

    def _optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": [x], "scale": self.scales[id(x)]} for x in parameters]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def _set_rate(
        self, optimizer: torch.optim.Optimizer, rate: float, step: int, done: float
    ) -> None:
        """Warm up by steps, then fall with ``done``, the share of the way that lies behind."""
        warm = min(1.0, (step + 1) / (self.options.warmup + 1))
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"] * warm * (LAST_RATE + (1.0 - LAST_RATE) * cosine)

    def _arithmetic(self) -> torch.autocast:
        """bfloat16 products where they are asked for, or the frozen weights are stored so."""
        model = self.converted.get_input_embeddings().weight.dtype
        is_on = self.options.bfloat16 or model == torch.bfloat16
        return torch.autocast(self.converted.device.type, torch.bfloat16, enabled=is_on)

    def _hidden(self, window: Tensor) -> Tensor:
        """``[T, D]`` of the original before its head."""
        hidden: Tensor = self.original.base_model(input_ids=window[None], use_cache=False)[0][0]
        return hidden

    def _logits(self, model: Any, window: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0]
        return logits

    def _divergence(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """``[T]`` KL(original || converted) in float32, or the wider dtype of the logits."""
        with torch.no_grad():
            wanted = self.original.get_output_embeddings()(hidden)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        found, wanted = (F.log_softmax(x, dim=-1, dtype=dtype) for x in (logits, wanted))
        return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)

    @torch.no_grad()
    def _evaluate(self, model: Any) -> tuple[float, Tensor]:
        """Mean divergence and ``[W, T-1]`` losses in nats, on the held-out windows."""
        divergences, losses = [], []
        with self._arithmetic():
            for window, hidden in zip(self.test, self.targets, strict=True):
                logits = self._logits(model, window)
                divergences.append(self._divergence(hidden, logits).mean())
                loss = F.cross_entropy(logits[:-1].float(), window[1:], reduction="none")
                losses.append(loss.double().cpu())
        return float(torch.stack(divergences).mean()), torch.stack(losses)

    def _measure(self, step: int) -> tuple[Measure, Tensor]:
        start = time.perf_counter()
        divergence, losses = self._evaluate(self.converted)
        self.evaluation_seconds = time.perf_counter() - start
        change = float((losses - self.original_losses).mean())
        return Measure(step, divergence, math.exp(min(change, 100.0))), losses

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
            state.weights = self._weights()
            save_state(self.file, state, self.task)
