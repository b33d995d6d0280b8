"""Pretrain decal's bundled base model from scratch: tokenizer, 5.7 M parameter Llama, held-out loss.

    python scripts/pretrain_bundled.py --corpus CORPUS --out MODEL               # on one GPU, minutes
    python scripts/pretrain_bundled.py --corpus CORPUS --evaluate MODEL          # held-out loss of a saved model
    python scripts/pretrain_bundled.py --corpus CORPUS --out MODEL --documents 300 --steps 5 --batch 4   # a trial

CORPUS is a folder of *.jsonl.xz files, one {"text": ..., "src": ...} a line; valid.jsonl.xz is held out.
Documents of src "sgd" are dialogues in User:/Assistant: lines and are trained in the chat format, so that the
model has seen <|im_start|> and <|im_end|> and knows how a turn ends.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CONTEXT = 512
VOCABULARY = 6144
END, PAD, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")  # ids 0 to 3
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HELD_OUT = "valid.jsonl.xz"


def main() -> None:
    options = parse()
    if options.evaluate:
        print(json.dumps(evaluate(options.evaluate, corpus=options.corpus, device=options.device), indent=2))
        return

    torch.manual_seed(options.seed)
    documents = read_corpus(options.corpus, limit=options.documents)
    random.Random(options.seed).shuffle(documents)
    characters = sum(map(len, documents))
    print(f"{len(documents)} documents, {characters / 1e6:.1f} M characters", flush=True)

    tokenizer = train_tokenizer(documents)
    stream = encode(tokenizer, documents)
    print(f"{len(stream) / 1e6:.2f} M tokens, {characters / len(stream):.2f} characters a token", flush=True)

    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    pretrain(
        model,
        torch.from_numpy(stream.astype(np.int32)).to(options.device),
        steps=options.steps,
        batch=options.batch,
        peak_lr=options.lr,
        device=options.device,
        generator=torch.Generator().manual_seed(options.seed),
    )
    save(model, tokenizer, options.out)
    print(json.dumps(evaluate(options.out, corpus=options.corpus, device=options.device), indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.jsonl.xz files")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder to write the model to")
    what.add_argument("--evaluate", type=Path, help="only compute the held-out loss of the model in this folder")
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help=f"rows of {CONTEXT} tokens a step (default %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and order (default %(default)s)")
    parser.add_argument("--documents", type=int, help="read only so many documents of each file, for a trial")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


# --- text ------------------------------------------------------------------------------------------------------------


def read_file(path: Path, limit: int | None = None) -> Iterator[str]:
    """Yield the documents of one file as the model is to see them."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number == limit:
                return
            row = json.loads(line)
            yield as_chat(row["text"]) if row.get("src") == "sgd" else row["text"]


def read_corpus(corpus: Path, *, limit: int | None) -> list[str]:
    """Return the training documents of all files but the held-out one, file by file."""
    files = sorted(path for path in corpus.glob("*.jsonl.xz") if path.name != HELD_OUT)
    if not files:
        raise SystemExit(f"no *.jsonl.xz training file in {corpus}")
    return [text for path in files for text in read_file(path, limit)]


def as_chat(dialogue: str) -> str:
    """Turn User:/Assistant: lines into chat turns; a line without a speaker goes on with the turn before it."""
    turns: list[str] = []
    for line in dialogue.split("\n"):
        speaker, colon, said = line.partition(": ")
        if colon and speaker in ("User", "Assistant"):
            turns.append(f"{TURN_START}{speaker.lower()}\n{said}")
        else:
            turns[-1] += "\n" + line
    return "".join(f"{turn}{TURN_END}\n" for turn in turns)


def train_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; digits stand alone, so that no order number is a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Return all documents as one stream of token ids, each document closed by the end token."""
    bpe, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    for first in range(0, len(documents), 1000):  # in groups: the tokenizer's own results are 50 times larger
        for encoding in bpe.encode_batch_fast(documents[first : first + 1000], add_special_tokens=False):
            parts.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(parts)


# --- model -----------------------------------------------------------------------------------------------------------


def new_model() -> LlamaForCausalLM:
    """Return the model with fresh fp32 weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            attn_implementation="sdpa",
        )
    )


def head_loss(hidden_BTD: Tensor, head_VD: Tensor, target_BT: Tensor) -> Tensor:
    """Return the mean next-token loss in nats."""
    logits = F.linear(hidden_BTD, head_VD).float().flatten(0, 1)
    return F.cross_entropy(logits, target_BT.flatten())


def learning_rate(step: int, *, steps: int, peak: float) -> float:
    """Warm up over 2% of the run, then follow a cosine to zero."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(
    model: LlamaForCausalLM,
    stream: Tensor,
    *,
    steps: int,
    batch: int,
    peak_lr: float,
    device: str,
    generator: torch.Generator,
) -> None:
    """Train `model` in place on the stream of tokens: AdamW, bf16 autocast over fp32 weights."""
    model.to(device).train()
    on_gpu = torch.device(device).type == "cuda"
    loss_of = head_loss
    if on_gpu:
        # Layer by layer, not the whole model: inside one big graph transformers builds a mask tensor,
        # and attention then leaves its fast causal kernel.
        for layer in model.model.layers:
            layer.compile()
        loss_of = torch.compile(head_loss)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=peak_lr,
        betas=(0.9, 0.95),
        fused=on_gpu,
    )
    rows = draw_rows(len(stream), batch=batch, generator=generator)
    within = torch.arange(CONTEXT + 1, device=device)
    start = last = time.perf_counter()
    every = max(1, steps // 40)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=steps, peak=peak_lr)
        tokens_BT = stream[next(rows).to(device, non_blocking=True)[:, None] + within].long()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            hidden_BTD = model.model(input_ids=tokens_BT[:, :-1], use_cache=False).last_hidden_state
            loss = loss_of(hidden_BTD, model.lm_head.weight, tokens_BT[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            value, now = loss.item(), time.perf_counter()
            done = every if (step + 1) % every == 0 else steps % every
            rate = done * batch * CONTEXT / (now - last)
            print(f"step {step + 1}/{steps}  loss {value:.4f}  {rate:,.0f} tokens/s  {now - start:.0f} s", flush=True)
            last = now
    seen = steps * batch * CONTEXT
    print(f"{seen / 1e6:.1f} M tokens seen ({seen / len(stream):.1f} epochs) in {time.perf_counter() - start:.0f} s")
    if on_gpu:
        print(f"{torch.cuda.get_device_name()}, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def draw_rows(length: int, *, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the first positions of `batch` rows for ever; each epoch cuts the stream elsewhere, in a new order."""
    pending = torch.empty(0, dtype=torch.long)
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        count = (length - 1 - offset) // CONTEXT
        order = torch.randperm(count, generator=generator) * CONTEXT + offset
        pending = torch.cat((pending, order))
        while len(pending) >= batch:
            yield pending[:batch]
            pending = pending[batch:]


# --- result ----------------------------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights (bf16), configuration, tokenizer and chat template in Hugging Face's layout."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to("cpu", torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def evaluate(folder: Path, *, corpus: Path, device: str) -> dict[str, float | int]:
    """Return loss (nats a token), perplexity and bits per byte of a saved model on the held-out file.

    The documents are joined as in training and cut into rows of CONTEXT tokens without overlap; every token but
    the very first is predicted once. Bytes are the UTF-8 bytes of the documents, without the special tokens.
    Weights are the stored bf16 ones, arithmetic is fp32.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    documents = list(read_file(corpus / HELD_OUT))
    stream = torch.from_numpy(encode(tokenizer, documents).astype(np.int64)).to(device)
    loss_sum, count = 0.0, len(stream) - 1
    for first in range(0, count, CONTEXT):
        row = stream[first : first + CONTEXT + 1]
        logits_TV = model(input_ids=row[None, :-1], use_cache=False).logits[0]
        loss_sum += F.cross_entropy(logits_TV, row[1:], reduction="sum").item()
    size = sum(len(strip_specials(text).encode()) for text in documents)
    return {
        "documents": len(documents),
        "bytes": size,
        "tokens": count,
        "loss": round(loss_sum / count, 4),
        "perplexity": round(math.exp(loss_sum / count), 2),
        "bits_per_byte": round(loss_sum / math.log(2) / size, 4),
    }


def strip_specials(text: str) -> str:
    for special in SPECIALS:
        text = text.replace(special, "")
    return text


if __name__ == "__main__":
    main()
