"""Support tickets: deterministic, balanced, readable, and held out for real."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from decal.data import tickets
from decal.data.tickets import ROUTES, SLOT, Ticket, generate, phrases_of, to_messages, write_jsonl
from decal.errors import DataError

MANY = 12_000


@pytest.fixture(scope="module")
def train() -> list[Ticket]:
    return generate(MANY, split="train")


@pytest.fixture(scope="module")
def heldout() -> list[Ticket]:
    return generate(960, split="heldout")


def as_pattern(template: str) -> re.Pattern[str]:
    """Return a pattern that finds the template in a message whatever fills its slots."""
    literal = [re.escape(part) for part in re.split(r"\{\w+\}", template.casefold())]
    return re.compile(".{1,40}?".join(literal))


def test_48_routes_each_with_phrases() -> None:
    assert len(set(ROUTES)) == len(ROUTES) == 48
    for split in tickets.SPLITS:
        assert set(phrases_of(split).routes) == set(ROUTES)
        for phrases in phrases_of(split).routes.values():
            assert phrases.wants
            assert phrases.says
            assert phrases.topics


@pytest.mark.parametrize("split", tickets.SPLITS)
def test_slots_are_known(split: tickets.Split) -> None:
    known = {*phrases_of(split).slots, "order", "ref", "other", "want", "topic", "say"}
    used = {slot for template in phrases_of(split).templates() for slot in SLOT.findall(template)}
    assert used <= known


@pytest.mark.parametrize("split", tickets.SPLITS)
def test_no_phrase_is_listed_for_two_routes(split: tickets.Split) -> None:
    seen: dict[str, str] = {}
    for route, phrases in phrases_of(split).routes.items():
        for phrase in {*phrases.wants, *phrases.says}:
            assert seen.setdefault(phrase.casefold(), route) == route, phrase


def test_same_arguments_same_tickets(train: list[Ticket]) -> None:
    assert generate(MANY, split="train") == train
    assert generate(100, split="train") == train[:100]
    assert generate(100, split="train", seed=1) != train[:100]
    assert generate(100, split="heldout") != train[:100]


def test_first_ticket_is_the_same_on_every_machine(train: list[Ticket]) -> None:
    assert train[0] == FIRST


@pytest.mark.parametrize("count", [1, 48, 100])
def test_count_and_balance(count: int) -> None:
    made = generate(count, split="train")
    per_route = [sum(ticket.route == route for ticket in made) for route in ROUTES]
    assert len(made) == count
    assert max(per_route) - min(per_route) <= 1


def test_slots_are_filled(train: list[Ticket], heldout: list[Ticket]) -> None:
    assert not [ticket.text for ticket in train + heldout if "{" in ticket.text or "}" in ticket.text]


def test_most_texts_are_unlike_each_other(train: list[Ticket]) -> None:
    assert len({ticket.text for ticket in train}) > 0.95 * len(train)


def test_no_heldout_template_in_the_training_templates() -> None:
    def normal(template: str) -> str:
        return re.sub(r"\W+", " ", template.casefold()).strip()

    train_templates = {normal(template) for template in phrases_of("train").templates()}
    assert not train_templates & {normal(template) for template in phrases_of("heldout").templates()}


def test_no_heldout_phrasing_in_any_training_text(train: list[Ticket]) -> None:
    everything = "\n".join(ticket.text.casefold() for ticket in train)
    found = [t for t in sorted(phrases_of("heldout").templates()) if as_pattern(t).search(everything)]
    assert not found


def test_the_search_for_phrasings_finds_what_is_there(train: list[Ticket]) -> None:
    everything = "\n".join(ticket.text.casefold() for ticket in train)
    templates = phrases_of("train").templates()
    assert sum(as_pattern(t).search(everything) is not None for t in templates) > 0.9 * len(templates)


def test_no_heldout_text_in_any_training_text(train: list[Ticket], heldout: list[Ticket]) -> None:
    everything = "\n".join(ticket.text.casefold() for ticket in train)
    assert not [ticket.text for ticket in heldout if ticket.text.casefold() in everything]


def test_messages_hold_the_text_and_the_route_alone() -> None:
    chat = to_messages(Ticket(text="Where is my parcel?", route="delivery/track"))
    assert chat == {
        "messages": [
            {"role": "user", "content": "Where is my parcel?"},
            {"role": "assistant", "content": "delivery/track"},
        ]
    }


def test_jsonl_has_one_chat_a_line(tmp_path: Path) -> None:
    made = generate(10, split="heldout")
    write_jsonl(tmp_path / "tickets.jsonl", made)
    lines = (tmp_path / "tickets.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [to_messages(ticket) for ticket in made]


def test_bad_arguments_say_what_is_wrong() -> None:
    with pytest.raises(DataError, match="at least one ticket"):
        generate(0, split="train")
    with pytest.raises(DataError, match="train, heldout"):
        generate(1, split="test")  # type: ignore[arg-type]  # what a user may type


FIRST = Ticket(text="How do I silence the notifications?", route="app/alerts")
