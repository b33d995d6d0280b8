"""Generate text from prompts that are already rendered: batched, left-padded, stopped where the chat ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from decal.layers.routing import Routing
from decal.model.evaluating import evaluating


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Iterable[int] = (),
    adapter_names: Sequence[str] | None = None,
    batch_size: int = 16,
    seed: int | None = None,
) -> list[str]:
    """Return the continuation of each prompt, in order; temperature 0 is greedy.

    `stop_ids` end a reply, beside the model's own end tokens. `adapter_names` gives each prompt its adapter. Prompts
    of like length run together, so that little is padded.
    """
    if adapter_names is not None:
        Routing.by_row(adapter_names, rows=len(prompts))  # a wrong length would otherwise be cut, or end midway
    if seed is not None:
        torch.manual_seed(seed)  # transformers' sampling draws from torch's global generator
    device = next(model.parameters()).device
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    stops = sorted({*stop_ids, *_own_stops(model, tokenizer)})
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings.update(temperature=temperature, top_p=top_p, top_k=0)
    replies = [""] * len(prompts)
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ids, mask = _padded([encoded[i] for i in rows], fill=stops[0] if stops else 0)
            names = {} if adapter_names is None else {"adapter_names": [adapter_names[i] for i in rows]}
            out = model.generate(  # type: ignore[operator]  # transformers' method
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else 0,
                **settings,
                **names,
            )
            for i, row in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                end = next((n for n, token in enumerate(row) if token in stops), len(row))
                replies[i] = tokenizer.decode(row[:end], skip_special_tokens=True)
    return replies


def rows_per_prompt(model: nn.Module, settings: Mapping[str, Any]) -> int:
    """Return how many rows of a batch transformers' generate makes of one prompt: its beams, or its returns."""
    config: Any = settings.get("generation_config") or model.generation_config
    return max(
        int(settings.get(key) or getattr(config, key, None) or 1) for key in ("num_beams", "num_return_sequences")
    )


def _padded(rows: Sequence[list[int]], *, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, (B, T), padded on the left."""
    length = max(len(row) for row in rows)
    ids = [[fill] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _own_stops(model: Any, tokenizer: Any) -> set[int]:
    own = model.generation_config.eos_token_id
    ids = set(own) if isinstance(own, (list, tuple)) else {own}
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}
