"""The same prompts, answered by a base model and by each adapter on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decal.model.generate import generate


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn; temperature 0 is greedy. Every variant draws from the same seed."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, name: str | None, sampling: Sampling, stop_ids: Sequence[int]
) -> list[str]:
    """Return the replies of the adapter `name` ("__base__": of the base; None: of a model without adapters).

    `prompts` are rendered already (see `Prompts`).
    """
    return generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop_ids=stop_ids,
        adapter_names=None if name is None else [name] * len(prompts),
        batch_size=sampling.batch_size,
        seed=sampling.seed,
    )
