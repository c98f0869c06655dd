"""What it costs to look at every weight at every call: bytes per second, host time, and work beside it. Needs a GPU.

`python -m benchmarks.fingerprints` prints tables; `--cpu` those of the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from trt_dynamo.fingerprints import Fingerprints, fingerprint, kernel
from trt_dynamo.fingerprints.batches import BatchRows
from trt_dynamo.fingerprints.launches import ITEM, KernelRows, Lane
from trt_dynamo.fingerprints.spans import runs

MIB = 2**20
Weights = list[torch.Tensor]
# Sizes of tensors in bytes.
SETS: dict[str, list[int]] = {
    "200 x 4 KiB": [4096] * 200,
    "165 of 1 KiB to 9 MiB, 126 MiB": [9408 * 4]
    + [n * 4 for n in (65536, 147456, 262144, 589824, 1048576, 524288) * 9]
    + [2359296 * 4] * 3
    + [2048 * 1000 * 4]
    + [1024] * 106,
    "200 x 512 KiB": [MIB // 2] * 200,
    "1 of 500 MiB, 200 of 4 KiB": [500 * MIB] + [4096] * 200,
    "100 x 10 MiB": [10 * MIB] * 100,
    "100 x 100 MiB": [100 * MIB] * 100,
}


def tensors(sizes: list[int], device: str, offset: int = 0) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (n + 16,), dtype=torch.uint8, device=device)[offset : offset + n] for n in sizes]


def median(work: Callable[[], object], repeats: int = 200) -> float:
    """Microseconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def lane(prints: Fingerprints) -> Lane:
    assert isinstance(prints.rows, KernelRows)
    return prints.rows.lane()


def kernel_us(weights: list[torch.Tensor], blocks: int = 0, repeats: int = 20) -> float:
    """Time on the GPU of one launch among others like it."""
    prints = Fingerprints(weights)
    mine = lane(prints)
    if blocks:
        mine.blocks = min(len(mine.table) // ITEM.size, blocks)
    prints.record()
    for _ in range(3):
        prints.start(weights)
        prints.read(weights)
    stream = mine.stream
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record(stream)
    for _ in range(repeats):
        mine.tensors = None
        prints.start(weights)
    last.record(stream)
    last.synchronize()
    return float(first.elapsed_time(last)) / repeats * 1e3


def bandwidth() -> None:
    print("\n| weights | bytes | blocks | us | GB/s |\n| --- | --- | --- | --- | --- |")
    for name, sizes in SETS.items():
        weights = tensors(sizes, "cuda")
        for blocks in (132, 264, 528, 1056, 4224):
            us = kernel_us(weights, blocks)
            print(f"| {name} | {sum(sizes):,} | {blocks} | {us:.1f} | {sum(sizes) / us / 1e3:.0f} |", flush=True)
        del weights
    for offset in (4, 2, 1):
        us = kernel_us(tensors([10 * MIB] * 100, "cuda", offset))
        print(f"| 100 x 10 MiB, {offset} bytes off | | | {us:.1f} | {1000 * MIB / us / 1e3:.0f} |", flush=True)
    weights = tensors([10 * MIB] * 100, "cuda")
    out = [torch.empty_like(w) for w in weights]
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2):
        first.record()
        torch._foreach_copy_(out, weights)
        last.record()
        last.synchronize()
    print(f"| a copy of the same, read and written | | | | {2 * 1000 * MIB / first.elapsed_time(last) / 1e6:.0f} |")


def host_time() -> None:
    print("\n| tensors | record | start | read, nothing to wait for | all three | construct |\n" + "| --- " * 6 + "|")
    for count in (20, 200, 2000):
        weights = tensors([4096] * count, "cuda")
        prints = Fingerprints(weights)
        parts: list[list[float]] = [[], [], []]
        for _ in range(300):
            torch.cuda.synchronize()
            marks = [time.perf_counter()]
            prints.record()
            marks.append(time.perf_counter())
            prints.start(weights)
            marks.append(time.perf_counter())
            torch.cuda.synchronize()
            begin = time.perf_counter()
            prints.read(weights)
            marks.append(marks[-1] + time.perf_counter() - begin)
            for part, one, two in zip(parts, marks, marks[1:], strict=False):
                part.append((two - one) * 1e6)
        each = [statistics.median(part) for part in parts]
        construct = median(lambda w=weights: Fingerprints(w).rows, 20)  # type: ignore[misc]
        print(f"| {count} | {each[0]:.1f} | {each[1]:.1f} | {each[2]:.1f} | {sum(each):.1f} | {construct:.0f} |")


def throughput(engine: Callable[[], object], check: Callable[[Callable[[], object]], object], calls: int) -> float:
    """Microseconds per call of a loop, when the GPU is done."""
    for _ in range(5):
        check(engine)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        check(engine)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls * 1e6


def graph_of(work: Callable[[], object]) -> Callable[[], object]:
    """One launch, as an engine is."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def beside_work() -> None:
    a, b = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.randn(250_000_000 // 2, device="cuda", dtype=torch.bfloat16).view(-1, 5000)
    vector = torch.randn(5000, 1, device="cuda", dtype=torch.bfloat16)
    engines: dict[str, Callable[[], object]] = {
        "12 matmuls of 4096": graph_of(lambda: [torch.mm(a, b) for _ in range(12)]),
        "2 matmuls of 4096": graph_of(lambda: [torch.mm(a, b) for _ in range(2)]),
        "4 passes over 250 MB, matrix times vector": graph_of(lambda: [torch.mm(big, vector) for _ in range(4)]),
    }
    print("\n| engine | weights checked | us per call without | with | more |\n" + "| --- " * 5 + "|")
    for engine_name, engine in engines.items():
        for name in ("200 x 4 KiB", "200 x 512 KiB", "100 x 10 MiB"):
            weights = tensors(SETS[name], "cuda")
            plain = min(throughput(engine, lambda run: run(), 200) for _ in range(3))
            prints = Fingerprints(weights)

            def checked(run: Callable[[], object], p: Fingerprints = prints, w: Weights = weights) -> None:
                p.record()
                run()
                p.start(w)
                p.read(w)

            more = min(throughput(engine, checked, 200) for _ in range(3))
            cells = f"{engine_name} | {name} | {plain:.0f} | {more:.0f} | {more / plain - 1:+.0%}"
            print(f"| {cells} |", flush=True)


def torch_operations() -> None:
    print("\n| by torch's operations | ms |\n| --- | --- |")
    for name in list(SETS)[:-1]:
        weights = tensors(SETS[name], "cuda")
        rows = BatchRows([runs(w) for w in weights], weights[0].device)

        def work(rows: BatchRows = rows, weights: list[torch.Tensor] = weights) -> None:
            rows.start(weights)
            rows.read(weights)

        work()
        print(f"| {name} | {median(work, 5) / 1e3:.2f} |", flush=True)


def on_the_cpu() -> None:
    torch.set_num_threads(1)
    print("\n| weights | ms | GB/s, one thread |\n| --- | --- | --- |")
    for name in list(SETS)[:-1]:
        weights = tensors(SETS[name], "cpu")
        prints = Fingerprints(weights)
        prints.read(weights)
        us = median(lambda p=prints, w=weights: p.read(w), 5)  # type: ignore[misc]
        print(f"| {name} | {us / 1e3:.2f} | {sum(SETS[name]) / us / 1e3:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--beside", action="store_true", help="only the table of work beside it")
    options = parser.parse_args()
    if options.cpu:
        on_the_cpu()
        return
    print(torch.cuda.get_device_name(), torch.__version__)
    torch.zeros(1, device="cuda")
    begin = time.perf_counter()
    kernel.load(0)
    print(f"the kernel is there after {time.perf_counter() - begin:.3f} s")
    begin = time.perf_counter()
    fingerprint(tensors([4096] * 200, "cuda"))
    print(f"the first fingerprint after {time.perf_counter() - begin:.3f} s")
    if options.beside:
        beside_work()
        return
    host_time()
    bandwidth()
    beside_work()
    torch_operations()


if __name__ == "__main__":
    main()
