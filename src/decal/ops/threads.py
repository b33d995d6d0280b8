"""Loops that numba compiles, on as many threads as torch uses: they let go of Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

ALONE = 1 << 17  # elements below which one thread is enough
COMPILED: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}


def in_threads(work: Callable[..., None], arguments: tuple[Any, ...], blocks: int, elements: int) -> None:
    """Run work(*arguments, first, last) over all blocks, in equal shares."""
    threads = 1 if elements < ALONE else torch.get_num_threads()
    if threads == 1:
        work(*arguments, 0, blocks)
        return
    edges = [blocks * i // threads for i in range(threads + 1)]
    shares = [_pool(threads).submit(work, *arguments, *edge) for edge in pairwise(edges)]
    for share in shares:
        share.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decal-loop")
