"""Which ways of writing a weight move its version, its address or the count of optimizer steps, and which move its
fingerprint. `python -m benchmarks.weight_writes [cpu|cuda]` prints a table.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from trt_dynamo.fingerprints import fingerprint

Model = nn.Linear
Write = Callable[[Model], Any]

STEPS = [0]


def counted(*_: object) -> None:
    STEPS[0] += 1


def no_grad(write: Write) -> Write:
    return torch.no_grad()(write)


def step(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Write:
    def write(m: Model) -> None:
        m.weight.grad = torch.ones_like(m.weight)
        kind([m.weight], lr=0.1, **options).step()

    return write


def compiled_step(backend: str) -> Write:
    def write(m: Model) -> None:
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)

        @torch.compile(backend=backend)
        def train(x: torch.Tensor) -> None:
            m(x).sum().backward()
            optimizer.step()

        train(torch.ones(2, m.in_features, device=m.weight.device))

    return write


def averaged(m: Model) -> None:
    """As a target network follows: the model is the average's own copy."""
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(m.in_features, m.out_features).to(m.weight.device))
    average.module = m
    average.update_parameters(nn.Linear(m.in_features, m.out_features).to(m.weight.device))
    average.update_parameters(nn.Linear(m.in_features, m.out_features).to(m.weight.device))


def in_thread(m: Model) -> None:
    thread = threading.Thread(target=lambda: m.weight.data.add_(1))
    thread.start()
    thread.join()


def by_address(m: Model) -> None:
    ctypes.memset(m.weight.data_ptr(), 7, 4)


def in_process(m: Model) -> None:
    m.share_memory()
    child = torch.multiprocessing.get_context("fork").Process(target=lambda: m.weight.data.add_(1))
    child.start()
    child.join()


def collective(what: Callable[[Model], Any]) -> Write:
    """What a rank sees when another one's weights come, by gloo in two processes."""

    def write(m: Model) -> None:
        with tempfile.TemporaryDirectory() as folder:
            method = torch.multiprocessing.get_context("spawn")
            other = method.Process(target=first_rank, args=(folder, what.__name__, m.weight.device.type))
            other.start()
            join_group(folder, 1)
            what(m)
            torch.distributed.destroy_process_group()
            other.join()

    return write


def join_group(folder: str, rank: int) -> None:
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)


def first_rank(folder: str, what: str, device: str) -> None:
    join_group(folder, 0)
    torch.manual_seed(7)
    COLLECTIVES[what](nn.Linear(8, 8).to(device))
    torch.distributed.destroy_process_group()


def broadcast(m: Model) -> None:
    torch.distributed.broadcast(m.weight.data, 0)


def all_reduce(m: Model) -> None:
    torch.distributed.all_reduce(m.weight.data)


def wrap_in_ddp(m: Model) -> None:
    nn.parallel.DistributedDataParallel(m)


COLLECTIVES = {each.__name__: each for each in (broadcast, all_reduce, wrap_in_ddp)}


def in_two_parts(write: Write) -> Write:
    """It prepares, and returns what is to be judged."""
    write.two_parts = True  # type: ignore[attr-defined]
    return write


def graphed(body: Callable[[Model], Any]) -> Write:
    """Captured by the user; what is judged is one more replay."""

    def prepare(m: Model) -> Callable[[], None]:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run = body(m)
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        torch.cuda.synchronize()
        return graph.replay

    return in_two_parts(prepare)


def captured_adamw(m: Model) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1, capturable=True)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    return optimizer.step


def captured_write(m: Model) -> Callable[[], Any]:
    return lambda: m.weight.data.add_(1)


def on_another_stream(m: Model) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        m.weight.data.add_(1)
    torch.cuda.current_stream().wait_stream(stream)


def in_triton(m: Model) -> None:
    import triton  # type: ignore[import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def kernel(p):  # type: ignore[no-untyped-def]
        tl.store(p, 7.0)

    kernel[(1,)](m.weight)


@in_two_parts
def pinned(m: Model) -> Callable[[], None]:
    m.cpu()
    m.weight.data = m.weight.data.pin_memory()

    def fill() -> None:
        m.weight.data.copy_(torch.ones(8, 8, device="cuda"), non_blocking=True)
        torch.cuda.synchronize()

    return fill


def fill_storage(m: Model) -> None:
    storage: Any = m.weight.untyped_storage()
    storage.fill_(3)


def tied(m: Model) -> None:
    other = nn.Linear(8, 8, device=m.weight.device)
    other.weight = m.weight
    other.weight.data.add_(1)


SEEN: dict[str, Write] = {
    "`p.mul_()` under `no_grad`": no_grad(lambda m: m.weight.mul_(2)),
    "`p.mul_()` in `inference_mode`": torch.inference_mode()(lambda m: m.weight.mul_(2)),
    "`p.detach().mul_()`": lambda m: m.weight.detach().mul_(2),
    "`nn.init.zeros_(p)`": lambda m: nn.init.zeros_(m.weight),
    "`load_state_dict()`": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "`load_state_dict(assign=True)`": lambda m: m.load_state_dict(
        {k: v + 1 for k, v in m.state_dict().items()}, assign=True
    ),
    "`state_dict()['weight'].mul_()`": lambda m: m.state_dict()["weight"].mul_(2),
    "`p.data = t`": lambda m: setattr(m.weight, "data", torch.zeros_like(m.weight)),
    "`vector_to_parameters`": lambda m: nn.utils.vector_to_parameters(
        torch.zeros(72, device=m.weight.device), m.parameters()
    ),
    "`m.weight = nn.Parameter(t)`": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros_like(m.weight))),
    "`m.to(torch.float64)`": lambda m: m.to(torch.float64),
    "`AveragedModel.update_parameters`": averaged,
    "SGD, foreach": step(torch.optim.SGD, foreach=True),
    "SGD, fused": step(torch.optim.SGD, fused=True),
    "AdamW, foreach": step(torch.optim.AdamW, foreach=True),
    "AdamW, fused": step(torch.optim.AdamW, fused=True),
    "AdamW compiled with the training step, aot_eager": compiled_step("aot_eager"),
    "AdamW compiled with the training step, inductor": compiled_step("inductor"),
    "`p.data.mul_()`, `p.data += d`": lambda m: m.weight.data.mul_(2),
    "a slice of `p.data`": lambda m: m.weight.data[2, 3:4].zero_(),
    "`p.data.copy_()`": lambda m: m.weight.data.copy_(torch.zeros_like(m.weight)),
    "`torch._foreach_mul_([p.data])`": lambda m: torch._foreach_mul_([m.weight.data], 2),
    "`p.data` of a tied weight": tied,
    "`p.untyped_storage().fill_()`": fill_storage,
    "in place through DLPack": lambda m: torch.utils.dlpack.from_dlpack(m.weight.detach()).add_(1),
    "`p.data.add_()` in another thread": in_thread,
    "`dist.broadcast(p.data)`, gloo": collective(broadcast),
    "`dist.all_reduce(p.data)`, gloo": collective(all_reduce),
    "DDP's broadcast when it wraps the model, gloo": collective(wrap_in_ddp),
}
ONLY: dict[str, dict[str, Write]] = {
    "cpu": {
        "a write through `p.detach().numpy()`": lambda m: m.weight.detach().numpy().__setitem__((1, 1), 5),
        "a write to the address": by_address,
        "`share_memory()` and a write by another process": in_process,
    },
    "cuda": {
        "`p.data.add_()` on another stream, waited for": on_another_stream,
        "a Triton kernel of the user's": in_triton,
        "a replay of the user's CUDA graph that writes `p.data`": graphed(captured_write),
        "a replay of a captured AdamW (`capturable=True`)": graphed(captured_adamw),
        "a pinned CPU parameter, filled from the GPU": pinned,
    },
}
NOTHING: dict[str, Write] = {
    "`torch.save`, `copy.deepcopy`, `state_dict()`": lambda m: torch.save(m.state_dict(), os.devnull),
}
NOTHING_CUDA: dict[str, Write] = {
    "`empty_cache()`": lambda m: torch.cuda.empty_cache(),
    "`p.record_stream(s)`": lambda m: m.weight.record_stream(torch.cuda.Stream()),
}


def observed(write: Write, device: str) -> list[bool]:
    """Whether the version, the address, the tensor itself, the count of steps and the fingerprint moved."""
    m = nn.Linear(8, 8).to(device)
    torch._dynamo.reset()
    act = write(m) if hasattr(write, "two_parts") else lambda: write(m)
    p = m.weight
    before = (p._version, p.data_ptr(), STEPS[0], fingerprint([p]))
    act()
    now = m.weight
    after = (now._version, now.data_ptr(), STEPS[0], fingerprint([now]))
    if now is not p:
        return [False, after[1] != before[1], True, after[2] != before[2], after[3] != before[3]]
    moved = [a != b for a, b in zip(after, before, strict=True)]
    return [moved[0], moved[1], False, *moved[2:]]


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    register_optimizer_step_post_hook(counted)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}\n")
    print("| write | version | address | other tensor | optimizer's hook | fingerprint |\n" + "| --- " * 6 + "|")
    for name, write in {**SEEN, **ONLY[device], **NOTHING, **(NOTHING_CUDA if device == "cuda" else {})}.items():
        try:
            cells = ["yes" if each else "-" for each in observed(write, device)]
        except Exception as error:  # noqa: BLE001 a machine without a compiler, say
            cells = [f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
