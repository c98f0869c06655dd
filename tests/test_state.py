"""State that lives in a model: after each call both the answer and the state are eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiled import assert_same, compiled
from trt_dynamo.reports import report

WIDTH, ROWS = 6, 8

Write = Callable[[Any, Tensor], Any]


class Stateful(nn.Module):
    """A linear layer and a cache of eight rows; `write` says how a call changes it."""

    cache: Tensor
    position: Tensor

    def __init__(self, write: Write, *, persistent: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("cache", torch.randn(ROWS, WIDTH), persistent=persistent)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64), persistent=persistent)
        self.write = write
        self.flag = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.write(self, torch.tanh(self.linear(x)))
        return out


def copy_(m: Any, y: Tensor) -> Any:
    m.cache.copy_(m.cache * 0.5 + y.sum(0))
    return y @ m.cache.T


def slice_assignment(m: Any, y: Tensor) -> Any:
    m.cache[1:3] = y[:2]
    return y @ m.cache.T


def slice_by_position(m: Any, y: Tensor) -> Any:
    m.cache[m.position % ROWS] = y[0]
    m.position += 1
    return y + m.cache.sum(0)


def index_copy_(m: Any, y: Tensor) -> Any:
    m.cache.index_copy_(0, (m.position + torch.arange(2)) % ROWS, y[:2])
    m.position.add_(2)
    return y @ m.cache.T


def index_put_(m: Any, y: Tensor) -> Any:
    m.cache.index_put_((torch.tensor([0, 3, 0]),), y[:1].expand(3, WIDTH), accumulate=True)
    return y @ m.cache.T


def scatter_(m: Any, y: Tensor) -> Any:
    m.cache.scatter_(0, (y[:2] > 0).long(), y[:2] * 2)
    return y @ m.cache.T


def a_view(m: Any, y: Tensor) -> Any:
    m.cache.view(-1)[5:11].mul_(0.5).add_(y[0])
    return y @ m.cache.T


def a_transposed_view(m: Any, y: Tensor) -> Any:
    m.cache.T[2].add_(y.mean())
    return y + m.cache.sum(0)


def fill_and_zero(m: Any, y: Tensor) -> Any:
    m.cache[0].fill_(3)
    m.cache[4:].zero_()
    m.cache[1] += y[0]
    return y + m.cache.sum(0)


def where_data_says(m: Any, y: Tensor) -> Any:
    m.cache.masked_fill_(m.cache > 1, 0.25)
    m.cache.add_(torch.where(y.sum() > 0, 0.5, -0.5))
    return y + m.cache.sum(0)


def a_moving_average(m: Any, y: Tensor) -> Any:
    m.cache.lerp_(y.mean(0).expand_as(m.cache), 0.1)
    m.position += 1
    return y / (m.cache.std() + m.position)


def replaced(m: Any, y: Tensor) -> Any:
    m.cache = torch.roll(m.cache, 1, 0) + y[0]
    return y @ m.cache.T


def written_then_read_then_written(m: Any, y: Tensor) -> Any:
    m.cache += 1
    z = y @ m.cache.T
    m.cache *= 0.5
    return z + (y @ m.cache.T)


def on_some_calls(m: Any, y: Tensor) -> Any:
    if m.flag:
        m.cache.add_(y.sum(0))
    m.flag = not m.flag
    return y @ m.cache.T


WRITES = [
    copy_, slice_assignment, slice_by_position, index_copy_, index_put_, scatter_, a_view, a_transposed_view,
    fill_and_zero, where_data_says, a_moving_average, replaced, written_then_read_then_written, on_some_calls,
]  # fmt: skip


def follow(ours: Any, model: nn.Module, eager: nn.Module, sizes: tuple[int, ...] = (3, 3, 3, 3)) -> None:
    """Calls both with the same arguments; answers and state are the same after each call."""
    for size in sizes:
        x = torch.randn(size, WIDTH)
        assert_same(ours(x), eager(x))
        mine, its = dict(model.named_buffers()), dict(eager.named_buffers())
        assert mine.keys() == its.keys()
        for name, value in its.items():
            assert_same(mine[name], value)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_buffers_that_calls_write(write: Write) -> None:
    eager = Stateful(write)
    model = copy.deepcopy(eager)
    with torch.no_grad():
        follow(compiled(model), model, eager)
    assert report()["eager_calls"] == 0 and report()["engine_calls"] >= 4


@pytest.mark.parametrize(
    "write", [copy_, slice_by_position, index_copy_, a_view, on_some_calls], ids=lambda w: w.__name__
)
@pytest.mark.parametrize("check", ["always", "observed"])
def test_dynamic_sizes_in_inference_mode(write: Write, check: str) -> None:
    eager = Stateful(write, persistent=False)
    model = copy.deepcopy(eager)
    with torch.inference_mode():
        follow(compiled(model, dynamic=True, weights_check=check), model, eager, (3, 5, 2, 7, 3))
    with torch.no_grad():
        follow(compiled(model, dynamic=True, weights_check=check), model, eager, (3, 5))


def test_a_written_buffer_is_no_weight() -> None:
    """No call is a change of weights, and no engine is built for one."""
    model = Stateful(copy_)
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(6):
            fast(torch.randn(3, WIDTH))
    counts = report()
    assert counts["engines_built"] == 1 and counts["rebuilds"] == counts["refits"] == counts["eager_calls"] == 0


@pytest.mark.parametrize("check", ["always", "observed"])
def test_written_by_one_method_and_read_by_another(check: str) -> None:
    class Memory(nn.Module):
        state: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("state", torch.zeros(WIDTH))

        def observe(self, x: Tensor) -> Tensor:
            self.state.mul_(0.9).add_(self.linear(x).mean(0))
            return self.state * 2

        def answer(self, x: Tensor) -> Tensor:
            out: Tensor = torch.relu(self.linear(x)) + self.state
            return out

    eager = Memory()
    model = copy.deepcopy(eager)
    observe, answer = (compiled(m, weights_check=check, rebuild_after=0) for m in (model.observe, model.answer))
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3, WIDTH)
            assert_same(answer(x), eager.answer(x))
            assert_same(observe(x), eager.observe(x))
            assert_same(answer(x), eager.answer(x))
            assert_same(model.state, eager.state)


def test_a_buffer_of_two_modules() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Stateful(copy_), Stateful(slice_assignment)
            self.second.cache = self.first.cache

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.first(x) + self.second(x)
            again: Tensor = self.first(x)
            return out + again

    eager = Shared()
    model = copy.deepcopy(eager)
    with torch.no_grad():
        follow(compiled(model), model, eager)
    assert model.first.cache is model.second.cache


def test_buffers_that_are_exchanged_between_calls() -> None:
    eager = Stateful(copy_)
    model = copy.deepcopy(eager)
    fast = compiled(model)

    def swapped(m: Any) -> None:
        m.cache = torch.ones(ROWS, WIDTH)

    def registered(m: Any) -> None:
        m.register_buffer("cache", torch.full((ROWS, WIDTH), 2.0))

    def loaded(m: Any) -> None:
        m.load_state_dict({name: value.flip(0) for name, value in m.state_dict().items() if value.ndim}, strict=False)

    def deleted(m: Any) -> None:
        del m.cache
        m.register_buffer("cache", torch.full((ROWS, WIDTH), 0.5), persistent=False)

    with torch.no_grad():
        for change in (swapped, registered, loaded, deleted):
            follow(fast, model, eager, (3, 3))
            change(model)
            change(eager)
        follow(fast, model, eager, (3, 3))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.InstanceNorm1d], ids=lambda c: c.__name__)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics(layer: Any, momentum: float | None) -> None:
    """In train mode without gradients, by turns with evaluations, which use what was gathered."""
    norm = layer(4, momentum=momentum, track_running_stats=True)
    eager = nn.Sequential(nn.Conv1d(3, 4, 3), norm, nn.ReLU())
    model = copy.deepcopy(eager)
    fast = compiled(model, rebuild_after=0)
    with torch.no_grad():
        for _ in range(3):
            for mode in (True, True, False):
                model.train(mode)
                eager.train(mode)
                x = torch.randn(2, 3, 9) * 2 + 1
                assert_same(fast(x), eager(x))
                for (name, mine), its in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
                    torch.testing.assert_close(mine, its, msg=name)


def test_a_recurrent_state_kept_on_the_module() -> None:
    class Recurrent(nn.Module):
        hidden: Tensor

        def __init__(self, *, buffer: bool) -> None:
            super().__init__()
            self.cell = nn.GRUCell(WIDTH, WIDTH)
            if buffer:
                self.register_buffer("hidden", torch.zeros(3, WIDTH))
            else:
                self.hidden = torch.zeros(3, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            self.hidden = self.cell(x, self.hidden)
            out: Tensor = self.hidden.exp()
            return out

    for buffer in (True, False):
        torch._dynamo.reset()
        eager = Recurrent(buffer=buffer)
        model = copy.deepcopy(eager)
        fast = compiled(model)
        with torch.no_grad():
            for step in range(8):
                if step == 5:
                    model.hidden, eager.hidden = torch.zeros(3, WIDTH), torch.zeros(3, WIDTH)
                x = torch.randn(3, WIDTH)
                assert_same(fast(x), eager(x))
                assert_same(model.hidden, eager.hidden)


def test_arguments_that_are_written() -> None:
    def f(x: Tensor, cache: Tensor, where: Tensor) -> Tensor:
        cache.index_copy_(0, where, x.exp())
        x.mul_(2)
        return cache @ x.T

    fast = compiled(f)
    caches = [torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, WIDTH)]
    with torch.no_grad():
        for step in range(4):
            xs = [x := torch.randn(2, WIDTH), x.clone()]
            where = torch.tensor([step, step + 2])
            answers = [run(x, cache, where) for run, x, cache in zip((fast, f), xs, caches, strict=True)]
            assert_same(*answers)
            assert_same(*caches)
            assert_same(*xs)
    assert report()["eager_calls"] == 0


class Decoder(nn.Module):
    """One block of causal attention over a static cache of keys and values, written at the position of each token."""

    keys: Tensor
    values: Tensor

    def __init__(self, words: int = 23, width: int = 16, heads: int = 2, length: int = 40) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.project, self.out, self.head = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            nn.Linear(width, words),
        )
        self.register_buffer("keys", torch.zeros(1, heads, length, width // heads))
        self.register_buffer("values", torch.zeros(1, heads, length, width // heads), persistent=False)

    def forward(self, tokens: Tensor, at: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places(at)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        self.keys.index_copy_(2, at, k)
        self.values[:, :, at] = v
        seen = torch.arange(self.keys.shape[2]) <= at[:, None]
        y = nn.functional.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)
        out: Tensor = self.head(torch.relu(x + self.out(y.transpose(1, 2).flatten(2))))
        return out


def generate(decode: Any, prompt: Tensor, steps: int) -> list[int]:
    tokens: list[int] = []
    chosen = decode(prompt, torch.arange(prompt.shape[1]))[:, -1:].argmax(-1)
    for place in range(prompt.shape[1], prompt.shape[1] + steps):
        tokens.append(int(chosen))
        chosen = decode(chosen, torch.tensor([place]))[:, -1:].argmax(-1)
    return tokens


@pytest.mark.parametrize("dynamic", [None, True])
def test_generation_with_a_static_cache_in_buffers(dynamic: bool | None) -> None:
    eager = Decoder()
    model = copy.deepcopy(eager)
    fast = compiled(model, dynamic=dynamic)
    for seed, mode in enumerate((torch.no_grad(), torch.inference_mode())):
        torch.manual_seed(seed)
        with mode:
            for length in (5, 9):
                prompt = torch.randint(23, (1, length))
                assert generate(fast, prompt, 24) == generate(eager, prompt, 24)
                assert_same(model.keys, eager.keys)
                assert_same(model.values, eager.values)
    counts = report()
    assert counts["eager_calls"] == counts["rebuilds"] == 0 and counts["engine_calls"] >= 100
