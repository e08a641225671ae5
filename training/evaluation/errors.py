"""Errors of judging.

EvaluationError
|- MetricError       a metric that nobody knows, or that cannot be computed here
|- GateError         a rule that cannot be read, or that names what will not be there
"""

from __future__ import annotations


class EvaluationError(Exception):
    """Anything that stops judging."""


class MetricError(EvaluationError):
    """A metric that nobody knows, or that cannot be computed from these rows."""


class GateError(EvaluationError):
    """A gate rule that cannot be read, or that names a number which will not be there."""
