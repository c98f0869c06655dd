"""A shared library that can be loaded and holds nothing: names of C functions without code behind them.

Comes in: a soname and the names. Goes out: the bytes of an ELF file. NVIDIA's Python bindings need TensorRT's libraries
(gigabytes) only to be loaded, not to be looked at, so that with hollow ones make_stubs.py reads their API anywhere, and
without a compiler.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Sequence

MACHINES = {"x86_64": 62, "aarch64": 183}
LOAD, DYNAMIC, STACK = 1, 2, 0x6474E551
READ_WRITE = 6
HEADER, PROGRAM_HEADER, SYMBOL = "<16sHHIQQQIHHHHHH", "<IIQQQQQQ", "<IBBHQQ"
GLOBAL_FUNCTION = 1 << 4 | 2
PAGE = 0x10000


def hollow_library(soname: str, functions: Sequence[str], machine: str | None = None) -> bytes:
    """An ELF shared library of the name `soname` that defines `functions`, none of which may be called.

    Raises:
        ValueError: `machine` (by default this one) is neither x86_64 nor aarch64.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise ValueError(f"no ELF library can be made for {machine}; {' and '.join(MACHINES)} are known")
    strings, offsets = string_table([soname, *functions])
    symbols_at = struct.calcsize(HEADER) + 3 * struct.calcsize(PROGRAM_HEADER)
    symbols = bytes(struct.calcsize(SYMBOL))
    for name in functions:
        symbols += struct.pack(SYMBOL, offsets[name], GLOBAL_FUNCTION, 0, 1, symbols_at, 8)
    hash_at = symbols_at + len(symbols)
    hashes = one_bucket(len(functions))
    strings_at = hash_at + len(hashes)
    dynamic_at = -(-(strings_at + len(strings)) // 16) * 16
    dynamic = dynamic_section(offsets[soname], hash_at, strings_at, symbols_at, len(strings))
    size = dynamic_at + len(dynamic)
    head = elf_header(MACHINES[machine]) + program_headers(size, dynamic_at, len(dynamic))
    return (head + symbols + hashes + strings).ljust(dynamic_at, b"\0") + dynamic


def string_table(names: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    """The names, each ended by a zero byte, and where each begins."""
    table, offsets = b"\0", {}
    for name in names:
        offsets[name] = len(table)
        table += name.encode() + b"\0"
    return table, offsets


def one_bucket(count: int) -> bytes:
    """The hash table of `count` symbols, all in one chain."""
    chain = [0, *range(2, count + 1), 0] if count else [0]
    return struct.pack(f"<{3 + len(chain)}I", 1, len(chain), 1 if count else 0, *chain)


def dynamic_section(soname: int, hash_at: int, strings_at: int, symbols_at: int, strings_size: int) -> bytes:
    """What the loader reads: SONAME, HASH, STRTAB, SYMTAB, STRSZ, SYMENT, and the end."""
    entries = [(14, soname), (4, hash_at), (5, strings_at), (6, symbols_at), (10, strings_size)]
    entries += [(11, struct.calcsize(SYMBOL)), (0, 0)]
    return b"".join(struct.pack("<QQ", tag, value) for tag, value in entries)


def elf_header(machine: int) -> bytes:
    """A 64-bit little-endian shared object with three program headers and no sections."""
    size, entry = struct.calcsize(HEADER), struct.calcsize(PROGRAM_HEADER)
    identity = b"\x7fELF\x02\x01\x01"
    return struct.pack(HEADER, identity, 3, machine, 1, 0, size, 0, 0, size, entry, 3, 64, 0, 0)


def program_headers(size: int, dynamic_at: int, dynamic_size: int) -> bytes:
    """One segment, writable because older loaders relocate the dynamic section in place; no executable stack."""
    segments = [
        (LOAD, READ_WRITE, 0, 0, 0, size, size, PAGE),
        (DYNAMIC, READ_WRITE, dynamic_at, dynamic_at, dynamic_at, dynamic_size, dynamic_size, 8),
        (STACK, READ_WRITE, 0, 0, 0, 0, 0, 16),
    ]
    return b"".join(struct.pack(PROGRAM_HEADER, *segment) for segment in segments)
