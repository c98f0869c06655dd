"""Complex numbers as pairs of reals, and Fourier transforms: networks against eager, and what the backend promises."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo import explain
from trt_dynamo.reports import report, reset_report
from trt_dynamo.testing import check, evaluate, refused, trace

C = torch.complex64
SIZES = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def z(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=C)


def rotary(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """As Llama's reference code has it: (batch, length, heads, width), (length, width / 2)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(pairs * turns.view(1, x.shape[1], 1, -1)).flatten(3).type_as(x)


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rotary_embeddings_need_no_eager_node(dtype: torch.dtype, dynamic: bool) -> None:
    checked = check(
        rotary,
        torch.randn(2, 5, 3, 8).to(dtype),
        torch.randn(5, 4),
        dynamic=dynamic,
        also=[(torch.randn(3, 7, 3, 8).to(dtype), torch.randn(7, 4))] if dynamic else (),
    )
    assert len(checked.networks) == 1


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: torch.add(a, b, alpha=2j),
    "add a real": lambda a, b: a + b.real,
    "add a number": lambda a, b: a + (1 - 2j) + 3,
    "sub": lambda a, b: torch.sub(a, b, alpha=3),
    "rsub": lambda a, b: 1j - a,
    "a real less": lambda a, b: b.real - a,
    "mul": lambda a, b: a * b,
    "mul by a real": lambda a, b: a * b.imag,
    "mul reals by a number": lambda a, b: a.real * 2j,
    "div": lambda a, b: a / b,
    "div by a real": lambda a, b: a / b.real,
    "div a real": lambda a, b: 3 / b,
    "div by a number": lambda a, b: a / (2 - 1j),
    "powers": lambda a, b: (a**2, a**3, a**-2, a**7),
    "roots": lambda a, b: (a.sqrt(), a.rsqrt()),
    "exp": lambda a, b: (a.exp(), a.log(), a.log2(), a.log10()),
    "circular": lambda a, b: (a.sin(), a.cos(), a.tan(), a.sinc()),
    "hyperbolic": lambda a, b: (a.sinh(), a.cosh(), a.tanh(), a.sigmoid()),
    "parts": lambda a, b: (a.abs(), a.angle(), a.sgn(), a.conj().resolve_conj(), torch.complex(a.imag, b.real)),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=1 + 1j),
    "where": lambda a, b: (torch.where(a.real > 0, a, b), torch.where(a.real > 0, a, 0), a.masked_fill(a.imag > 0, 2j)),
    "equal": lambda a, b: (a == b, a != a.clone(), a == 1, a.isnan()),
    "mm": lambda a, b: (a @ b.mT, torch.addmm(a[:3, :3], a, b.t(), alpha=2j), a[0].dot(b[0]), torch.vdot(a[0], b[0])),
    "bmm": lambda a, b: torch.baddbmm(a[:, :1, None], a[:, None], b[:, :, None], beta=0.5),
    "sums": lambda a, b: (a.sum(), a.sum(-1), a.mean((0, 1), keepdim=True), a.cumsum(-1), a.var(0), a.norm()),
    "prod": lambda a, b: (a[:3].prod(0), a[:, :1].prod(), a[0, :4].prod()),
    "casts": lambda a, b: (a.real.to(C), a.bool(), a.to(torch.complex64) + 1),
}


@SIZES
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name: str, dynamic: bool) -> None:
    if dynamic and name == "prod":
        with refused("a product of complex numbers"):
            check(lambda a, b: a.prod(0), z(3, 4), z(3, 4), dynamic=True, build_engines=False)
        return
    check(ARITHMETIC[name], z(3, 4), z(3, 4), dynamic=dynamic, rtol=1e-4, atol=1e-5, build_engines=False)


MOVEMENT: dict[str, Callable[[torch.Tensor], Any]] = {
    "views": lambda x: (x.view(-1), x.reshape(x.shape[0], -1), x[None], x.unsqueeze(-1), x.squeeze(-2), x.flatten(-2)),
    "order": lambda x: (x.permute(2, 0, 1), x.transpose(-1, 0), x.mT, x.movedim(-1, 0)),
    "slices": lambda x: (x[..., 1], x[:, -1:], x.select(-1, 0), x[..., ::2], x.narrow(-1, 1, 2), x.diagonal(0, -1, 0)),
    "joins": lambda x: (torch.cat([x, x], -1), torch.stack([x, x], -1), torch.cat([x, x * 2], -2)),
    "parts": lambda x: (*x.split(2, -1), *x.unbind(0), *x.chunk(2, -1)),
    "turns": lambda x: (x.flip(-1), x.roll(1, -1), x.roll(2), x.rot90(1, (0, -1))),
    "copies": lambda x: (x.expand(5, *x.shape), x.repeat(2, 1, 1), x.tile(2), x.clone(), x.mT.contiguous()),
    "pads": lambda x: (torch.nn.functional.pad(x, (1, 2)), torch.nn.functional.pad(x, (1, 0, 0, 1), value=2.0)),
    "indices": lambda x: (x[[0, 1, 0]], x[:, :, torch.tensor([0, 2])], x.index_select(-1, torch.tensor([1]))),
    "made": lambda x: (
        torch.zeros_like(x),
        torch.full_like(x, 1j),
        x.new_ones(2),
        torch.full((2,), 1 + 2j) + x[0, 0, 0],
    ),
    "windows": lambda x: x.unfold(-1, 2, 1),
    "mirrors": lambda x: [torch.nn.functional.pad(x, (1, 2), mode=mode) for mode in ("reflect", "replicate")],
    "places": lambda x: (
        x.scatter(-1, torch.tensor([[[1, 0]]]), x),
        x.scatter_add(-1, torch.tensor([[[1, 0]]]), x),
        x.gather(-1, torch.tensor([[[1, 0]]])),
        x.take(torch.tensor([3, 0])),
        x.index_put((torch.tensor([1]),), x[0]),
    ),
}


@SIZES
@pytest.mark.parametrize("name", MOVEMENT)
def test_movement(name: str, dynamic: bool) -> None:
    def moved(x: torch.Tensor) -> Any:
        return torch.utils._pytree.tree_map(lambda r: r + 1, MOVEMENT[name](x))

    check(moved, z(2, 1, 4) if name != "order" else z(2, 3, 4), dynamic=dynamic, build_engines=False)


def test_length_overflows_no_sooner_than_its_result() -> None:
    large = torch.tensor([3e38 + 1j, 2e38 + 2e38j, 1e-30 + 1e-30j, 0, complex("inf"), complex("-inf+nanj")])
    check(lambda x: (x.abs(), x.sgn()), large[:4], build_engines=False)
    check(lambda x: x.abs(), large[4:5], build_engines=False)


def test_angles_have_the_signs_of_the_parts() -> None:
    x = torch.complex(torch.tensor([0.0, -0.0, 0.0, -0.0, -1.0, -1.0]), torch.tensor([0.0, 0.0, -0.0, -0.0, 0.0, -0.0]))
    checked = check(lambda x: x.angle(), x, build_engines=False)
    assert torch.equal(checked.results[0].signbit(), x.angle().signbit())


def test_infinite_times_real_is_what_eager_says() -> None:
    x = torch.tensor([complex("inf+1j"), complex("1+infj"), 1 + 1j])
    check(lambda x: (x * 2.0, x * x.imag, x / 2.0), x, build_engines=False)


def test_what_has_no_rule_stays_between_two_engines() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (torch.linalg.inv(x * 2 + 1) * x).abs()
        return result

    checked = check(model, z(3, 3), whole=False)
    assert len(checked.networks) == 2
    assert ("aten.linalg_inv_ex.default", "there is no rule for it as arithmetic of pairs of reals") in [
        (v.target, v.reason) for v in checked.partitioned.verdicts
    ]


def test_a_graph_of_reals_is_left_alone() -> None:
    module = trace(lambda x: (x * 2).sin(), [torch.randn(3)])
    assert [str(n.target) for n in module.graph.nodes if n.op == "call_function"] == [
        "aten.mul.Tensor",
        "aten.sin.default",
    ]


def test_new_nodes_have_values_and_the_users_line() -> None:
    found = explain(lambda x: (x * x).abs(), z(3))
    assert found.converted
    nodes = [n for segment in found.segments for n in segment.module.graph.nodes if n.op == "call_function"]
    assert all("test_complex" in n.meta["stack_trace"] and n.meta["val"].dtype is torch.float32 for n in nodes)


# -- Fourier transforms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 400, 1021, 1024, 4096])
def test_transforms_round_about_as_little_as_torch(n: int, norm: str) -> None:
    def transforms(z: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = z[:, : n // 2 + 1]
        return (
            torch.fft.fft(z, norm=norm),
            torch.fft.ifft(z, norm=norm),
            torch.fft.rfft(x, norm=norm),
            torch.fft.fft(x, norm=norm),
            torch.fft.irfft(half, n, norm=norm),
            torch.fft.hfft(half, n, norm=norm),
            torch.fft.ihfft(x, norm=norm),
        )

    given = z(2, n), torch.randn(2, n)
    checked = check(
        lambda *a: [r.clone() for r in transforms(*a)], *given, build_engines=norm == "ortho", rtol=1, atol=99
    )
    exact = transforms(given[0].to(torch.complex128), given[1].double())
    for got, want in zip(checked.results, exact, strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def varying(z: torch.Tensor, x: torch.Tensor, half: torch.Tensor, norm: str = "ortho") -> list[torch.Tensor]:
    found = (
        torch.fft.fft(z, norm=norm),
        torch.fft.ifft(z, norm=norm),
        torch.fft.rfft(x, norm=norm),
        torch.fft.fft(x, norm=norm),
        torch.fft.ihfft(x, norm=norm),
        torch.fft.irfft(half, norm=norm),
        torch.fft.hfft(z, x.shape[1], norm=norm),
    )
    return [result.clone() for result in found]


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
@pytest.mark.parametrize("n", [3, 8, 400, 1021])
def test_transforms_of_varying_lengths_round_no_more(n: int, norm: str) -> None:
    given = z(2, n), torch.randn(2, n), z(2, n // 2 + 1)
    checked = evaluate(functools.partial(varying, norm=norm), *given, dynamic=True, build_engines=n == 8)
    exact = varying(given[0].to(torch.complex128), given[1].double(), given[2].to(torch.complex128), norm)
    assert len(checked.networks) == 1
    for got, want in zip(checked.results, exact, strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_lengths_that_vary_from_call_to_call() -> None:
    """Even and odd ones, in one engine until one is beyond its range."""
    model = compiled(varying, dynamic=True, strict=True)
    reset_report()
    with torch.no_grad():
        for n in (12, 7, 3, 31, 100):
            given = z(2, n), torch.randn(2, n), z(2, n // 2 + 1)
            assert_same(model(*given), varying(*given))
    counts = report()
    assert (counts["graphs"], counts["engines_built"]) == (1, 2)


@SIZES
@pytest.mark.parametrize("dims", [(0,), (0, 1), (2, 0), (-1, -2, -3)])
def test_transforms_of_several_dims(dims: tuple[int, ...], dynamic: bool) -> None:
    def transforms(z: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        found = torch.fft.fftn(z, dim=dims), torch.fft.rfftn(x, dim=dims), torch.fft.irfftn(z, dim=dims)
        return [result.clone() for result in found]

    check(transforms, z(4, 5, 6), torch.randn(4, 5, 6), dynamic=dynamic)


@SIZES
def test_whispers_front_end(dynamic: bool) -> None:
    window, filters = torch.hann_window(400), torch.rand(80, 201)

    def features(audio: torch.Tensor, window: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(audio, 400, 160, window=window, return_complex=True)
        mel = (filters @ spectrum[..., :-1].abs() ** 2).clamp(min=1e-10).log10()
        return (torch.maximum(mel, mel.amax() - 8.0) + 4.0) / 4.0

    with torch.no_grad():
        model = compiled(features, dynamic=dynamic, strict=True)
        for length in (3200, 4800) if dynamic else (3200,):
            audio = torch.randn(2, length)
            before = engine_calls()
            assert_same(model(audio, window, filters), features(audio, window, filters))
            assert engine_calls() == before + 1


def test_fnet_mixes_in_one_engine() -> None:
    checked = check(lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real + x, torch.randn(2, 16, 32))
    assert len(checked.networks) == 1


@pytest.mark.parametrize(
    ("n", "dynamic", "reason"),
    [(1031, False, "length 1031: longer than 1024"), (1031, True, "varies up to 2062: longer than 2048")],
)
def test_other_lengths_stay_in_eager_with_a_reason(n: int, dynamic: bool, reason: str) -> None:
    with refused(reason):
        check(lambda x: torch.fft.rfft(x).abs(), torch.randn(2, n), dynamic=dynamic)
    found = explain(lambda x: torch.fft.rfft(x).abs(), torch.randn(2, n), dynamic=dynamic)
    assert any(reason in v.reason for v in found.eager)


# -- the backend ------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[..., Any], int]] = {
    "in and out": (lambda a, b: a * b + a.sin(), 1),
    "conjugate of an input": (lambda a, b: a.conj(), 0),
    "conjugate of a result": (lambda a, b: ((a * 2).conj(), a * 2), 1),
    "parts of an input": (lambda a, b: (a.imag, a.real, a[0]), 0),
    "views of a result": (lambda a, b: [y := a * b, y.view(-1)[2:], y.real, y.mT], 1),
    "imaginary part of a conjugate": (lambda a, b: (a * b).conj().imag * 2 + 1, 1),
    "view of the same": (lambda a, b: (a * b).conj().imag, 1),
    "a constant": (lambda a, b: a * torch.tensor([1j, 2, 3, 4]), 1),
    "unchanged": (lambda a, b: (b, a), 0),
}


@SIZES
@pytest.mark.parametrize("name", MODELS)
def test_complex_arguments_and_results(name: str, dynamic: bool) -> None:
    model, engines = MODELS[name]
    a, b = z(3, 4), z(3, 4)
    with torch.no_grad():
        before = engine_calls()
        got, want = compiled(model, dynamic=dynamic, strict=True)(a, b), model(a, b)
    assert_same(got, want)
    assert engine_calls() == before + engines
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True):
        assert (one.stride(), one.dtype) == (other.stride(), other.dtype)
        assert (one._is_view() and one.data_ptr() == a.data_ptr()) == (
            other._is_view() and other.data_ptr() == a.data_ptr()
        )


def test_conjugates_and_their_parts_as_arguments() -> None:
    with torch.no_grad():
        for x in (z(3, 4).conj(), z(3, 4).mH, z(3, 4)[:, ::2], z(3, 4)):
            assert_same(compiled(lambda x: x * 2 + 1, strict=True)(x), x * 2 + 1)
        sign = z(3, 4).conj().imag
        assert sign.is_neg()
        assert_same(compiled(lambda x: (x * 2 + 1, x.t()), strict=True)(sign), (sign * 2 + 1, sign.t()))


class Turned(torch.nn.Module):
    """A complex weight, and a complex buffer that each call changes."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(z(4, 4))
        self.register_buffer("count", torch.zeros(4, dtype=C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1j)
        return (x @ self.weight + self.count).abs()


def test_complex_weights_and_buffers_follow_the_model() -> None:
    model = Turned()
    eager, fast, x = copy.deepcopy(model), compiled(model, strict=True), z(3, 4)
    with torch.no_grad():
        for step in range(4):
            before = engine_calls()
            assert_same(fast(x), eager(x))
            assert_same(model.count, eager.count)
            assert engine_calls() > before
            for module in (model, eager):
                module.weight.mul_(1 + 1j) if step % 2 else module.weight.copy_(module.weight.conj())


def test_mutation_of_an_argument() -> None:
    def turn(x: torch.Tensor) -> torch.Tensor:
        x.mul_(2j)
        x[0].imag.zero_()
        return x.abs()

    x = z(3, 4)
    other = x.clone()
    with torch.no_grad():
        assert_same(compiled(turn, strict=True)(x), turn(other))
    assert_same(x, other)
