"""Compiled modules as files: `save` and `load`. In: what `trt_dynamo.compile` made. Out: one file, and the same module
from it, in a process that has neither the model's source nor a cache.

The file is a zip, nothing in it compressed:

    seal            the SHA-256 of `manifest.json`, and its signature where a key is set
    manifest.json   format, versions, GPU, options, and the size and SHA-256 of each other member
    graph.pt2       the exported graph and its weights, as `torch.export.save` writes them
    engines         the plans, as entries of the engine cache (`cache.packing`)

Nothing is unpickled: `torch.export` keeps the graph as JSON and tensors as bytes. Nothing is read before its checksum,
and its signature where a key is set, are known.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.export import ExportedProgram

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.cache.carried import Carried
from trt_dynamo.cache.disk import Damaged
from trt_dynamo.cache.entry import recorded, versions
from trt_dynamo.cache.packing import pack, unpack
from trt_dynamo.cache.signing import Signing, signing_of
from trt_dynamo.errors import FileError, TrtDynamoError
from trt_dynamo.exported import ExportedModule, reread, stripped
from trt_dynamo.settings import Settings, warn_once

FORMAT = 1
KIND = "trt_dynamo model"
SEAL, MANIFEST, GRAPH, ENGINES = "seal", "manifest.json", "graph.pt2", "engines"
CHUNK = 2**20

# Members of a program's archive that are no graph and no plain tensor.
FOREIGN = re.compile(r"/(custom_obj_|opaque_obj_|aotinductor/|executorch/|mtia/)")


def save(module: ExportedModule, path: str | os.PathLike[str], *, weights: bool = True) -> None:
    """Writes a compiled module to a file, which appears when all is in it.

    Without `weights` the parameters and buffers stay out of the file, and `load` must be given them; engines have their
    own copies.

    Raises:
        TypeError: it is no module of `trt_dynamo.compile`.
        FileError: the key for signatures cannot be had, or the model holds objects that only pickle could write.
        OSError: the disk refuses.
    """
    if not isinstance(module, ExportedModule):
        raise TypeError(f"only a module of trt_dynamo.compile can be saved, not {type(module).__name__}")
    if module.no_file is None:
        module.no_file = reread(module.program)[1]
    if module.no_file:
        raise FileError(f"torch cannot write this model to a file and read it again: {module.no_file}")
    signing = usable(signing_of(Settings.from_env()))
    program = stripped(module.program, weights=weights)
    file = Path(path)
    with replaced(file) as out, tempfile.TemporaryFile(dir=file.parent) as graph, zipfile.ZipFile(out, "w") as archive:
        torch.export.save(program, cast("io.BytesIO", graph))
        pickled = pickled_in(cast("IO[bytes]", graph))
        if pickled:
            raise FileError(f"the model holds what torch can only pickle: {', '.join(pickled)}")
        engines = io.BytesIO()
        pack(engines, [recorded(key, plan, signing) for key, plan in module.carried.plans.items()])
        members = {GRAPH: added(archive, GRAPH, cast("IO[bytes]", graph)), ENGINES: added(archive, ENGINES, engines)}
        manifest = {
            "kind": KIND,
            "format": FORMAT,
            "platform": platform_of(module.state),
            "options": plain(module.options),
            "weights": weights,
            "members": members,
        }
        text = json.dumps(manifest, indent=1).encode()
        seal = {"sha256": hashlib.sha256(text).hexdigest(), "signature": signing.sign(text)}
        archive.writestr(MANIFEST, text)
        archive.writestr(SEAL, json.dumps(seal))


def load(
    path: str | os.PathLike[str],
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    rebuild: bool = True,
    **options: Any,
) -> ExportedModule:
    """The module that was saved, with its engines; those that do not fit this machine are built anew from the graph.

    Args:
        weights: a state dict, for a file without weights, or to replace those in it (its engines are then rebuilt).
        rebuild: whether an engine may be built that the file lacks.
        options: settings, on top of those that the module was compiled with.

    Raises:
        FileError: the file is damaged, of another format, not signed with our key, its graph is not for this torch, it
            lacks weights, or (with rebuild=False) its engines do not fit; the text says what differs.
        OSError: the file cannot be opened.
    """
    file = Path(path)
    if not zipfile.is_zipfile(file):
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        raise FileError(f"{file} is no file of trt_dynamo.save, or it is cut off")
    settings = Settings.from_env().merge(options)
    signing = usable(signing_of(settings))
    with contextlib.ExitStack() as stack:
        stack.enter_context(readable(file))
        archive = stack.enter_context(zipfile.ZipFile(file))
        manifest = read_manifest(file, archive, signing)
        graph = checked(file, archive, GRAPH, manifest, stack)
        program = program_in(graph, f"in {file}", manifest["platform"]["torch"], FileError)
        plans = read_engines(file, archive, manifest, signing, stack)
    insert_weights(file, program, manifest, weights)
    carried = Carried(plans)
    carried.lacks = lambda: lacking(file, manifest, carried, rebuild=rebuild, given=weights is not None)
    return ExportedModule(program, {**manifest["options"], **options}, carried)


def lacking(file: Path, manifest: dict[str, Any], carried: Carried, *, rebuild: bool, given: bool) -> None:
    """Says why an engine of the file does not fit; raises it where nothing may be built."""
    differs = differences(manifest["platform"], "in the file")
    if given and not differs and manifest["weights"]:
        differs = ["the weights are others"]
    reason = "; ".join(differs) or "the settings, the converters or the weights are others than when it was written"
    told = f"{file} has no engine that fits: {reason}"
    if not rebuild:
        carried.refused = FileError(told)
        raise carried.refused
    warn_once(f"{told}. It is built from the file's graph.")


def differences(platform: Mapping[str, str], where: str) -> list[str]:
    """What of `platform_of` is not as it was."""
    there = platform_of([])
    return [
        f"{name} is {there[name] or 'none'} here and {was or 'none'} {where}"
        for name, was in platform.items()
        if name in there and there[name] != was
    ]


def platform_of(state: list[torch.Tensor]) -> dict[str, str]:
    """What decides whether engines and graph fit, by names for people. The GPU is that of the state, or the current."""
    missing = tensorrt_module.why_missing() is not None
    device = next((tensor.device for tensor in state if tensor.is_cuda), torch.device("cuda"))
    on_gpu = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "trt_dynamo": versions()["trt-dynamo"],
        "TensorRT's package": "" if missing else tensorrt_module.flavor(),
        "TensorRT's version": "" if missing else tensorrt_module.version(),
        "GPU": torch.cuda.get_device_name(device) if on_gpu else "",
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if on_gpu else "",
    }


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON has them. Where the cache lies is this machine's affair."""
    kept = {name: value for name, value in options.items() if not name.startswith("cache")}
    return {
        name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, value in kept.items()
    }


# -- the program ------------------------------------------------------------------------------------------------------


def program_in(archive: IO[bytes], where: str, wrote: str, error: type[TrtDynamoError]) -> ExportedProgram:
    """The program in an archive that torch `wrote` (a version).

    Raises:
        TrtDynamoError: an `error`: it is damaged, this torch cannot read it, or only pickle could.
    """
    try:
        pickled = pickled_in(archive)
        archive.seek(0)
        program = None if pickled else torch.export.load(cast("io.BytesIO", archive))
    except zipfile.BadZipFile as reason:
        raise error(f"the graph {where} is damaged: {reason}") from reason
    except Exception as reason:
        raise error(
            f"torch {torch.__version__} cannot read the graph {where}, which torch {wrote} wrote (a class among the "
            f"arguments or results must be imported first): {type(reason).__name__}: {reason}"
        ) from reason
    if program is None:
        raise error(f"the graph {where} holds what only pickle could read: {', '.join(pickled)}")
    return program


def pickled_in(graph: IO[bytes]) -> list[str]:
    """What of a program's archive torch would hand to pickle, or run as a library."""
    with zipfile.ZipFile(graph) as archive:
        members = archive.infolist()
        found = [each.filename for each in members if "/sample_inputs/" in each.filename and each.file_size]
        found += [each.filename for each in members if FOREIGN.search(each.filename)]
        for name in (each.filename for each in members if each.filename.endswith("_config.json")):
            config = json.loads(archive.read(name)).get("config", {})
            found += [f"{name}: {key}" for key, value in config.items() if value.get("use_pickle")]
    return found


def insert_weights(
    file: Path, program: ExportedProgram, manifest: dict[str, Any], weights: Mapping[str, torch.Tensor] | None
) -> None:
    """Puts the weights that are given into the program, in the place of its own, which must be like them."""
    if weights is None:
        if not manifest["weights"] and program.state_dict:
            raise FileError(f"{file} was saved without weights: load(path, weights=model.state_dict())")
        return
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    wanted = {
        named[node.name]: node.meta["val"]
        for node in program.graph.nodes
        if node.name in named and named[node.name] in program.state_dict
    }
    wrong = [name for name in wanted if name not in weights or not alike(weights[name], wanted[name])]
    if wrong:
        raise FileError(f"the weights given for {file} lack these, or have them in another shape: {', '.join(wrong)}")
    for name, value in wanted.items():
        given = weights[name].detach().to(value.device)
        keep = isinstance(program.state_dict[name], torch.nn.Parameter)
        program.state_dict[name] = torch.nn.Parameter(given, requires_grad=value.requires_grad) if keep else given


def alike(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    return tuple(given.shape) == tuple(wanted.shape) and given.dtype == wanted.dtype


# -- the zip ----------------------------------------------------------------------------------------------------------


def added(archive: zipfile.ZipFile, name: str, source: IO[bytes]) -> dict[str, Any]:
    """Copies a file from its start into the archive, and says its size and checksum."""
    source.seek(0)
    digest, size = hashlib.sha256(), 0
    with archive.open(name, "w", force_zip64=True) as out:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            out.write(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def read_manifest(file: Path, archive: zipfile.ZipFile, signing: Signing) -> dict[str, Any]:
    """What the file says of itself, once its checksum and signature are right."""
    text = archive.read(MANIFEST)
    seal = json.loads(archive.read(SEAL))
    if not isinstance(seal, dict) or seal.get("sha256") != hashlib.sha256(text).hexdigest():
        raise FileError(f"{file} is damaged: the checksum of its manifest differs")
    try:
        signing.check(text, str(seal.get("signature", "")))
    except Damaged as error:
        raise FileError(f"{file} is refused: {error}") from None
    manifest: dict[str, Any] = json.loads(text)
    if manifest.get("kind") != KIND:
        raise FileError(f"{file} is no file of trt_dynamo.save")
    if manifest.get("format") != FORMAT:
        raise FileError(f"{file} has format {manifest.get('format')}, this trt_dynamo reads format {FORMAT}")
    return manifest


def checked(
    file: Path, archive: zipfile.ZipFile, name: str, manifest: dict[str, Any], stack: contextlib.ExitStack
) -> IO[bytes]:
    """A member as a file of its own, at its start, whose checksum is right."""
    copied = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  the stack closes it
    digest = hashlib.sha256()
    try:
        with archive.open(name) as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                copied.write(chunk)
    except (zipfile.BadZipFile, EOFError, KeyError) as error:
        raise FileError(f"{file} is damaged: {name}: {error}") from None
    if digest.hexdigest() != manifest["members"][name]["sha256"]:
        raise FileError(f"{file} is damaged: the checksum of {name} differs")
    copied.seek(0)
    return cast("IO[bytes]", copied)


def read_engines(
    file: Path, archive: zipfile.ZipFile, manifest: dict[str, Any], signing: Signing, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """The plans by key; none, and a warning, where they are damaged: the graph is there to make them anew."""
    try:
        source = checked(file, archive, ENGINES, manifest, stack)
        records = [packed.checked(signing) for packed in unpack(cast("io.BytesIO", source))]
    except (FileError, Damaged) as error:
        warn_once(f"the engines in {file} are not used: {error}")
        return {}
    return {record.key: record.plan for record in records}


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Errors of a zip that is not whole are ours."""
    try:
        yield
    except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, ValueError) as error:
        raise FileError(f"{file} is damaged: {error}") from None


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[IO[bytes]]:
    """A file beside this one, which comes into its place when the block is done."""
    name = file.parent / f".{file.name}.{secrets.token_hex(8)}"
    try:
        with open(name, "xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            name.unlink()
        raise


def usable(signing: Signing) -> Signing:
    if signing.problem:
        raise FileError(signing.problem)
    return signing
