"""Whether the tokenizer is the model's own: ids fit, words are known, and their order makes sense to the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from decal.checks import rows
from decal.checks.result import Check, failed, passed
from decal.checks.untouched import without_dropout
from decal.data import pack
from decal.data.batch import IGNORE
from decal.data.mask import Sample
from decal.training.job import Job

NAME = "tokenizer"
UNKNOWN = 0.05  # of the learnt tokens: with more the replies are lost
# A trained model with its own tokenizer loses 2 to 6 nats a token when the tokens are shuffled, even on text unlike
# what it was trained on; with ids that mean other words its loss is 1 to 15 above that of guessing, in any order.
SENSE = 1.0
FIX = "Use the tokenizer that the model was trained with: both come from the same folder or hub id."


def ids(job: Job, seen: Sequence[Sample]) -> Check | None:
    """Return what is wrong with the token ids themselves; None if nothing is."""
    size = job.model.get_input_embeddings().weight.shape[0]
    highest = max(max(sample.ids) for sample in seen)
    if highest >= size:
        return failed(NAME, f"token {highest:,} occurs, and the model has {size:,} rows of embeddings", fix=FIX)
    learnt = [token for sample in seen for token in rows.learnt(sample)]
    unknown = sum(token == job.tokenizer.unk_token_id for token in learnt)
    if unknown > UNKNOWN * len(learnt):
        return failed(
            NAME,
            f"{unknown:,} of {len(learnt):,} learnt tokens are {job.tokenizer.unk_token}: the replies are lost",
            fix="Use a tokenizer that knows these words, or correct the encoding of the data.",
        )
    words = job.tokenizer.decode(learnt[:512], skip_special_tokens=True)
    if learnt and not words.strip():
        return failed(
            NAME,
            f"the {len(learnt):,} learnt tokens decode to no text: the mask leaves the replies out",
            fix="Look at the rows above; give another data.chat_template, or data.loss_on=all.",
        )
    return None


@torch.no_grad()
def check(job: Job, samples: Sequence[Sample]) -> Check:
    """Ask the model how likely `samples` are in order and shuffled."""
    size = job.model.get_input_embeddings().weight.shape[0]
    with without_dropout(job.model):
        ordered, shuffled = (_loss(job, some) for some in (samples, [_shuffled(sample) for sample in samples]))
    guessing = math.log(size)
    if ordered > guessing + SENSE and shuffled - ordered < SENSE:
        return failed(
            NAME,
            f"the model's loss on these rows is {ordered:.2f}, shuffled {shuffled:.2f}; guessing among {size:,} tokens "
            f"is {guessing:.2f}: to this model the ids mean other words",
            fix=FIX,
        )
    return passed(NAME, f"loss {ordered:.2f} in order, {shuffled:.2f} shuffled; guessing is {guessing:.2f}")


def _loss(job: Job, samples: Sequence[Sample]) -> float:
    """Return the mean loss over all tokens, learnt or not."""
    whole = [Sample(ids=sample.ids, labels=[IGNORE, *sample.ids[1:]]) for sample in samples]
    with job.numbers.autocast():
        total, count = job.loss(job.model, pack.collate([[sample] for sample in whole], pad_id=job.data.pad_id))
    return total.item() / max(count, 1)


def _shuffled(sample: Sample) -> Sample:
    order = torch.randperm(len(sample.ids) - 1, generator=torch.Generator().manual_seed(0)).tolist()
    return Sample(ids=[sample.ids[0], *(sample.ids[1 + at] for at in order)], labels=sample.labels)
