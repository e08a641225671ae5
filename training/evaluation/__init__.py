"""Judging: an adapter beside its base on the same held-out rows, and the gate. Begin with ``judge.evaluate``."""

from training.evaluation.answers import AnswerMemory, Progress, Quiet
from training.evaluation.errors import EvaluationError, GateError, MetricError
from training.evaluation.gate import GateResult
from training.evaluation.judge import Judging, OpenGenerator, check_judging, evaluate
from training.evaluation.loss import HeldOutLoss, Losses, unaugmented
from training.evaluation.samples import Sample, SampleBook
from training.evaluation.verdict import Verdict

__all__ = [
    "AnswerMemory",
    "EvaluationError",
    "GateError",
    "GateResult",
    "HeldOutLoss",
    "Judging",
    "Losses",
    "MetricError",
    "OpenGenerator",
    "Progress",
    "Quiet",
    "Sample",
    "SampleBook",
    "Verdict",
    "check_judging",
    "evaluate",
    "unaugmented",
]
