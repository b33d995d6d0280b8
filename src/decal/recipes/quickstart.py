"""Teach the bundled model to route support tickets and measure what it learnt: the whole job, from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from decal.bundled import MODEL_DIR
from decal.data import tickets
from decal.data.tickets import Ticket
from decal.errors import RunError
from decal.evaluate import tasks
from decal.evaluate.tasks import Answer, ExactMatch
from decal.model.load import load_model, load_tokenizer
from decal.model.wrapper import PeftModel
from decal.recipes.finetune import Finetuned, finetune
from decal.spec import RunConfig, read_run_config

TRAINING, HELD_OUT = 12_000, 480  # tickets
RECIPE: dict[str, Any] = {
    "data.max_length": 512,
    "train.lr": 2e-3,  # a small model on a narrow task: ten times what a large one wants
    "train.micro_batch": 1,  # a packed row holds some 13 tickets
    "train.epochs": 1.0,
}
EXPECTED_BEFORE, WANTED_AFTER = 0.05, 0.85  # accuracy: at most before, at least after
SHOWN = 4

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """What was measured. `baseline` is a classical classifier's accuracy, None if scikit-learn is not installed."""

    finetuned: Finetuned
    total: int  # parameters, the adapter's included
    before: ExactMatch
    after: ExactMatch
    baseline: float | None
    seconds: float

    @property
    def reached(self) -> bool:
        """Whether the tuned model is as good as it has to be."""
        return self.after.accuracy >= WANTED_AFTER

    @property
    def shown(self) -> list[tuple[Answer, Answer]]:
        """The first held-out tickets, answered by the base and by the tuned model."""
        return list(zip(self.before.answers, self.after.answers, strict=True))[:SHOWN]


def quickstart(
    output: Path,
    *,
    training: int = TRAINING,
    held_out: int = HELD_OUT,
    overrides: Sequence[str] = (),
    on_event: Callable[[Event], None] = lambda event: None,
) -> Quickstart:
    """Write the tickets into `output`/tickets, measure the base, fine-tune in `output`/tuned, measure again.

    `on_event` hears the events of the training run, and {"kind": "stage", "text": ...} and {"kind": "answered",
    "done": n, "of": m} between them. Raises RunError if `output` is in use.
    """
    began = time.perf_counter()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise RunError("the output folder is not empty", got=output, fix="Choose another --output.")

    on_event({"kind": "stage", "text": f"making {training:,} training tickets and {held_out:,} held-out ones"})
    train_set = tickets.generate(training, split="train")
    test_set = tickets.generate(held_out, split="heldout")
    tickets.write_jsonl(output / "tickets" / "train.jsonl", train_set)
    tickets.write_jsonl(output / "tickets" / "heldout.jsonl", test_set)

    on_event({"kind": "stage", "text": "asking the base model about the held-out tickets"})
    questions = tasks.questions(tickets.to_messages(ticket) for ticket in test_set)
    tokenizer = load_tokenizer(MODEL_DIR)

    def answered(done: int, of: int) -> None:
        on_event({"kind": "answered", "done": done, "of": of})

    before = tasks.exact_match(load_model(MODEL_DIR, device="cpu"), tokenizer, questions, on_progress=answered)

    on_event({"kind": "stage", "text": "fine-tuning"})
    config = settings(output, overrides)
    done = finetune(config, on_event=on_event)

    on_event({"kind": "stage", "text": "asking the tuned model the same"})
    tuned = PeftModel.from_pretrained(load_model(MODEL_DIR, device="cpu"), done.result)
    after = tasks.exact_match(tuned, tokenizer, questions, on_progress=answered)

    baseline = None
    if find_spec("sklearn") is not None:
        on_event({"kind": "stage", "text": "fitting a classical classifier to compare with"})
        baseline = classical_accuracy(train_set, test_set)
    return Quickstart(
        finetuned=done,
        total=tuned.get_nb_trainable_parameters()[1],
        before=before,
        after=after,
        baseline=baseline,
        seconds=time.perf_counter() - began,
    )


def settings(output: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the settings of the run: decal's defaults but for RECIPE, on a CPU so that it is the same everywhere."""
    data = output / "tickets" / "train.jsonl"
    values = {"model": str(MODEL_DIR), "data.path": str(data), "output": str(output / "tuned"), "train.device": "cpu"}
    return read_run_config(overrides=overrides, values={**values, **RECIPE})


def classical_accuracy(train_set: Sequence[Ticket], test_set: Sequence[Ticket]) -> float:
    """Return the accuracy of TF-IDF (words and pairs of words) with logistic regression on the same tickets."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=30, max_iter=300)
    )
    classifier.fit([ticket.text for ticket in train_set], [ticket.route for ticket in train_set])
    return float(classifier.score([ticket.text for ticket in test_set], [ticket.route for ticket in test_set]))
