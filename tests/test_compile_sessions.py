"""Calls in other threads while a graph is traced for the backend."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import _symbolic_trace

from tests.compiled import assert_same, compiled


def in_another_thread(work: Callable[[], Any]) -> Any:
    """What `work` gives or raises there."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


def test_what_is_compiled_answers_other_threads_while_a_graph_is_traced() -> None:
    """torch.fx marks the whole process while AOTAutograd traces: Dynamo 2.11 alone raises at such a call."""
    net, x = torch.nn.Linear(3, 4), torch.randn(2, 3)
    expected = net(x).detach()
    ready = compiled(net)
    answers: list[Any] = []

    def call() -> torch.Tensor:
        with torch.no_grad():
            return ready(x)  # type: ignore[no-any-return]

    with torch.library._scoped_library("trt_dynamo_tests", "FRAGMENT") as library:
        library.define("met_while_traced(Tensor x) -> Tensor")
        library.impl("met_while_traced", torch.clone, "CPU")

        def fake(x: torch.Tensor) -> torch.Tensor:
            if _symbolic_trace._is_fx_tracing_flag:
                answers.append(in_another_thread(call))
            return torch.empty_like(x)

        torch.library.register_fake("trt_dynamo_tests::met_while_traced", fake, lib=library)
        with torch.no_grad():
            assert_same(call(), expected)
            other = compiled(lambda y: torch.ops.trt_dynamo_tests.met_while_traced(y.exp()) + 1)
            assert_same(other(x), x.exp() + 1)
    assert answers
    for answer in answers:
        assert_same(answer, expected)
    assert not torch.compiler.is_compiling()
