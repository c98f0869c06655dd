"""Rows of fingerprints: every change of content shows, nothing else does. On CUDA by both ways; run by hand there."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import trt_dynamo.fingerprints as package
from tests.compiled import in_threads
from trt_dynamo.errors import Unsupported
from trt_dynamo.fingerprints import ROW, Fingerprints, batches, fingerprint, kernel, launches, spans
from trt_dynamo.fingerprints.batches import BatchRows
from trt_dynamo.fingerprints.host import CHUNK, HostRows
from trt_dynamo.fingerprints.launches import KernelRows

CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Where the tensors are, and what computes the rows.
WAYS: dict[str, tuple[str, type]] = {
    "host": ("cpu", HostRows),
    "batches_cpu": ("cpu", BatchRows),
    "batches": ("cuda:0", BatchRows),
    "kernel": ("cuda:0", KernelRows),
}


@pytest.fixture(params=[pytest.param(way, marks=CUDA if WAYS[way][0] != "cpu" else []) for way in WAYS])
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device, with `Fingerprints` made to take one way."""
    where, kind = WAYS[request.param]
    if kind is BatchRows:
        monkeypatch.setattr(package, "rows_on", lambda at, layout: BatchRows(layout, at))
        monkeypatch.setattr(batches, "BATCH", 2**18)
    rows: Any = Fingerprints([torch.zeros(1, device=where)]).rows
    assert type(rows) is kind
    return where


def rows(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    whole = fingerprint(tensors)
    assert len(whole) == ROW * len(tensors)
    return [whole[i : i + ROW] for i in range(0, len(whole), ROW)]


def random_bytes(count: int, device: str) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128),
]

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda base: base,
    "transposed": lambda base: base.t(),
    "flat slice": lambda base: base.view(-1)[1:-2],
    "columns": lambda base: base[:, 1:4],
    "every second": lambda base: base[:, ::2],
    "one column": lambda base: base[:, 3],
    "expanded": lambda base: base[:, 2:3].expand(-1, 9),
    "overlapping": lambda base: base.view(-1).as_strided((5, 4), (2, 1)),
    "scalar": lambda base: base[2, 2],
}


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(dtype, "contiguous") for dtype in DTYPES]
    + [(dtype, layout) for layout in list(LAYOUTS)[1:] for dtype in (torch.float32, torch.bool)],
    ids=str,
)
def test_each_byte_of_each_element_counts_and_no_other(device: str, dtype: torch.dtype, layout: str) -> None:
    base = torch.zeros(6, 7, dtype=dtype, device=device)
    memory = base.view(-1).view(torch.uint8)
    memory.copy_(random_bytes(len(memory), device) & (1 if dtype == torch.bool else 255))
    view = LAYOUTS[layout](base)
    numbers = torch.arange(base.numel()).view(base.shape)
    inside = set(LAYOUTS[layout](numbers).reshape(-1).tolist())
    prints = Fingerprints([view])

    def now() -> bytes:
        prints.record()
        prints.start([view])
        return prints.read([view])

    before = now()
    width = base.element_size()
    for byte in range(0, len(memory), max(1, width // 2)):
        memory[byte] ^= 1
        assert (now() != before) == (byte // width in inside), byte
        memory[byte] ^= 1
    assert now() == before


@pytest.mark.parametrize("many", [False, True])
def test_gaps_count_only_between_many_pieces(device: str, many: bool) -> None:
    count = spans.MOST_RUNS + many
    base = random_bytes(2 * count, device).view(count, 2)
    view = base[:, 0]
    before = fingerprint([view])
    for index in (0, 1, count // 2, count - 1):
        base[index, 0] ^= 128
        assert fingerprint([view]) != before
        base[index, 0] ^= 128
    base[count // 2, 1] ^= 128
    assert (fingerprint([view]) != before) == many


SIZES = [1, 3, 15, 16, 17, 127, 129, 4095, 8191, 8192, 8193, 65535, 65536, 65537, 2**18 - 1, 2**18 + 1, 2**18 + 8]
SIZES += [2**18 + 12, 2**19 + 4, 2**20 + 13]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_the_chunks(device: str, size: int) -> None:
    tensor = random_bytes(size, device)
    before = fingerprint([tensor])
    edges = {0, 1, size // 2, size - 1, size - 2, size - 4, size - 5, size - 8, size - 9, size - 16, size - 17}
    for step in (16, 128, 4096, 32768, 65536, 2**18):
        edges |= {step - 1, step, size // step * step - 1, size // step * step}
    seen = {before}
    for byte in sorted(each for each in edges if 0 <= each < size):
        tensor[byte] ^= 1
        seen.add(fingerprint([tensor]))
        tensor[byte] ^= 1
    assert len(seen) == 1 + len([each for each in edges if 0 <= each < size])
    assert fingerprint([tensor]) == before


@pytest.mark.parametrize("size", [5, 1000, 70000, 300007])
def test_equal_content_gives_equal_rows_wherever_it_lies(device: str, size: int) -> None:
    content = random_bytes(size, device)
    found = set()
    for offset in range(17):
        memory = random_bytes(size + 40, device)
        memory[offset : offset + size] = content
        found.add(fingerprint([memory[offset : offset + size]]))
    assert len(found) == 1


# Changes of many elements at once, to which sums of products can be blind.
CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "neg": lambda t: t.neg_(),
    "neg of two": lambda t: t[:2].neg_(),
    "neg of neighbours": lambda t: t[1:4].neg_(),
    "neg of every second": lambda t: t[::2].neg_(),
    "neg of every other": lambda t: t[1::2].neg_(),
    "reverse": lambda t: t.copy_(t.flip(0)),
    "roll": lambda t: t.copy_(t.roll(1)),
    "roll by a group": lambda t: t.copy_(t.roll(128 // t.element_size())),
    "swap two": lambda t: t[:2].copy_(t[:2].flip(0)),
    "swap halves": lambda t: t.copy_(t.roll(t.numel() // 2)),
    "sort": lambda t: t.copy_(t.sort().values),
    "one and minus one": lambda t: t[:2].add_(torch.tensor([1, -1], device=t.device)),
    "double": lambda t: t.mul_(2),
    "zero": lambda t: t.zero_(),
    "invert": lambda t: t.view(torch.uint8).bitwise_not_(),
    "highest bits": lambda t: t.view(torch.uint8)[7::8].bitwise_xor_(128),
    "lowest bits": lambda t: t.view(torch.uint8)[::8].bitwise_xor_(1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64])
def test_changes_that_cancel_in_plain_sums(device: str, dtype: torch.dtype, change: str) -> None:
    for count in (6, 4096, 70_000):
        tensor = (torch.randn(count, device=device) * 99).to(dtype)
        tensor[:2] = torch.tensor([3, 7], device=device)
        other = tensor.clone()
        before = rows([tensor, other])
        CHANGES[change](tensor)
        assert torch.equal(tensor, other) or rows([tensor, other])[0] != before[0]
        assert rows([tensor, other])[1] == before[1] == before[0]


def test_rows_are_in_order_and_each_its_own(device: str) -> None:
    tensors = [torch.randn(n, device=device) for n in (1, 10, 0, 5000, 100_000, 3)]
    before = rows(tensors)
    assert rows(tensors[::-1]) == before[::-1]
    for index in (0, 1, 3, 4, 5):
        tensors[index].data[-1] += 1
        now = rows(tensors)
        assert [a != b for a, b in zip(now, before, strict=True)] == [i == index for i in range(len(tensors))]
        before = now


def test_no_bits_of_a_row_stand_still(device: str) -> None:
    tensors = [torch.tensor([i], device=device) for i in range(200)]
    bits = torch.tensor([[byte >> i & 1 for byte in row for i in range(8)] for row in rows(tensors)]).double()
    assert bits.mean(0).min() > 0.25 and bits.mean(0).max() < 0.75
    assert len(set(rows(tensors))) == 200


@pytest.mark.parametrize("shapes", [[], [(0,)], [(0, 3), (2,), (4, 0)]])
def test_nothing_to_read(device: str, shapes: list[tuple[int, ...]]) -> None:
    tensors = [torch.ones(shape, device=device) for shape in shapes]
    assert rows(tensors) == rows(tensors)


def test_the_rows_are_the_same_in_every_thread(device: str) -> None:
    tensors = [torch.randn(n, device=device) for n in (7, 1000, 50_000, 400_000)]
    prints = Fingerprints(tensors)
    expected = fingerprint(tensors)

    def work(_: int) -> None:
        for _ in range(20):
            prints.record()
            prints.start(tensors)
            assert prints.read(tensors) == expected

    in_threads(8, work)


class Refusing(TorchDispatchMode):
    """Sees whatever is dispatched in it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is none of the user's business")


def test_modes_and_defaults_of_the_user_see_nothing(device: str) -> None:
    tensors = [torch.randn(n, device=device) for n in (7, 100_000)]
    expected = fingerprint(tensors)
    mode: Any = Refusing()  # type: ignore[no-untyped-call]
    with mode, torch.device("meta"), torch.inference_mode():
        assert fingerprint(tensors) == expected
    prints = Fingerprints(tensors)
    with torch.inference_mode():
        prints.record()
        prints.start(tensors)
        assert prints.read(tensors) == expected
    prints.record()
    prints.start(tensors)
    assert prints.read(tensors) == expected


def test_it_holds_no_tensor_and_no_storage(device: str) -> None:
    tensors = [torch.randn(100_000, device=device)]
    storage = weakref.ref(tensors[0].untyped_storage())
    prints = Fingerprints(tensors)
    prints.record()
    prints.start(tensors)
    prints.read(tensors)
    version = tensors[0]._version
    assert version == 0
    tensors.clear()
    gc.collect()
    assert storage() is None
    del prints


def test_copy_on_write_tensors_stay_unwritten(device: str) -> None:
    tensor = torch.randn(100_000, device=device)
    lazy = torch._lazy_clone(tensor)
    assert fingerprint([lazy]) == fingerprint([tensor])
    assert torch._C._is_cow_tensor(lazy)  # type: ignore[attr-defined]
    assert torch._C._is_cow_tensor(tensor)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    ],
    ids=["meta", "sparse", "nested"],
)
def test_what_has_no_bytes_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(Unsupported):
        fingerprint([tensor])


def test_emptied_memory_is_refused() -> None:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(Unsupported, match="given back"):
        fingerprint([tensor])


def test_many_devices_are_refused() -> None:
    with pytest.raises(Unsupported, match="several devices: cpu, meta"):
        fingerprint([torch.ones(1), torch.ones(1, device="meta")])


def step(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Parameter], None]:
    def write(p: nn.Parameter) -> None:
        p.grad = torch.ones_like(p)
        kind([p], lr=0.1, **options).step()  # type: ignore[call-arg]

    return write


def through_numpy(p: nn.Parameter) -> None:
    p.detach().numpy()[3, 3] += 1


def from_a_thread(p: nn.Parameter) -> None:
    thread = threading.Thread(target=lambda: p.data.add_(1))
    thread.start()
    thread.join()


def average(p: nn.Parameter) -> None:
    p.data.mul_(0.9).add_(torch.ones_like(p) * 0.1)


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "data.mul_": lambda p: p.data.mul_(2),
    "data slice": lambda p: p.data[1, 2:3].zero_(),
    "data.copy_": lambda p: p.data.copy_(torch.ones_like(p)),
    "data +=": lambda p: p.data.__iadd__(1),
    "average": average,
    "detach().neg_": lambda p: p.detach().neg_(),
    "vector element": lambda p: p.data.view(-1)[-1:].add_(1),
    "thread": from_a_thread,
    "foreach": lambda p: torch._foreach_mul_([p.data], 2),
    "SGD": step(torch.optim.SGD),
    "SGD foreach": step(torch.optim.SGD, foreach=True),
    "SGD fused": step(torch.optim.SGD, fused=True),
    "AdamW foreach": step(torch.optim.AdamW, foreach=True),
    "AdamW fused": step(torch.optim.AdamW, fused=True),
    "Adagrad": step(torch.optim.Adagrad),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_to_a_parameter(device: str, write: str) -> None:
    p = nn.Parameter(torch.randn(9, 5, device=device))
    prints = Fingerprints([p])
    before, copied = fingerprint([p]), copy.deepcopy(p)
    WRITES[write](p)
    prints.record()
    prints.start([p])
    now = prints.read([p])
    assert now != before
    assert now == fingerprint([p]) and before == fingerprint([copied])


@pytest.mark.parametrize("share", [False, True])
def test_writes_to_host_memory_by_others(share: bool) -> None:
    p = nn.Parameter(torch.randn(9, 5))
    if share:
        p.share_memory_()
    before = fingerprint([p])
    through_numpy(p)
    assert fingerprint([p]) != before


def test_a_write_by_another_process() -> None:
    p = nn.Parameter(torch.randn(9, 5)).share_memory_()
    before = fingerprint([p])
    process = torch.multiprocessing.get_context("fork").Process(target=lambda: p.data.add_(1))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert fingerprint([p]) != before


def cuda(test: Callable[..., None]) -> Callable[..., None]:
    for mark in CUDA:
        test = mark(test)
    return test


def cycles(seconds: float) -> int:
    """For `torch.cuda._sleep`, at a GPU's highest clock or a little more."""
    return int(seconds * 2e9)


@cuda
@pytest.mark.parametrize("side", [False, True])
def test_all_before_the_point_counts_and_nothing_after_it_is_waited_for(side: bool) -> None:
    tensor = torch.randn(1000, device="cuda")
    prints = Fingerprints([tensor])
    before = fingerprint([tensor])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        torch.cuda._sleep(cycles(0.05))
        tensor.data.add_(1)
        prints.record()
        torch.cuda._sleep(cycles(1))
        later = torch.cuda.Event()
        later.record()
        prints.start([tensor])
        found = prints.read([tensor])
        assert not later.query()
    torch.cuda.synchronize()
    assert found != before and found == fingerprint([tensor])


@cuda
def test_a_write_on_a_stream_that_nobody_waits_for_is_seen_once_it_is_there() -> None:
    tensor = torch.randn(1000, device="cuda")
    prints = Fingerprints([tensor])

    def now() -> bytes:
        prints.record()
        prints.start([tensor])
        return prints.read([tensor])

    before = now()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles(1))
        tensor.data.add_(1)
    assert now() == before
    assert not stream.query()
    torch.cuda.current_stream().wait_stream(stream)
    assert now() != before


@cuda
def test_a_replay_of_the_users_graph_shows() -> None:
    tensor = torch.zeros(1000, device="cuda")
    prints = Fingerprints([tensor])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensor.data.add_(1)
    seen = {fingerprint([tensor])}
    version = tensor._version
    for _ in range(3):
        graph.replay()
        prints.record()
        prints.start([tensor])
        seen.add(prints.read([tensor]))
    assert len(seen) == 4 and tensor._version == version


@cuda
def test_a_call_that_breaks_off_harms_nobody() -> None:
    tensors = [torch.randn(1000, device="cuda") for _ in range(50)]
    expected = fingerprint(tensors)
    for _ in range(50):
        prints = Fingerprints(tensors)
        prints.record()
        torch.cuda._sleep(cycles(0.001))
        prints.start(tensors)
        if random.random() < 0.5:
            prints.record()
            prints.start(tensors)
            assert prints.read(tensors) == expected
        del prints
    assert fingerprint(tensors) == expected


@cuda
def test_tensors_freed_right_after_and_their_memory_used_again() -> None:
    for index in range(200):
        tensors = [torch.full((50_000,), index, device="cuda") for _ in range(4)]
        prints = Fingerprints(tensors)
        prints.record()
        prints.start(tensors)
        found = prints.read(tensors)
        del tensors
        again = [torch.full((50_000,), index, device="cuda") for _ in range(4)]
        assert fingerprint(again) == found
        del again
        if index % 50 == 0:
            torch.cuda.empty_cache()


@cuda
def test_it_runs_while_the_user_captures_a_graph_on_another_stream() -> None:
    tensor = torch.randn(1000, device="cuda")
    prints = Fingerprints([tensor])
    expected = fingerprint([tensor])
    found: list[bytes] = []

    def work() -> None:
        for _ in range(100):
            prints.record()
            prints.start([tensor])
            found.append(prints.read([tensor]))

    work()
    graph = torch.cuda.CUDAGraph()
    out = torch.zeros(1000, device="cuda")
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        thread = threading.Thread(target=work)
        thread.start()
        out.add_(1)
        thread.join()
    graph.replay()
    torch.cuda.synchronize()
    assert set(found) == {expected} and torch.equal(out, torch.ones_like(out))


def no_compiler(nvrtc: Any, architecture: str) -> bytes:
    raise RuntimeError("no NVRTC")


def wrong_kernel(*_: Any) -> bool:
    return False


@cuda
@pytest.mark.parametrize(
    ("where", "name", "fault", "said"),
    [
        (kernel, "compiled", no_compiler, "no NVRTC"),
        (launches, "counts_right", wrong_kernel, "counts wrongly"),
        (launches, "counts_right", no_compiler, "slower: no NVRTC"),
    ],
)
def test_without_a_kernel_torch_does_it_and_says_so(
    where: Any, name: str, fault: Any, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(where, name, fault)
    monkeypatch.setattr(kernel, "load", kernel.load.__wrapped__)
    monkeypatch.setattr(package, "function_on", launches.function_on.__wrapped__)
    tensor = torch.randn(1000, device="cuda")
    prints: Any = Fingerprints([tensor])
    assert type(prints.rows) is BatchRows and said in caplog.text


@cuda
def test_unaligned_flat_parameters_of_half_precision() -> None:
    flat = torch.randn(300_001, device="cuda", dtype=torch.bfloat16)
    views = list(flat.split([1, 70_000, 3, 99_999, 129_998]))
    before = rows(views)
    for index, view in enumerate(views):
        view.data[-1] = 77
        now = rows(views)
        assert [a != b for a, b in zip(now, before, strict=True)] == [i == index for i in range(len(views))]
        before = now


@pytest.mark.parametrize("extra", [-3, -1, 0, 1, 4])
@pytest.mark.parametrize("chunks", [0, 1, 2, 5])
@pytest.mark.parametrize("offset", [0, 1])
def test_however_it_is_read_the_rows_are_the_same(chunks: int, extra: int, offset: int) -> None:
    """In steps for the processor's cache, in few steps, by several threads."""
    count = max(8 * chunks * CHUNK + extra, 5)
    tensor = torch.randint(0, 255, (count + offset,), dtype=torch.uint8)[offset:]
    prints = Fingerprints([tensor, tensor[::3]])
    both = [tensor, tensor[::3]]
    prints.record()
    prints.start(both)
    rows = prints.read(both)
    assert rows == prints.read_beside(both) == prints.read_by_several(both)
    tensor[count // 2] ^= 1
    assert prints.read_beside(both)[:ROW] != rows[:ROW]
