"""A plan as a model of Triton Inference Server. In: the plan, and what goes in and out of it. Out: a folder with
`config.pbtxt` and `1/model.plan`, in the layout of Triton's model repositories.

Where dim 0 of all inputs and outputs is one and the same size, that varies and may be 1, it is the batch: Triton then
puts requests together. Else the model says `max_batch_size: 0`, and its dims are all there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

TYPES = {
    torch.float32: "TYPE_FP32",
    torch.float16: "TYPE_FP16",
    torch.bfloat16: "TYPE_BF16",
    torch.int64: "TYPE_INT64",
    torch.int32: "TYPE_INT32",
    torch.int8: "TYPE_INT8",
    torch.uint8: "TYPE_UINT8",
    torch.bool: "TYPE_BOOL",
}


@dataclasses.dataclass(frozen=True)
class PlanTensor:
    """An input or output of a plan: each dim as its size or expression, its smallest and its largest. A shape tensor is
    a number that the engine reads on the host."""

    name: str
    dtype: torch.dtype
    dims: tuple[tuple[str, int, int], ...]
    shape_tensor: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The dims as TensorRT has them, -1 for those that vary."""
        return tuple(low if low == high else -1 for _, low, high in self.dims)

    def __str__(self) -> str:
        dims = [str(low) if low == high else f"{low}..{high}" for _, low, high in self.dims]
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {kind} [{', '.join(dims)}]" + (" on the host" if self.shape_tensor else "")


def write_model(
    repository: Path, name: str, plan: bytes, inputs: Sequence[PlanTensor], outputs: Sequence[PlanTensor]
) -> Path:
    """Writes the model's folder, its version 1 replaced where it was there, and says where it is.

    Raises:
        OSError: the disk refuses.
    """
    folder = repository / name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    write(folder / "1" / "model.plan", plan)
    write(folder / "config.pbtxt", config_of(name, inputs, outputs).encode())
    return folder


def config_of(name: str, inputs: Sequence[PlanTensor], outputs: Sequence[PlanTensor]) -> str:
    """The text of `config.pbtxt`."""
    batch = largest_batch([*inputs, *outputs])
    parts = [f"name: {json.dumps(name)}", 'platform: "tensorrt_plan"', f"max_batch_size: {batch}"]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        blocks = [[f"{kind} [", "  {", *tensor_lines(each, batched=batch > 0), "  }", "]"] for each in tensors]
        parts += ["\n".join(lines) for lines in blocks]
    return "\n".join(parts + (["dynamic_batching { }"] if batch else [])) + "\n"


def largest_batch(tensors: Sequence[PlanTensor]) -> int:
    """The largest size of dim 0, where it is the batch; else 0."""
    firsts = {each.dims[0] if each.dims else None for each in tensors}
    first = firsts.pop() if len(firsts) == 1 else None
    if first is None or any(each.shape_tensor for each in tensors):
        return 0
    _, low, high = first
    return high if low <= 1 < high else 0


def tensor_lines(tensor: PlanTensor, *, batched: bool) -> list[str]:
    """The fields of an input or output. Triton wants a dim where there is none, and takes it away again."""
    dims = tensor.shape[1:] if batched else tensor.shape
    lines = [
        f"    name: {json.dumps(tensor.name)}",
        f"    data_type: {TYPES[tensor.dtype]}",
        f"    dims: [ {', '.join(map(str, dims or (1,)))} ]",
    ]
    if not dims:
        lines.append("    reshape { shape: [ ] }")
    if tensor.shape_tensor:
        lines.append("    is_shape_tensor: true")
    return lines


def write(file: Path, data: bytes) -> None:
    """Writes a file that others may be reading: they see the old one or the new one."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".new.")
    with open(descriptor, "wb") as out:
        out.write(data)
    os.chmod(name, 0o644)  # a server reads as another user
    os.replace(name, file)
