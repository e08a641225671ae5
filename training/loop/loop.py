"""Loop: transformers' Trainer with our step, rows, checkpoints and words.

Owns: what Trainer asks of a subclass. To Trainer the whole run is one epoch of num_steps batches, each of them one
optimizer step; all that it would print, log, wrap, clip or pickle by itself is switched off or answered here. The
methods with a leading underscore are Trainer's own seams, the same in transformers 5.17 and 5.23; a test takes each.

Does not know: how a run begins. Place in a training run: made by `trainer.py`, lives for one ``train``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from training.loop.callbacks import Moments
from training.loop.checkpoints import ADAPTER
from training.loop.feed import StepLoader
from training.loop.optimizers import (
    load_optimizer,
    make_optimizer,
    make_scheduler,
    parameter_groups,
    rates_of,
    save_optimizer,
)
from training.loop.parts import LoopParts, Whole
from training.loop.reporters import eval_numbers, step_numbers
from training.loop.step import GradientStep

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from training.loop.observer import Ended, EvalReport
    from training.loop.stages import Span
    from training.loop.step import StepInput, StepResult

TRAINER_STATE: Final = "trainer_state.json"
"""The name by which Trainer looks for its own counts in a checkpoint."""


class Loop(Trainer):
    """One run."""

    def __init__(self, parts: LoopParts, args: TrainingArguments) -> None:
        self._parts = parts
        self._gradient = GradientStep(parts.model, parts.recipe, parts.ranks)
        self._span: Span | None = None
        self._result: StepResult | None = None
        self._rates: Mapping[str, float] = {}
        self._has_stalled = False
        moments = Moments(
            parts.recipe,
            parts.timeline,
            can_evaluate=parts.validation is not None or parts.eval_hook is not None,
            step_done=self._step_done,
            is_stop_wanted=self._is_stop_wanted,
        )
        super().__init__(model=parts.model, args=args, train_dataset=_Steps(), callbacks=[moments])
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    @property
    def ended(self) -> Ended:
        """Why no step follows, once none does."""
        if self._parts.course.state.step >= self._parts.timeline.num_steps:
            return "finished"
        return "early_stopping" if self._has_stalled else "interrupted"

    # ---- a step

    def get_train_dataloader(self) -> StepLoader:  # type: ignore[override]  # any iterable with a length will do
        """From the next step on."""
        parts = self._parts
        is_ahead = parts.model.base.device.type == "cuda"
        return StepLoader(parts.feed, parts.course.state.step, parts.timeline.num_steps, is_ahead=is_ahead)

    def get_batch_samples(
        self, epoch_iterator: Iterator[StepInput], num_batches: int, device: torch.device
    ) -> tuple[list[StepInput], None]:
        """One batch of Trainer's is one step of ours; labels are counted in the step."""
        return [next(epoch_iterator)], None

    def training_step(  # type: ignore[override]  # what comes in is our own loader's
        self, model: nn.Module, inputs: StepInput, num_items_in_batch: None = None
    ) -> Tensor:
        """Raises NonFiniteLoss."""
        span = self._parts.timeline.span_at(inputs.step)
        if span is not self._span:
            self._parts.model.set_trained_parts(span.parts)
            self._span = span
        model.train()
        self._rates = rates_of(cast("Optimizer", self.optimizer))
        self._result = self._gradient.run(inputs)
        return torch.tensor(self._result.loss, device=self.args.device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: object = None) -> float:
        return self._done.grad_norm

    def floating_point_ops(self, inputs: object) -> int:
        return 0

    @property
    def _done(self) -> StepResult:
        if self._result is None:
            raise RuntimeError("no step has been taken yet")
        return self._result

    def _step_done(self) -> None:
        report = self._parts.course.step_done(self._done, self._rates)
        if report.step % self._parts.recipe.log_steps == 0 or report.step == report.num_steps:
            self._tell(step_numbers(report))

    def _is_stop_wanted(self) -> bool:
        """Whether any process was asked to stop."""
        if self._parts.ranks.count == 1:
            return self._parts.stop.is_made
        wish = torch.tensor([int(self._parts.stop.is_made)], device=self._parts.model.base.device)
        return bool(self._parts.ranks.summed(wish).item())

    # ---- optimizer

    def create_optimizer(self, model: object = None) -> Optimizer:
        """Over the parameters of every stage."""
        parts = self._parts
        parts.model.set_trained_parts(parts.model.targets.parts)
        trainable = parts.model.trainable()
        groups = parameter_groups(trainable, parts.model.part_of, parts.recipe, parts.timeline)
        self.optimizer = made = make_optimizer(groups, parts.recipe, parts.model.base.device)
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        chosen = cast("Optimizer", self.optimizer) if optimizer is None else optimizer
        self.lr_scheduler = made = make_scheduler(chosen, self._parts.recipe, self._parts.timeline)
        self._created_lr_scheduler = True
        return made

    # ---- between steps

    def evaluate(  # Trainer's arguments have no meaning here
        self, eval_dataset: object = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """After the steps so far. The model is in training again afterwards, random streams are where they were."""
        parts, began = self._parts, time.perf_counter()
        device = parts.model.base.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            loss = None if parts.validation is None else parts.validation.loss(parts.model)
            scores = dict(parts.ranks.firsts(self._scores()))
        parts.model.train()
        report = parts.course.eval_done(loss, scores, time.perf_counter() - began)
        self._tell(eval_numbers(report))
        # takes back the wish for an evaluation, which Trainer would otherwise see once more at the end
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, eval_numbers(report)
        )
        self._keep(report)
        parts.course.pace.begin()
        return eval_numbers(report)

    def _scores(self) -> Mapping[str, float]:
        hook = self._parts.eval_hook
        return hook(self._parts.course.state.step) if hook is not None and self._parts.ranks.is_first else {}

    def _keep(self, report: EvalReport) -> None:
        """The best adapter, where the run may end with it."""
        if self._parts.recipe.early_stopping is None:
            return
        if report.is_best and self._parts.ranks.is_first:
            self._parts.checkpoints.write_best(report.step, self._fill_adapter)
        if self._parts.course.has_stalled:
            self._has_stalled = True
            self.control.should_training_stop = self.control.should_save = True

    def _save_checkpoint(self, model: object, trial: object) -> None:
        """Complete or absent; by the first process."""
        parts = self._parts
        is_end = self.control.should_training_stop
        state = parts.course.saved(self.ended if is_end else None)
        if parts.ranks.is_first:
            parts.checkpoints.write(state, parts.identity, self._fill)
        parts.ranks.wait()
        parts.course.pace.begin()

    def _fill(self, folder: Path) -> None:
        self._fill_adapter(folder)
        save_optimizer(cast("Optimizer", self.optimizer), cast("LambdaLR", self.lr_scheduler), folder)
        self.state.save_to_json(str(folder / TRAINER_STATE))

    def _fill_adapter(self, folder: Path) -> None:
        save_file(self._parts.model.state(), folder / ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        self._parts.model.load_state(load_file(Path(resume_from_checkpoint) / ADAPTER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            optimizer, scheduler = cast("Optimizer", self.optimizer), cast("LambdaLR", self.lr_scheduler)
            load_optimizer(optimizer, scheduler, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: each micro-batch has a stream of its own (`step.py`)."""

    # ---- what Trainer would do by itself

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own words are not passed on; ours go through ``_tell``."""

    def _tell(self, numbers: dict[str, float]) -> None:
        """To whoever ``report_to`` names."""
        self.callback_handler.on_log(self.args, self.state, self.control, numbers)

    def _wrap_model(self, model: object, training: bool = True, dataloader: object = None) -> nn.Module:
        return Whole(self._parts.model)

    def _move_model_to_device(self, model: object, device: object) -> None:
        """It lies where its base does."""


class _Steps(torch.utils.data.Dataset[Any]):
    """Something with a length, which Trainer insists on; rows come from the feed."""

    def __len__(self) -> int:
        return 1
