"""All of the zoo, in order: importing the families fills `CASES`."""

from __future__ import annotations

from benchmarks.zoo import generative, language, sound, vision
from benchmarks.zoo.case import CASES

FAMILIES = (vision, language, generative, sound)

__all__ = ["CASES", "FAMILIES"]
