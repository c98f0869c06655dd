"""What an engine must do besides computing: follow the shapes, the memory and the weights of its calls.

Each case is a function of a `Trial`. What it says of TensorRT it says through the same code as a user's model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trt_dynamo import trt
from trt_dynamo.reports import report
from trt_dynamo.selftest.models import Decoder, ids, network, rows
from trt_dynamo.selftest.trial import Trial, case

# -- shapes -----------------------------------------------------------------------------------------------------------


@case("shapes.any_batch")
def any_batch(t: Trial) -> None:
    """One engine for every size of batch."""
    t.same(network(), *rows(8), dynamic=True, also=[rows(n) for n in (2, 3, 17, 64)])
    t.answered(engines=1)


@case("shapes.two_sizes")
def two_sizes(t: Trial) -> None:
    """Batch and length of sequences, both symbolic."""
    sizes = [(2, 9), (5, 33), (3, 16)]
    t.same(Decoder().eval(), ids(4, 12), dynamic=True, also=[[ids(*size)] for size in sizes])
    t.answered(engines=1)


@case("shapes.growth")
def growth(t: Trial) -> None:
    """Sizes beyond the engine's range: an engine for a wider one."""
    model = network().to(t.device)
    compiled = t.compile(model, dynamic=True)
    for count in (4, 300, 3000):
        t.agree(compiled, model, *rows(count))
    t.answered()
    assert report()["rebuilds"] >= 1, "no range grew"


@case("shapes.empty_and_one")
def empty_and_one(t: Trial) -> None:
    """Sizes of 0 and 1."""
    model = network().to(t.device)
    compiled = t.compile(model)
    for count in (0, 1, 2):
        t.agree(compiled, model, *rows(count))


@case("shapes.profiles")
def several_profiles(t: Trial) -> None:
    """An engine with more than one optimization profile."""
    t.same(network(), *rows(8), dynamic=True, profiles=3, also=[rows(n) for n in (8, 8, 2, 60, 60, 8)])


@case("shapes.found_by_the_engine")
def found_by_the_engine(t: Trial) -> None:
    """`nonzero` inside of an engine, which asks for memory when it knows the size."""
    if not trt.has_data_dependent_sizes():
        t.skip("TensorRT for RTX has no NonZero")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        t.same(lambda x: torch.nonzero(x > 0.5) * 2, torch.rand(9, 7), also=[[torch.zeros(9, 7)], [torch.ones(9, 7)]])


# -- memory -----------------------------------------------------------------------------------------------------------


@case("memory.layouts")
def layouts(t: Trial) -> None:
    """Inputs in channels-last, transposed, sliced and not aligned."""
    conv = nn.Conv2d(3, 8, 3, padding=1).eval()
    image = torch.randn(2, 3, 12, 12)
    t.same(conv, image.to(memory_format=torch.channels_last))
    model = network().to(t.device)
    compiled = t.compile(model)
    flat = torch.randn(16 * 32 + 1, device=t.device)
    for x in (torch.randn(32, 16).T, torch.randn(16, 64)[:, ::2], flat[1:].view(16, 32)):
        with torch.no_grad():
            x = x.to(t.device)
            t.compare(compiled(x), model(x))
    t.answered()


@case("memory.results_stay")
def results_stay(t: Trial) -> None:
    """A result is not overwritten by later calls."""
    model = network().to(t.device)
    compiled = t.compile(model)
    inputs = t.place(rows(8, 8, 8, 8))
    with torch.no_grad():
        results = [compiled(x) for x in inputs]
        for result, x in zip(results, inputs, strict=True):
            t.compare(result, model(x))


@case("memory.written_inputs")
def written_inputs(t: Trial) -> None:
    """A model that writes into an argument and a buffer."""

    class Running(nn.Module):
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(32))

        def forward(self, x: Tensor, out: Tensor) -> Tensor:
            self.total += x.sum(0)
            out.copy_(x * 2)
            return torch.relu(x) + self.total

    ours, eager = Running().to(t.device), Running().to(t.device)
    compiled = t.compile(ours)
    with torch.no_grad():
        for x in t.place(rows(4, 4, 4)):
            outs = torch.zeros_like(x), torch.zeros_like(x)
            t.compare(compiled(x, outs[0]), eager(x, outs[1]))
            t.compare([outs[0], ours.total], [outs[1], eager.total])
    t.answered()


@case("memory.many_calls")
def many_calls(t: Trial) -> None:
    """A thousand calls of changing shapes keep no memory."""
    t.needs_gpu()
    compiled = t.same(network(), *rows(8), dynamic=True)
    with torch.no_grad():
        for turn in range(1000):
            compiled(torch.randn(2 + turn % 60, 32, device=t.device))
            if turn == 200:
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    grown = torch.cuda.memory_allocated() - before
    assert grown < 2**20, f"{grown} bytes more are allocated after 800 further calls"


# -- weights ----------------------------------------------------------------------------------------------------------


def change(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


@case("weights.refit")
def refit(t: Trial) -> None:
    """Weights that change in place, through `.data`, and by loading: each answer is of the present ones."""
    model, other = network().to(t.device), network()
    (x,) = rows(8)
    compiled = t.compile(model)
    t.agree(compiled, model, x)
    t.answered()
    for write in (
        lambda: change(model, 0.5),
        lambda: change(model, 1.5),
        lambda: [p.data.mul_(0.8) for p in model.parameters()],
        lambda: model.load_state_dict(other.state_dict()),
    ):
        write()
        for _ in range(2):
            t.agree(compiled, model, x)
    counts = report()
    if t.runtime == "reference" or trt.why_no_refit() is None:
        assert counts["refits"] >= 3, f"{counts['refits']} refits: {counts['eager_reasons']}"


@case("weights.inputs")
def weights_as_inputs(t: Trial) -> None:
    """An engine that reads the weights from the model at each call."""
    model = network().to(t.device)
    (x,) = rows(8)
    compiled = t.same(model, x, weights="inputs")
    change(model, 0.5)
    t.agree(compiled, model, x)
    t.answered(engines=1)


@case("weights.two_models")
def two_models(t: Trial) -> None:
    """Two instances of a class share one compiled graph, and not their weights."""
    models = [network().to(t.device) for _ in range(2)]
    compiled = [t.compile(model) for model in models]
    (x,) = rows(8)
    for _ in range(2):
        for ours, eager in zip(compiled, models, strict=True):
            t.agree(ours, eager, x)
    t.answered()


@case("weights.training")
def training(t: Trial) -> None:
    """A model that is trained and evaluated by turns: gradients are eager's, answers those of the trained weights."""
    model = network().to(t.device)
    compiled = t.compile(model, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = t.place(rows(8)[0])
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        t.compare([p.grad for p in model.parameters()], list(wanted))
        optimizer.step()
        t.agree(compiled, model, x)
    assert report()["engine_calls"], "no engine answered the evaluations"
