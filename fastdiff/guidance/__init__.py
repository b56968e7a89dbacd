"""Guidance: what changes a network's prediction on the way."""

from .auto import Auto
from .base import Guidance
from .classifier_free import ClassifierFree
from .log_likelihood import Classifier, LogLikelihood

__all__ = ["Auto", "Classifier", "ClassifierFree", "Guidance", "LogLikelihood"]
