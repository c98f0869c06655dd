"""The CUDA kernel of the fingerprints. In: a GPU. Out: the loaded function, or None where it cannot be had.

It is compiled when first needed (NVRTC and the driver's API through cuda-python, about 0.1 s), with keys of this
process. `torch.cuda._compile_kernel` would do, but asks for setuptools and an installed CUDA toolkit.

One launch reads everything. A block takes an item, up to 64 KiB of one tensor. Each of its threads takes 128 bytes at
a time and makes two sums of 32-bit words times odd 64-bit keys, which wrap: each sees a change of one word for certain,
and misses any other with a probability of at most 2**-32. The sums are mixed with their place, one to one, and added up
over the tensor; integers commute, so the order of the blocks does not matter. The block that finishes last hands the
sums to the host's memory and clears them for the next launch.
"""

from __future__ import annotations

import functools
import logging
import secrets
from typing import Any

import torch

from trt_dynamo.cuda_driver import done, enter
from trt_dynamo.errors import in_a_line

log = logging.getLogger(__name__)

THREADS = 256
# Loads of 16 bytes that a thread has under way.
DEPTH = 8
# Bytes of an item: a multiple of what a block reads at a time.
CHUNK = 65536
# Places that an item takes up: one for each 128 bytes.
PLACES = CHUNK // (16 * DEPTH)

SOURCE = """
typedef unsigned long long u64;
typedef unsigned int u32;

struct Item { const unsigned char* start; u64 place; u32 bytes; u32 row; };

__constant__ u64 KEYS[2][%(words)d] = {{%(keys0)s}, {%(keys1)s}};

__device__ __forceinline__ u64 mix(u64 x, u64 place, u64 seed) {
    x += place * 0x9e3779b97f4a7c15ULL + seed;
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdULL;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ULL;
    return x ^ (x >> 33);
}

template <typename T> __device__ __forceinline__ uint4 load(const unsigned char* from) {
    union { uint4 whole; T parts[16 / sizeof(T)]; } vector;
    #pragma unroll
    for (int i = 0; i < 16 / sizeof(T); i++) vector.parts[i] = __ldcs(reinterpret_cast<const T*>(from) + i);
    return vector.whole;
}

// The last bytes of an item, and zeros.
__device__ __noinline__ uint4 rest(const unsigned char* from, u32 bytes) {
    u64 low = 0, high = 0;
    for (u32 i = 0; i < bytes; i++) {
        const u64 byte = from[i];
        if (i < 8) low |= byte << (8 * i);
        else high |= byte << (8 * i - 64);
    }
    return make_uint4(low, low >> 32, high, high >> 32);
}

template <typename T> __device__ __forceinline__ void add(const Item& item, u64& a, u64& b) {
    const u32 whole = item.bytes / 16;
    for (u32 first = 0; first * 16 < item.bytes; first += %(threads)d * %(depth)d) {
        uint4 vectors[%(depth)d];
        #pragma unroll
        for (int d = 0; d < %(depth)d; d++) {
            const u32 index = first + d * %(threads)d + threadIdx.x;
            const unsigned char* from = item.start + 16 * static_cast<u64>(index);
            vectors[d] = make_uint4(0, 0, 0, 0);
            if (index < whole) vectors[d] = load<T>(from);
            else if (index == whole) vectors[d] = rest(from, item.bytes %% 16);
        }
        u64 x = 0, y = 0;
        #pragma unroll
        for (int d = 0; d < %(depth)d; d++) {
            const u32 words[4] = {vectors[d].x, vectors[d].y, vectors[d].z, vectors[d].w};
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                x += KEYS[0][4 * d + i] * words[i];
                y += KEYS[1][4 * d + i] * words[i];
            }
        }
        const u64 place = item.place + first / %(depth)d + threadIdx.x;
        a += mix(x, place, %(seed0)sULL);
        b += mix(y, place, %(seed1)sULL);
    }
}

// Valid in the first thread of the block.
__device__ __forceinline__ u64 total(u64 mine) {
    __shared__ u64 warps[%(threads)d / 32];
    for (int step = 16; step; step /= 2) mine += __shfl_down_sync(0xffffffff, mine, step);
    __syncthreads();
    if (threadIdx.x %% 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0) for (int i = 1; i < %(threads)d / 32; i++) mine += warps[i];
    return mine;
}

extern "C" __global__ void __launch_bounds__(%(threads)d)
fingerprint(const Item* items, u32 count, u64* sums, u32* finished, u64* rows, u32 numbers) {
    for (u32 each = blockIdx.x; each < count; each += gridDim.x) {
        const Item item = items[each];
        const u64 alignment = reinterpret_cast<u64>(item.start) %% 16;
        u64 a = 0, b = 0;
        if (alignment == 0) add<uint4>(item, a, b);
        else if (alignment %% 4 == 0) add<u32>(item, a, b);
        else add<unsigned char>(item, a, b);
        a = total(a);
        b = total(b);
        if (threadIdx.x == 0) {
            atomicAdd(&sums[2 * item.row], a);
            atomicAdd(&sums[2 * item.row + 1], b);
        }
    }
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(finished, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (u32 i = threadIdx.x; i < numbers; i += %(threads)d) rows[i] = atomicExch(&sums[i], 0);
    if (threadIdx.x == 0) *finished = 0;
}
"""


@functools.cache
def source() -> str:
    """The kernel with keys that are this process's own."""

    def number() -> str:
        return f"{secrets.randbits(64) | 1:#x}"

    words = 4 * DEPTH
    keys = [", ".join(f"{number()}ULL" for _ in range(words)) for _ in range(2)]
    constants = {"words": words, "threads": THREADS, "depth": DEPTH, "keys0": keys[0], "keys1": keys[1]}
    return SOURCE % (constants | {"seed0": number(), "seed1": number()})


@functools.cache
def load(index: int) -> Any | None:
    """The kernel's function (`CUfunction`) on a GPU, or None, said once, where it cannot be compiled or loaded."""
    try:
        from cuda.bindings import driver, nvrtc

        with torch.cuda.device(index):
            enter(index)
            major, minor = torch.cuda.get_device_capability(index)
            image = compiled(nvrtc, f"sm_{major}{minor}")
            module = done(driver.cuModuleLoadData(image))
            return done(driver.cuModuleGetFunction(module, b"fingerprint"))
    except (ImportError, OSError, RuntimeError) as error:
        say_without(in_a_line(error))
        return None


def say_without(why: str) -> None:
    log.warning("weights are checked by torch's operations, not by a kernel, which is slower: %s", why)


def compiled(nvrtc: Any, architecture: str) -> bytes:
    """The kernel's machine code."""
    program = done(nvrtc.nvrtcCreateProgram(source().encode(), b"fingerprint.cu", 0, [], []))
    try:
        options = [f"--gpu-architecture={architecture}".encode()]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if error.value:
            text = b" " * done(nvrtc.nvrtcGetProgramLogSize(program))
            done(nvrtc.nvrtcGetProgramLog(program, text))
            raise RuntimeError(f"NVRTC says {error.name} for {architecture}: {text.decode(errors='replace')}")
        image: bytes = b" " * done(nvrtc.nvrtcGetCUBINSize(program))
        done(nvrtc.nvrtcGetCUBIN(program, image))
        return image
    finally:
        nvrtc.nvrtcDestroyProgram(program)
