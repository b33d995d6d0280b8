"""Exact match: what is asked, how it is counted, and that the model is not helped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from decal.errors import DataError
from decal.evaluate import tasks
from decal.evaluate.prompts import Prompts
from decal.evaluate.tasks import Answer, ExactMatch
from tests.integration import tiny


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_only_the_whole_reply_counts() -> None:
    wanted = "billing/refund"
    replies = (" billing/refund\n", "billing/refunds", "billing", "", "Billing/refund")
    found = ExactMatch(answers=tuple(Answer(question="?", wanted=wanted, reply=reply) for reply in replies))
    assert [answer.right for answer in found.answers] == [True, False, False, False, False]
    assert found.accuracy == 0.2


def test_the_last_reply_is_wanted_and_all_before_it_is_asked() -> None:
    turns = ["a", "b", "c", "d"]
    roles = ["user", "assistant", "user", "assistant"]
    row = {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]}
    (question,) = tasks.questions([row])
    assert [turn.content for turn in question.turns] == ["a", "b", "c"]
    assert question.wanted == "d"
    (pair,) = tasks.questions([{"instruction": "do", "output": "done"}])
    assert pair.wanted == "done"


@pytest.mark.parametrize("row", [{"text": "no question"}, {"messages": [{"role": "user", "content": "a"}]}])
def test_rows_without_a_reply_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="row 1 does not end in a reply"):
        tasks.questions([row])


def test_prompts_are_the_template_s_own_and_end_where_the_assistant_speaks() -> None:
    tokenizer = tiny.tokenizer()
    prompts = Prompts(tokenizer)
    expected = tokenizer.apply_chat_template(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert prompts.question("q", system="s") == expected
    assert set(prompts.stop_ids) == {256, 259}  # <|endoftext|> and <|im_end|>


def test_a_tokenizer_without_a_template_gets_the_one_that_training_would_use() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    prompts = Prompts(tokenizer)
    assert not prompts.has_template
    assert prompts.notes
    assert tokenizer.chat_template


def test_a_model_that_learnt_by_heart_is_right_and_a_fresh_one_is_not(tmp_path: Path) -> None:
    rows = [chat(f"letter {letter}", letter * 2) for letter in "abcd"]
    tokenizer, model = tiny.tokenizer(), tiny.model()
    asked = tasks.questions(rows)
    heard: list[tuple[int, int]] = []
    before = tasks.exact_match(model, tokenizer, asked, batch_size=3, on_progress=lambda n, of: heard.append((n, of)))
    assert heard == [(3, 4), (4, 4)]
    assert before.accuracy == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    texts = [Prompts(tokenizer).conversation(q.turns) + q.wanted + "<|im_end|>" for q in asked]
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = tasks.exact_match(model, tokenizer, asked, batch_size=3)
    assert after.accuracy == 1
    assert [answer.question for answer in after.answers] == [f"letter {letter}" for letter in "abcd"]
