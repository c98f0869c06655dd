"""ONNX backend tests that NVIDIA's parser makes something else of than ONNX means, with the reason; by case id."""

from __future__ import annotations

DEVIATIONS: dict[str, str] = {}
