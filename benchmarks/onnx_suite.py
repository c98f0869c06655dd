"""The reference evaluator against the ONNX backend tests, parsed by NVIDIA's parser: `python -m benchmarks.onnx_suite`.

In: the test cases that the `onnx` package makes (node, simple, pytorch-converted, pytorch-operator). Each is taken
`raw`, as it is, and as `const`, where all inputs but the first become initializers, as exporters write models. Out: a
`Result` per case and the counts. Workers are processes of their own, for a fault in the parser ends a process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from onnx import numpy_helper
from onnx.backend.test import loader
from torch import Tensor

from tests.reference_deviations import DEVIATIONS
from trt_dynamo.errors import Unsupported
from trt_dynamo.log import logger
from trt_dynamo.reference import evaluate
from trt_dynamo.trt import trt

README = Path(__file__).parents[1] / "README.md"
GROUPS = ("node", "simple", "pytorch-converted", "pytorch-operator")
VARIANTS = ("raw", "const")
# How far a result may be from the expected one, relative and absolute, by its dtype; integers must be equal.
TOLERANCES = {torch.float32: (1e-3, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1e-2, 1e-2)}
# Sums of many terms that nearly cancel: the results are up to 30 in size, and the small ones are noise.
SUMS = {"test_stft": 3e-4, "test_stft_with_window": 3e-4}
RANDOM = {"RandomUniform", "RandomUniformLike", "RandomNormal", "RandomNormalLike", "Bernoulli"}


@dataclass(frozen=True)
class Case:
    """A model with the data of its tests."""

    group: str
    name: str
    variant: str
    model: onnx.ModelProto
    data: list[tuple[list[Any], list[Any]]]

    @property
    def id(self) -> str:
        return f"{self.group}/{self.name}/{self.variant}"


@dataclass(frozen=True)
class Result:
    """What came of a case.

    `passed`, `wrong`, `unsupported` (by the evaluator), `refused` (by the parser), `crashed` (the parser), or `error`
    (anything else that was raised).
    """

    id: str
    outcome: str
    detail: str = ""


def cases() -> Iterator[Case]:
    """Every case, always in the same order."""
    for group in GROUPS:
        for test in sorted(loader.load_model_tests(kind=group), key=lambda test: str(test.name)):
            if test.model is None and test.model_dir is None:
                continue
            folder = Path(test.model_dir or "")
            model = test.model or onnx.load(folder / "model.onnx")
            data = test.data_sets if test.data_sets is not None else read_data(folder, model)
            data = [([array_of(x) for x in inputs], [array_of(y) for y in outputs]) for inputs, outputs in data]
            yield Case(group, test.name, "raw", model, data)
            if len(model.graph.input) > 1 and all_arrays(data):
                yield Case(group, test.name, "const", model, data)


def array_of(value: Any) -> Any:
    """A test's value as an array; what is not a tensor (a sequence, an absent optional) as it is."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return numpy.asarray(value) if isinstance(value, numpy.generic | int | float) else value


def all_arrays(data: list[tuple[list[Any], list[Any]]]) -> bool:
    return all(isinstance(value, numpy.ndarray) for inputs, _ in data for value in inputs)


def read_data(folder: Path, model: onnx.ModelProto) -> list[tuple[list[Any], list[Any]]]:
    """The tests beside a model on disk: a list of (inputs, outputs)."""
    found = []
    for test in sorted(folder.glob("test_data_set_*")):
        inputs = [
            read_value(test / f"input_{i}.pb", info)
            for i, info in enumerate(model.graph.input)
            if (test / f"input_{i}.pb").exists()
        ]
        outputs = [read_value(test / f"output_{i}.pb", info) for i, info in enumerate(model.graph.output)]
        found.append((inputs, outputs))
    return found


def read_value(path: Path, info: onnx.ValueInfoProto) -> Any:
    if info.type.WhichOneof("value") != "tensor_type":
        return None
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def with_constants(model: onnx.ModelProto, inputs: Sequence[Any]) -> onnx.ModelProto:
    """The model with all inputs but the first as initializers."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for info, value in list(zip(model.graph.input, inputs, strict=False))[1:]:
        changed.graph.initializer.append(numpy_helper.from_array(value, info.name))
        changed.graph.input.remove(info)
    return changed


def to_tensor(value: Any, elem_type: int) -> Tensor:
    """An array of an ONNX type as a tensor, INT4 and FP4 as the evaluator keeps them."""
    array = numpy.array(value, order="C")
    if elem_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.view(numpy.int16)).view(torch.bfloat16)
    if elem_type == onnx.TensorProto.FLOAT8E4M3FN:
        return torch.from_numpy(array.view(numpy.uint8)).view(torch.float8_e4m3fn)
    if elem_type == onnx.TensorProto.INT4:
        return torch.from_numpy(array.astype(numpy.int8))
    if elem_type == onnx.TensorProto.FLOAT4E2M1:
        return torch.from_numpy(array.astype(numpy.float32))
    # TensorRT has no double: the parser makes float32 of it.
    return torch.from_numpy(array.astype(numpy.float32) if array.dtype == numpy.float64 else array)


def constants_of(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The initializers of the types that TensorRT does not let Python read back."""
    unreadable = (
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.FLOAT8E4M3FN,
        onnx.TensorProto.INT4,
        onnx.TensorProto.FLOAT4E2M1,
    )
    return {
        tensor.name: to_tensor(numpy_helper.to_array(tensor), tensor.data_type)
        for tensor in model.graph.initializer
        if tensor.data_type in unreadable
    }


def run(case: Case, device: str) -> Result:
    """Parses, evaluates (on the device) and compares one case."""
    for inputs, outputs in case.data:
        model = case.model if case.variant == "raw" else with_constants(case.model, inputs)
        network = trt.Builder(logger()).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger())
        if not parser.parse(model.SerializeToString()):
            reason = parser.get_error(0).desc() if parser.num_errors else "no reason given"
            return Result(case.id, "refused", reason)
        try:
            given = {name: value.to(device) for name, value in bind(network, model, inputs).items()}
            found = {name: value.cpu() for name, value in evaluate(network, given, constants_of(model)).items()}
        except Unsupported as error:
            return Result(case.id, "unsupported", str(error))
        except Exception as error:  # noqa: BLE001  it becomes the case's record
            return Result(case.id, "error", f"{type(error).__name__}: {error}")
        detail = difference(network, case.name, model, found, outputs)
        if detail:
            return Result(case.id, "wrong", detail)
    return Result(case.id, "passed")


def bind(network: Any, model: onnx.ModelProto, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The test's inputs by the network's names. The parser may rename an input, but keeps their order."""
    given = {
        info.name: (value, info.type.tensor_type.elem_type)
        for info, value in zip(model.graph.input, inputs, strict=False)
    }
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    order = list(given)
    return {name: to_tensor(*given[name if name in given else order[i]]) for i, name in enumerate(names)}


def difference(
    network: Any, name: str, model: onnx.ModelProto, found: dict[str, Tensor], outputs: Sequence[Any]
) -> str:
    """What is not as expected, or "" . Of random results only shape and dtype count."""
    outs = [network.get_output(i).name for i in range(network.num_outputs)]
    operators = {node.op_type for node in model.graph.node}
    if len(outs) != len(model.graph.output):
        return f"{len(outs)} outputs; {len(model.graph.output)} expected"
    for out, info, value in zip(outs, model.graph.output, outputs, strict=True):
        want, have = to_tensor(value, info.type.tensor_type.elem_type), found[out]
        if have.shape != want.shape:
            return f"{out}: shape {tuple(have.shape)}; {tuple(want.shape)} expected"
        if have.dtype != want.dtype:
            return f"{out}: {have.dtype}; {want.dtype} expected"
        if operators & RANDOM:
            continue
        if "NonMaxSuppression" in operators:
            # ONNX does not say in which order the boxes come; TensorRT sorts them by score.
            have, want = in_order(have), in_order(want)
        relative, absolute = TOLERANCES.get(have.dtype, (0.0, 0.0))
        close = torch.isclose(have.double(), want.double(), relative, SUMS.get(name, absolute), equal_nan=True)
        if not bool(close.all()):
            worst = (have.double() - want.double()).abs()[~close].max()
            return f"{out}: {int((~close).sum())} of {close.numel()} elements differ, by up to {float(worst):.3g}"
    return ""


def in_order(rows: Tensor) -> Tensor:
    return torch.tensor(sorted(rows.tolist()), dtype=rows.dtype).reshape(rows.shape)


def work(start: int, share: int, of: int, device: str) -> None:
    """A worker: runs every `of`-th case from number `start` on, and writes a line per case."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    for index, case in enumerate(cases()):
        if index % of == share and index >= start:
            print(json.dumps({"starts": index, "id": case.id}), flush=True)
            print(json.dumps({"result": asdict(run(case, device))}), flush=True)


def run_share(share: int, of: int, device: str, results: list[Result]) -> None:
    """Runs a worker to its end; where it dies, the case that it was at is recorded and another goes on after it."""
    start: int | None = 0
    while start is not None:
        command = [sys.executable, "-m", "benchmarks.onnx_suite", "--device", device]
        command += ["--worker", str(start), str(share), str(of)]
        start = run_worker(command, results)


def run_worker(command: list[str], results: list[Result]) -> int | None:
    """Runs one worker; the number of the case to go on with, or None if it came to its end."""
    current: tuple[int, str] | None = None
    folder = Path(__file__).parents[1]
    with tempfile.TemporaryFile("w+") as said:  # the parser talks a lot
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=folder) as worker:
            for line in worker.stdout or ():
                if not line.startswith("{"):
                    continue
                entry = json.loads(line)
                current = None if "result" in entry else (entry["starts"], entry["id"])
                results += [Result(**entry["result"])] if "result" in entry else []
        if worker.returncode == 0:
            return None
        if current is None:
            said.seek(0)
            raise RuntimeError(f"a worker ended with status {worker.returncode}: {said.read()[-2000:]}")
    results.append(Result(current[1], "crashed", f"the process ended with status {worker.returncode}"))
    return current[0] + 1


def run_all(workers: int = 2, device: str = "cpu") -> list[Result]:
    """Every case's result, in no particular order."""
    results: list[Result] = []
    with ThreadPoolExecutor(workers) as pool:
        for running in [pool.submit(run_share, share, workers, device, results) for share in range(workers)]:
            running.result()
    return results


def judged(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results by what they mean: a deviation of the parser counts as `deviates`, never as passed or wrong."""
    by: dict[str, list[Result]] = {}
    for result in results:
        listed = result.id in DEVIATIONS
        outcome = result.outcome
        if listed and outcome in ("wrong", "error"):
            outcome = "deviates"
        elif listed and outcome == "passed":
            outcome = "listed but passes"
        by.setdefault(outcome, []).append(result)
    return by


def summary(results: Sequence[Result]) -> str:
    """A table of the counts by group and variant."""
    outcomes = ["passed", "deviates", "unsupported", "wrong", "error", "listed but passes", "refused", "crashed"]
    counts: Counter[tuple[str, str, str]] = Counter()
    for outcome, found in judged(results).items():
        for result in found:
            group, _, variant = result.id.split("/")
            counts[group, variant, outcome] += 1
    lines = ["| group | variant | cases | " + " | ".join(outcomes) + " |", "| --- " * (3 + len(outcomes)) + "|"]
    for group in (*GROUPS, "all"):
        for variant in VARIANTS:
            row = [sum(counts[g, variant, o] for g in GROUPS if group in (g, "all")) for o in outcomes]
            lines.append(f"| {group} | {variant} | {sum(row)} | " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def readme_lines(results: Sequence[Result]) -> str:
    """What the README says of the results."""
    lines = ["| | cases | passed | deviates | refused | unsupported | wrong |", "| --- " * 7 + "|"]
    for variant in VARIANTS:
        chosen = [result for result in results if result.id.endswith(f"/{variant}")]
        found = Counter({outcome: len(those) for outcome, those in judged(chosen).items()})
        refused = found["refused"] + found["crashed"]
        wrong = found["wrong"] + found["error"] + found["listed but passes"]
        row = [len(chosen), found["passed"], found["deviates"], refused, found["unsupported"], wrong]
        lines.append(f"| {variant} | " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def write_readme(results: Sequence[Result]) -> None:
    """Puts the lines between the README's two comments `onnx_suite`."""
    before, rest = README.read_text().split("<!-- onnx_suite -->\n")
    after = rest.split("<!-- /onnx_suite -->")[1]
    README.write_text(f"{before}<!-- onnx_suite -->\n{readme_lines(results)}\n<!-- /onnx_suite -->{after}")


def main() -> None:
    arguments = argparse.ArgumentParser(description="Runs the evaluator over the ONNX backend tests")
    arguments.add_argument("--worker", nargs=3, type=int, metavar=("START", "SHARE", "OF"), help=argparse.SUPPRESS)
    arguments.add_argument("--workers", type=int, default=2, help="processes to run at once")
    arguments.add_argument("--device", default="cpu", help="where to evaluate: cpu or cuda")
    arguments.add_argument("--show", action="append", default=[], help="also list the cases of this outcome")
    arguments.add_argument("--readme", action="store_true", help="also write the counts into README.md")
    chosen = arguments.parse_args()
    if chosen.worker:
        start, share, of = chosen.worker
        work(start, share, of, chosen.device)
        return
    began = time.perf_counter()
    results = run_all(chosen.workers, chosen.device)
    for outcome, found in judged(results).items():
        if outcome in ("wrong", "error", "listed but passes", *chosen.show):
            for result in sorted(found, key=lambda r: r.id):
                print(f"{outcome}: {result.id}: {result.detail[:300]}")
    print(summary(results))
    if chosen.readme:
        write_readme(results)
    print(f"onnx {onnx.__version__}, {trt.__name__} {trt.__version__}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
