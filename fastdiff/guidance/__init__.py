"""Guidance: what changes a network's prediction on the way."""

from .base import Guidance

__all__ = ["Guidance"]
