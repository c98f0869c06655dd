"""Where an engine goes wrong: the first node of a segment whose value is not eager's.

Comes in: a segment, and a call whose results were wrong. Goes out: a `Finding`. The nodes' values come from an engine
that gives out all of them; where that hides the fault, because TensorRT fuses less around a value that it gives out,
engines for ever shorter prefixes of the graph follow, about log2 of the number of nodes.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from trt_dynamo.aten_converters import ConvertedNetwork, convert
from trt_dynamo.aten_converters.walker import getattr_path, source_line
from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.module_paths import modules_around
from trt_dynamo.partition import Segment
from trt_dynamo.precision import Precision
from trt_dynamo.profiles import Ranges
from trt_dynamo.runtime.agreement import (
    Accuracy,
    Difference,
    Rounded,
    difference,
    excusable,
    excused,
    near,
)
from trt_dynamo.runtime.engine import Engine

log = logging.getLogger(__name__)

MakeEngine = Callable[[ConvertedNetwork, Ranges], Engine]

# Under this name a node's `meta` has its name in the segment, also in the graph that is written for a half type.
ORIGIN = "node_of_segment"

# Beyond this, values are masks, which a half type holds as something smaller.
MASK = 1e30


@dataclasses.dataclass(frozen=True)
class Finding:
    """The first bad node of a segment; `module` is the path of the module that it is in, `source` the user's line.
    `before` is the largest relative error of what it reads, `after` says how its own value differs. `why` says why
    there is none.
    """

    node: str = ""
    target: str = ""
    module: str = ""
    source: str = ""
    before: float = 0.0
    after: str = ""
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return self.why
        inside = f" in {self.module}" if self.module else ""
        line = f", {self.source}" if self.source else ""
        return (
            f"The first bad node is {self.node} ({self.target}){inside}{line}: relative error {self.before:.2g} before "
            f"it; after it: {self.after}"
        )


class Bisection:
    """Finds the first bad node of a segment.

    Args:
        segment: as the partition made it.
        precision: what its engines are made of.
        accuracy: how near values must be.
        make: an engine for a network, built anew.
        wide_products: as for `convert`.
    """

    def __init__(
        self, segment: Segment, precision: Precision, accuracy: Accuracy, make: MakeEngine, wide_products: bool
    ) -> None:
        self.segment, self.precision, self.accuracy = segment, precision, accuracy
        self.make, self.wide_products = make, wide_products

    def __call__(self, engine: Engine, args: Sequence[Any]) -> Finding:
        """What is wrong with the engine that answered a call wrongly. Never raises: a search that fails says so."""
        try:
            with torch.no_grad():
                return self.find(engine, args)
        except Exception as error:
            log.debug("the search for the first bad node failed", exc_info=True)
            return Finding(why=f"The search for the first bad node failed: {type(error).__name__}: {error}")

    def find(self, engine: Engine, args: Sequence[Any]) -> Finding:
        module = self.segment.module
        given = dict(zip(self.segment.arguments, args, strict=True))
        weights = {} if engine.taken else {name: given[name] for name in self.segment.weights}
        probe = Probe(self, self.written(weights, engine), weights, dict(engine.built_for), args)
        (output,) = module.graph.find_nodes(op="output")
        results = [node for node in output.args[0] if node.name in probe.nodes]
        wrong = probe.bad(results)
        if not wrong:
            return Finding(
                why="No node is at fault: an engine that is built anew for these weights agrees with eager. What was "
                "stored, or refitted, is wrong (`python -m trt_dynamo cache clear` empties the cache)"
            )
        nodes = [node for node in module.graph.nodes if node.name in probe.nodes]
        try:
            found = probe.bad(nodes)
        except TrtDynamoError as error:
            log.info("no engine gives out all values: %s", error)
            found = {}
        node = next((n for n in nodes if n in found), None)
        if node is None:
            node = bisected(nodes, next(n for n in nodes if n in wrong), probe)
        return self.described(node, probe)

    def written(self, weights: Mapping[str, torch.Tensor], engine: Engine) -> GraphModule:
        """The graph that the engine was made of; its nodes know which node of the segment they stand for."""
        for node in self.segment.module.graph.nodes:
            node.meta[ORIGIN] = node.name
        again = Precision(self.segment.module, self.segment.weights, self.precision.settings, self.precision.findings)
        again.usual = self.precision.usual
        return again.graph([weights[name] for name in self.segment.weights] if not engine.taken else None).module

    def described(self, node: Node, probe: Probe) -> Finding:
        shown = node.args[0] if node.target is operator.getitem else node
        assert isinstance(shown, Node)
        paths = [path for path, _ in modules_around(shown) if path]
        before = max((probe.seen[n].error for n in sources(node, probe) if n in probe.seen), default=0.0)
        return Finding(
            node.name,
            str(shown.target),
            paths[-1] if paths else "",
            source_line(shown),
            before,
            str(probe.seen[node]),
        )


class Probe:
    """Asks engines for values inside of a segment. `nodes`: the nodes of the engine's graph by the name of the
    segment's; `seen`: how the values that were asked for differ from eager's.
    """

    def __init__(
        self,
        bisection: Bisection,
        written: GraphModule,
        weights: Mapping[str, torch.Tensor],
        ranges: Ranges,
        args: Sequence[Any],
    ) -> None:
        self.bisection, self.written, self.weights, self.ranges, self.args = bisection, written, weights, ranges, args
        self.nodes = {
            str(node.meta[ORIGIN]): node
            for node in written.graph.nodes
            if node.op == "call_function" and ORIGIN in node.meta and isinstance(node.meta.get("val"), torch.Tensor)
        }
        self.seen: dict[Node, Difference] = {}
        module, unit = bisection.segment.module, bisection.accuracy.unit
        self.eager: dict[Node, Any] = {}
        Rounded(module, 0.0, self.eager).run(*args)
        self.noise: dict[Node, Any] = {}
        Rounded(module, unit, self.noise).run(*args)

    def bad(self, nodes: Sequence[Node]) -> dict[Node, Difference]:
        """Those of the segment's nodes whose values, in a new engine that gives them out, are wrong.

        Raises:
            TrtDynamoError: no engine can give them out.
        """
        part = with_results(self.written, [self.nodes[node.name] for node in nodes])
        network = convert(part, self.weights, self.ranges, wide_products=self.bisection.wide_products)
        engine = self.bisection.make(network, self.ranges)
        if not self.weights:
            names = [node.name for node in part.graph.find_nodes(op="placeholder")]
            engine.take_weights([names.index(name) for name in self.bisection.segment.weights])
        found = {}
        for node, value in zip(nodes, engine(self.args), strict=True):
            self.seen[node] = compared(value, self.eager[node])
            if self.is_bad(node):
                found[node] = self.seen[node]
        return found

    def is_bad(self, node: Node) -> bool:
        seen, accuracy = self.seen[node], self.bisection.accuracy
        if near(seen, accuracy):
            return False
        noise = compared(self.noise[node], self.eager[node])
        return accuracy.rigid or not excusable(seen) or not excused(seen, noise)


def bisected(nodes: Sequence[Node], wrong: Node, probe: Probe) -> Node:
    """The node where a prefix of the graph turns from right to wrong; the prefix up to `wrong` is."""
    above = ancestors(wrong)
    candidates = [node for node in nodes if node in above]
    low, high = -1, len(candidates)  # the last right one, the first wrong one, which may be `wrong` itself
    while high - low > 1:
        middle = (low + high) // 2
        try:
            bad = bool(probe.bad([candidates[middle]]))
        except TrtDynamoError as error:
            log.info("no engine gives out %s: %s", candidates[middle].name, error)
            del candidates[middle]
            high -= 1
            continue
        low, high = (low, middle) if bad else (middle, high)
    return candidates[high] if high < len(candidates) else wrong


def compared(value: torch.Tensor, expected: torch.Tensor) -> Difference:
    """How an engine's value differs from eager's."""
    half = value.dtype is not expected.dtype
    value = value.to(expected.dtype)
    if half:  # a mask of -3e38 is cut there
        mask = expected.abs() > MASK
        value, expected = (torch.where(mask, 0.0, t) for t in (value, expected))
    return difference(value, expected)


def ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        new = {n for n in waiting.pop().all_input_nodes if n not in found}
        found |= new
        waiting += new
    return found


def sources(node: Node, probe: Probe) -> Iterator[Node]:
    """What a node reads, past nodes whose value no engine gives out."""
    for each in node.all_input_nodes:
        if each.name in probe.nodes:
            yield each
        elif each.op == "call_function":
            yield from sources(each, probe)


def with_results(module: GraphModule, results: Sequence[Node]) -> GraphModule:
    """The part of the graph that makes these results, with all of its arguments."""
    wanted = {n for node in results for n in ancestors(node)} | {*results}
    graph, copies = Graph(), dict[Node, Node]()
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in wanted:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in results))
    names = [str(node.target) for node in wanted if node.op == "get_attr"]
    return GraphModule({name: getattr_path(module, name) for name in names}, graph)
