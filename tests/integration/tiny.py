"""A whole causal model, with tokenizer and chat template, that is made in a second and needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SUBJECTS = ("the sun", "a leaf", "the rain", "a river", "the moon", "a stone", "the wind", "a seed")
QUESTIONS = ("What is {}?", "Tell me about {}.", "Explain {} to a child.", "Write one line about {}.")


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes with ChatML's marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[1])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model(seed: int = 0, layers: int = 2, hidden: int = 32, *, tied: bool = True) -> LlamaForCausalLM:
    """Return a Llama of about 30,000 weights whose random start is large enough for adapters to matter."""
    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        eos_token_id=256,
        bos_token_id=256,
        pad_token_id=257,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def save_model(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, *, tied: bool = True) -> Path:
    """Write the model and its tokenizer as a folder that `from_pretrained` reads."""
    model(seed, tied=tied).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def messages(rows: int) -> list[dict[str, list[dict[str, str]]]]:
    """Return `rows` short conversations that a small model can learn by heart."""
    conversations = []
    for i in range(rows):
        subject = SUBJECTS[i % len(SUBJECTS)]
        question = QUESTIONS[i // len(SUBJECTS) % len(QUESTIONS)].format(subject)
        answer = f"We see {subject} every day."
        conversations.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        )
    return conversations


def write_messages(path: Path, rows: int) -> Path:
    """Write conversations as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in messages(rows)), encoding="utf-8")
    return path


def files(folder: Path) -> list[str]:
    """Return every file under `folder`, by its path within it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def batch(texts: Sequence[str] = ("We see the rain every day.", "Tell me about a leaf.")) -> dict[str, torch.Tensor]:
    """Return a padded batch with labels."""
    encoded = tokenizer()(list(texts), return_tensors="pt", padding=True)
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}
