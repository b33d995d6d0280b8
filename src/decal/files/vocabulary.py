"""What of a tokenizer decides ids, as digests: the same for the same ids, however its files are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from decal.files.sealed import Tokens, sha256

# Of a tokenizer.json: what only pads or cuts, what only turns ids into text, and what `vocabulary` holds already.
NO_RULES = ("version", "truncation", "padding", "decoder", "added_tokens")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")


def tokens_of(tokenizer: Any) -> Tokens:
    """Return what a tokenizer (with its chat template) is sealed as, and compared by."""
    special = tokenizer.special_tokens_map
    template, vocabulary = template_of(tokenizer), tokenizer.get_vocab()
    return Tokens(
        vocabulary=sha256(vocabulary),
        size=len(vocabulary),
        rules=_rules(getattr(tokenizer, "backend_tokenizer", None)),
        special={key: str(special[key]) for key in SPECIAL if special.get(key) is not None},
        # Jinja drops one newline at a template's end, and editors add one.
        template=None if template is None else sha256(template.removesuffix("\n")),
    )


def template_of(tokenizer: Any) -> str | None:
    """Return the chat template's text; of several the one named default."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or None


def _rules(backend: Any) -> str | None:
    """Return the digest of how a fast tokenizer cuts text; None for a slow one, which says it nowhere."""
    if not hasattr(backend, "to_str"):
        return None
    facts = json.loads(backend.to_str())
    rules = {key: value for key, value in facts.items() if key not in NO_RULES}
    rules["model"] = {key: value for key, value in facts["model"].items() if key != "vocab"}
    # Where an added token is found in a text: its flags, which the vocabulary does not hold.
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized")
    rules["added"] = sorted(([token[flag] for flag in flags] for token in facts["added_tokens"]), key=str)
    return sha256(rules)
