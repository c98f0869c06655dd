"""What other bridges to TensorRT are known to get wrong, or to leave to eager, in models that everybody uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compiled import assert_same, compiled
from trt_dynamo import engine_making
from trt_dynamo.aten_converters import convert
from trt_dynamo.reports import report, reset_report
from trt_dynamo.testing import check

sdpa = F.scaled_dot_product_attention
NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}

both = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def whole(model: Callable[..., Any], *args: torch.Tensor, batches: tuple[int, ...] = ()) -> None:
    """One engine and no eager node, equal to eager; for every one of `batches` the same graph, its batch symbolic."""
    fast = compiled(model, strict=True, cache="off")
    if batches:
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 0, min=2, max=8)
    with torch.no_grad():
        assert_same(fast(*args), model(*args))
        assert report()["engines_built"] == 1
        for batch in batches:
            sized = [arg.repeat(4, *[1] * (arg.ndim - 1))[:batch].contiguous() for arg in args]
            assert_same(fast(*sized), model(*sized))
    found = report()
    assert (found["graphs"], found["eager_calls"], found["engine_calls"]) == (1, 0, 1 + len(batches))


each_batch = pytest.mark.parametrize("batches", [(), (3, 8)], ids=["static", "dynamic"])


# -- SqueezeNet: max_pool2d in ceil mode ------------------------------------------------------------------------------


class Fire(nn.Module):
    def __init__(self, inputs: int, squeezed: int, outputs: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.narrow, self.wide = nn.Conv2d(squeezed, outputs, 1), nn.Conv2d(squeezed, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.narrow(x).relu(), self.wide(x).relu()], 1)


def squeezenet() -> nn.Module:
    fires = [nn.MaxPool2d(3, 2, ceil_mode=True), Fire(8, 4, 8), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 4, 8)]
    stem, last = nn.Conv2d(3, 8, 3, 2), [nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(16, 10, 1)]
    return nn.Sequential(
        stem, nn.ReLU(inplace=True), *fires, *last, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@each_batch
@pytest.mark.parametrize("sizes", [(32, 32), (33, 47), (64, 38)], ids=str)
def test_squeezenet(sizes: tuple[int, int], batches: tuple[int, ...]) -> None:
    whole(seeded(squeezenet), random(2, 3, *sizes), batches=batches)


@both
@pytest.mark.parametrize("size", [7, 8, 9, 10, 11])
def test_a_last_window_that_is_not_full(size: int, dynamic: bool) -> None:
    check(lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), random(2, 3, size, size + 1) - 3.0, dynamic=dynamic)


# -- Swin, ConvNeXt, MaxViT: as_strided over a symbolic batch, windows by view, permute and view ----------------------

STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda x: x.as_strided(x.shape, x.stride()),
    "transposed": lambda x: x.as_strided((x.shape[0], x.shape[2], x.shape[1]), (x.stride(0), 1, x.stride(1))),
    "rows": lambda x: x.as_strided((x.shape[0], x.shape[1], 2), (x.stride(0), x.stride(1), 1), 1),
    "channels_last": lambda x: x.unsqueeze(1).as_strided(
        (x.shape[0], x.shape[2], x.shape[1]), (x.shape[1] * x.shape[2], 1, x.shape[2])
    ),
    "overlapping": lambda x: x.as_strided((x.shape[0], 2, 3), (x.stride(0), 1, 1)),
    "flat": lambda x: x.as_strided((x.numel(),), (1,)),
    "expanded": lambda x: x.as_strided((x.shape[0], 5, x.shape[2]), (x.stride(0), 0, 1)),
}


@both
@pytest.mark.parametrize("form", STRIDED)
def test_as_strided(form: str, dynamic: bool) -> None:
    function = lambda x: STRIDED[form](x * 2) + 1  # noqa: E731
    check(function, random(3, 4, 6), dynamic=dynamic, also=[[random(5, 4, 6)]] if dynamic else [])


def partitioned(x: torch.Tensor, size: int) -> torch.Tensor:
    """`(batch, height, width, channels)` as `(windows, size * size, channels)`, as Swin and MaxViT write it."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, channels)


def joined(windows: torch.Tensor, size: int, height: int, width: int) -> torch.Tensor:
    batch = windows.shape[0] // (height * width // size // size)
    x = windows.view(batch, height // size, width // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, -1)


class ShiftedWindows(nn.Module):
    """Swin's block: a roll, windows, attention with a bias for each pair of places and a mask for the seam."""

    index: torch.Tensor

    def __init__(self, heads: int, channels: int = 16, size: int = 4, shift: int = 2) -> None:
        super().__init__()
        self.heads, self.size, self.shift = heads, size, shift
        self.norm, self.project = nn.LayerNorm(channels), nn.Linear(channels, channels)
        self.into = nn.Linear(channels, 3 * channels)
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None]).permute(1, 2, 0) + size - 1
        self.register_buffer("index", apart[..., 0] * (2 * size - 1) + apart[..., 1])

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """0 for places that were neighbours before the roll, else -100; made anew at each call, as torchvision does."""
        _, height, width, _ = x.shape
        regions = x.new_zeros((1, height, width, 1))
        cuts = (slice(0, -self.size), slice(-self.size, -self.shift), slice(-self.shift, None))
        for count, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
            regions[:, rows, columns] = count
        windows = partitioned(regions, self.size).squeeze(-1)
        apart = windows.unsqueeze(1) - windows.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, height, width, channels = x.shape
        rolled = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        windows = partitioned(rolled, self.size)
        count, length, _ = windows.shape
        q, k, v = self.into(windows).reshape(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * (channels // self.heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(length, length, self.heads).permute(2, 0, 1).contiguous()
        mask = self.mask(x)
        scores = (scores + bias).view(-1, mask.shape[0], self.heads, length, length) + mask[None, :, None]
        weights = scores.view(-1, self.heads, length, length).softmax(-1)
        mixed = self.project((weights @ v).transpose(1, 2).reshape(count, length, channels))
        back = torch.roll(joined(mixed, self.size, height, width), (self.shift, self.shift), (1, 2))
        return x + back


@each_batch
@pytest.mark.parametrize("heads", [1, 2])
def test_shifted_windows(heads: int, batches: tuple[int, ...]) -> None:
    whole(seeded(lambda: ShiftedWindows(heads)), random(2, 8, 12, 16), batches=batches)


class WindowAttention(nn.Module):
    """MaxViT's partition, attention and way back, in its own order of dims; `grid` swaps the two. One head and windows
    of one row leave dims of size 1 to permute, at which RTX's builder failed."""

    def __init__(self, heads: int, size: int, grid: bool, channels: int = 16) -> None:
        super().__init__()
        self.heads, self.size, self.grid = heads, size, grid
        self.into, self.merge = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.randn(1, heads, size * size, size * size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        p, rows, columns = self.size, height // self.size, width // self.size
        x = x.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(batch, rows * columns, p * p, channels)
        x = x.swapaxes(-2, -3) if self.grid else x
        groups, length = x.shape[1:3]
        parts = self.into(x).chunk(3, dim=-1)
        q, k, v = (part.reshape(batch, groups, length, self.heads, -1).permute(0, 1, 3, 2, 4) for part in parts)
        scores = torch.einsum("bghid,bghjd->bghij", q, k * (channels // self.heads) ** -0.5)
        scores = scores + (self.bias if length == p * p else 0.0)
        mixed = torch.einsum("bghij,bghjd->bghid", scores.softmax(-1), v)
        y: torch.Tensor = self.merge(mixed.permute(0, 1, 3, 2, 4).contiguous().view(batch, groups, length, channels))
        y = y.swapaxes(-2, -3) if self.grid else y
        y = y.contiguous().view(batch, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return y.contiguous().view(batch, channels, height, width)


@each_batch
@pytest.mark.parametrize("grid", [False, True], ids=["windows", "grid"])
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (2, 2), (4, 4), (1, 1)])
def test_window_attention(heads: int, size: int, grid: bool, batches: tuple[int, ...]) -> None:
    whole(seeded(lambda: WindowAttention(heads, size, grid)), random(2, 16, 16, 8), batches=batches)


@both
def test_windows_by_permute_contiguous_view(dynamic: bool) -> None:
    check(lambda x: joined(partitioned(x, 2) * 2, 2, 4, 6), random(3, 4, 6, 5))
    check(lambda x: partitioned(x, 2) + 1, random(3, 4, 6, 5), dynamic=dynamic)


def test_permutations_that_move_ones_only() -> None:
    """The nodes of MaxViT at which RTX 1.7.1 says `CHECK(new_stride_order[i1] != new_stride_order[i2]) failed`."""

    def merged(weights: torch.Tensor, value: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = torch.bmm(weights, value).view(2, 64, 4, 1, 1, 16).permute(0, 1, 4, 2, 5, 3).reshape(2, 64, 1, 4, 16)
        return torch.addmm(bias, x.permute(0, 1, 3, 2, 4).reshape(512, 16), matrix.t())

    check(merged, random(128, 4, 4), random(128, 4, 16), random(16, 16), random(16), rtol=1e-4, atol=1e-4)


# -- T5: a bias of floats is added, never read as a mask of bools -----------------------------------------------------


@both
@pytest.mark.parametrize("shape", [(1, 4, 5, 7), (2, 4, 5, 7), (4, 5, 7)], ids=str)
def test_a_bias_of_floats(shape: tuple[int, ...], dynamic: bool) -> None:
    """With zeros and large values among them, of which a cast to bool would make something else."""
    bias = 3 * random(*shape) * (random(*shape, seed=5) > 0)
    q, k, v = random(2, 4, 5, 16), random(2, 4, 7, 16), random(2, 4, 7, 16, seed=1)
    check(lambda q, k, v, b: sdpa(q, k, v, b, scale=1.0), q, k, v, bias, dynamic=dynamic, **NEAR)
    check(lambda q, k, v, b: (q @ k.mT + b).float().softmax(-1) @ v, q, k, v, bias, dynamic=dynamic, **NEAR)
    wrong = sdpa(q, k, v, bias.bool(), scale=1.0)
    assert (wrong - sdpa(q, k, v, bias, scale=1.0)).abs().max() > 0.1


@each_batch
def test_t5(batches: tuple[int, ...]) -> None:
    from transformers import T5Config, T5Model

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100, use_cache=False)
    model = seeded(lambda: T5Model(config))
    read = torch.arange(20).view(2, 10) * 7 % 90
    seen = (torch.arange(10)[None] < torch.tensor([10, 7])[:, None]).long()

    def last(read: torch.Tensor, seen: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        return model(input_ids=read, attention_mask=seen, decoder_input_ids=written)[0]  # type: ignore[no-any-return]

    whole(last, read, seen, read[:, :6].contiguous(), batches=batches)


# -- GPT-2: at a constant bias, a split and attention RTX's compiler fails with static shapes -------------------------


class Causal(nn.Module):
    """GPT-2's attention: one product with a constant bias for queries, keys and values, then split."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Parameter(0.02 * torch.randn(width, 3 * width))
        self.out = nn.Parameter(0.02 * torch.randn(width, width))
        self.into_bias, self.out_bias = nn.Parameter(torch.randn(3 * width)), nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        made = torch.addmm(self.into_bias, x.view(-1, width), self.into).view(batch, length, 3 * width)
        q, k, v = (p.view(batch, length, self.heads, -1).transpose(1, 2) for p in made.split(width, dim=2))
        mixed = sdpa(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(-1, width)
        return torch.addmm(self.out_bias, mixed, self.out).view(batch, length, width)


@each_batch
@pytest.mark.parametrize(
    ("width", "heads", "rows", "length"),
    [(768, 12, 1, 32), (768, 12, 2, 16), (768, 12, 2, 8), (768, 12, 1, 128), (1024, 16, 1, 32), (64, 4, 2, 10)],
)
def test_gpt2_attention(width: int, heads: int, rows: int, length: int, batches: tuple[int, ...]) -> None:
    if batches and rows == 1:
        rows = 2  # Dynamo gives a batch of 1 a graph of its own
    whole(seeded(lambda: Causal(width, heads)), random(rows, length, width), batches=batches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_gpt2_attention_in_half(dtype: torch.dtype) -> None:
    model = seeded(lambda: Causal(768, 12)).to(dtype)
    fast = compiled(model, strict=True, cache="off")
    x = random(1, 32, 768).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=5e-2, atol=5e-2)
    assert report()["engines_built"] == 1 and report()["eager_calls"] == 0


# -- Shape arithmetic is shared -------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of a transformer that asks for sizes at each step, as models do."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        made = self.into(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = made.permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        scores = (q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5).masked_fill(~mask, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        y: torch.Tensor = x + self.narrow(F.gelu(self.wide(self.between(x))))
        return y


def network_of(blocks: int, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the layers in the engine of a stack of blocks."""
    kinds: list[str] = []

    def counted(*args: Any, **keywords: Any) -> Any:
        made = convert(*args, **keywords)
        kinds.extend(made.network.raw.get_layer(i).type.name for i in range(made.network.raw.num_layers))
        return made

    monkeypatch.setattr(engine_making, "convert", counted)
    model, x = seeded(lambda: nn.Sequential(*(Block() for _ in range(blocks)))), random(3, 5, 16)
    if dynamic:
        for axis in (0, 1):
            torch._dynamo.mark_dynamic(x, axis, min=2, max=32)
    fast = compiled(model, strict=True, cache="off")
    with torch.no_grad():
        for given in (x, random(4, 9, 16)) if dynamic else (x,):
            assert_same(fast(given), model(given))
    assert (report()["graphs"], report()["engine_calls"]) == (1, 1 + dynamic)
    return kinds


def test_a_dynamic_transformer_has_few_more_layers_than_a_static_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[tuple[bool, int], list[str]] = {}
    for dynamic in (False, True):
        for blocks in (1, 3):
            reset_report()
            torch._dynamo.reset()
            made[dynamic, blocks] = network_of(blocks, dynamic, monkeypatch)
    counts = {key: len(kinds) for key, kinds in made.items()}
    assert counts[True, 3] <= 1.25 * counts[False, 3], counts
    # A further block finds the sizes and the shapes that it needs.
    assert counts[True, 3] - counts[True, 1] <= 1.15 * (counts[False, 3] - counts[False, 1]), counts
    for kind in ("SHAPE", "CONCATENATION"):
        assert made[True, 3].count(kind) == made[True, 1].count(kind)
    assert made[True, 3].count("SHAPE") == 1


# -- Attention: what its arguments mean together ----------------------------------------------------------------------


def masks(queries: int, keys: int) -> dict[str, torch.Tensor | None]:
    """Of each kind; in all but the first the second query sees nothing."""
    seen = random(2, 1, queries, keys, seed=3) > -0.5
    seen[:, :, 1] = False
    bias = random(2, 1, queries, keys, seed=4)
    return {
        "none": None,
        "bools": seen,
        "floats": bias.masked_fill(~seen, float("-inf")),
        "lowest": bias.masked_fill(~seen, torch.finfo(torch.float32).min),
    }


@both
@pytest.mark.parametrize("kind", ["none", "bools", "floats", "lowest"])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_grouped_queries_with_masks(kind: str, scale: float | None, dynamic: bool) -> None:
    q, k, v = random(2, 6, 5, 8), random(2, 2, 7, 8), random(2, 2, 7, 8, seed=1)
    mask = masks(5, 7)[kind]
    given = (q, k, v) if mask is None else (q, k, v, mask)
    function = lambda q, k, v, m=None: sdpa(q, k, v, m, scale=scale, enable_gqa=True)  # noqa: E731
    check(function, *given, dynamic=dynamic, **NEAR)


@both
@pytest.mark.parametrize("lengths", [(4, 4), (3, 6), (6, 3), (1, 5)], ids=str)
def test_causal_grouped_and_scaled(lengths: tuple[int, int], dynamic: bool) -> None:
    q, (k, v) = random(2, 6, lengths[0], 8), (random(2, 3, lengths[1], 8, seed=i) for i in (1, 2))
    function = lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)  # noqa: E731
    check(function, q, k, v, dynamic=dynamic, **NEAR)


@both
def test_a_mask_that_looks_causal_is_a_mask(dynamic: bool) -> None:
    """With more queries than keys the two differ, and a mask may change from call to call."""
    q, k, v = random(2, 4, 5, 8), random(2, 4, 5, 8, seed=1), random(2, 4, 5, 8, seed=2)
    triangle = torch.ones(5, 5, dtype=torch.bool).tril()
    others = [[q, k, v, ~triangle], [q, k, v, torch.ones(5, 5, dtype=torch.bool).triu()]]
    check(sdpa, q, k, v, triangle, dynamic=dynamic, also=others, **NEAR)
