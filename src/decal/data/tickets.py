"""Customer-support tickets over 48 routes, made up from phrase tables: a small task that a new adapter can learn.

A ticket is one request in natural English, with the noise of a real inbox around it: greetings, order numbers,
typos, sentences that do not matter, and asides that name another route's subject ("This is not about my refund.").
The answer is the route. Openers, requests, greetings, fillers, asides and closings of the held-out split are written
apart from the training split's, so a held-out score measures understanding and not memory; only names, numbers and
products are shared. Everything is deterministic: the same arguments give the same tickets on every machine.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from decal.errors import DataError
from decal.rundir import write_bytes

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

ROUTES: tuple[str, ...] = (
    *("billing/refund", "billing/double-charge", "billing/invoice"),
    *("billing/declined", "billing/new-card", "billing/tax"),
    *("orders/cancel", "orders/edit", "orders/confirm"),
    *("orders/missing-item", "orders/wrong-item", "orders/bulk"),
    *("delivery/track", "delivery/late", "delivery/address"),
    *("delivery/damaged", "delivery/lost", "delivery/slot"),
    *("returns/start", "returns/label", "returns/exchange"),
    *("returns/warranty", "returns/deadline", "returns/gift"),
    *("account/password", "account/locked", "account/email"),
    *("account/close", "account/hacked", "account/two-factor"),
    *("plans/upgrade", "plans/downgrade", "plans/cancel"),
    *("plans/trial", "plans/pause", "plans/student"),
    *("app/crash", "app/slow", "app/sync"),
    *("app/alerts", "app/install", "app/idea"),
    *("store/hours", "store/stock", "store/gift-card"),
    *("store/price-match", "store/points", "store/jobs"),
)

PHRASES = Path(__file__).with_name("ticket_phrases.json")
SLOT = re.compile(r"\{(\w+)\}")

# How often each part or kind of noise appears.
GREETING, FILLER, ASIDE, QUOTE, CLOSING = 0.3, 0.2, 0.2, 0.2, 0.25
LOWERCASE, TYPOS = 0.12, 0.1


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """One message to the help desk and the route it belongs to, one of `ROUTES`."""

    text: str
    route: str


@dataclass(frozen=True, kw_only=True)
class RoutePhrases:
    """What customers say on one route: `wants` follow an opener ("I need to ..."), `says` stand alone."""

    wants: tuple[str, ...]
    says: tuple[str, ...]
    topics: tuple[str, ...]  # how an aside on another route's ticket names this route's subject


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """All phrases of one split; `slots` maps a slot's name to its fillings, the same in both splits."""

    openers: tuple[str, ...]
    greetings: tuple[str, ...]
    closings: tuple[str, ...]
    fillers: tuple[str, ...]
    asides: tuple[str, ...]
    quotes: tuple[str, ...]
    routes: dict[str, RoutePhrases]
    slots: dict[str, tuple[str, ...]]

    def templates(self) -> set[str]:
        """Return every template of the split, slots unfilled; slot fillings and topics are not templates."""
        own = (self.openers, self.greetings, self.closings, self.fillers, self.asides, self.quotes)
        of_routes = (phrases.wants + phrases.says for phrases in self.routes.values())
        return {template for group in (*own, *of_routes) for template in group}


@lru_cache(maxsize=len(SPLITS))
def phrases_of(split: Split) -> Phrases:
    """Read one split's phrases from the package's table."""
    table: dict[str, Any] = json.loads(PHRASES.read_text(encoding="utf-8"))
    shared = {name: tuple(lists[split]) for name, lists in table["shared"].items()}
    routes = {
        route: RoutePhrases(
            wants=tuple(lists["wants"][split]), says=tuple(lists["says"][split]), topics=tuple(lists["topics"][split])
        )
        for route, lists in table["routes"].items()
    }
    slots = {name: tuple(fillings) for name, fillings in table["slots"].items()}
    return Phrases(
        openers=shared["openers"],
        greetings=shared["greetings"],
        closings=shared["closings"],
        fillers=shared["fillers"],
        asides=shared["asides"],
        quotes=shared["quotes"],
        routes=routes,
        slots=slots,
    )


def generate(count: int, *, split: Split, seed: int = 0) -> list[Ticket]:
    """Return `count` tickets of a split, the routes as even as can be.

    The first n tickets do not depend on `count`, so a larger set contains the smaller one.

    Args:
        split: "train" or "heldout"; no phrasing is in both.
        seed: of the generator behind every choice; the two splits draw from different streams.

    Raises:
        DataError: `count` is not positive, or `split` is unknown.
    """
    if count < 1:
        raise DataError("a ticket set needs at least one ticket", got=count, fix="Ask for a positive count.")
    if split not in SPLITS:
        raise DataError("unknown split of the tickets", got=split, fix=f"Use one of {', '.join(SPLITS)}.")
    rng = random.Random(f"tickets/{split}/{seed}")
    phrases = phrases_of(split)
    tickets: list[Ticket] = []
    while len(tickets) < count:
        for route in rng.sample(ROUTES, len(ROUTES)):
            tickets.append(Ticket(text=_noisy(_message(route, phrases, rng), rng), route=route))
    return tickets[:count]


def to_messages(ticket: Ticket) -> dict[str, list[dict[str, str]]]:
    """Return the ticket as a chat: the text from the user, the route alone from the assistant, no system prompt."""
    return {
        "messages": [
            {"role": "user", "content": ticket.text},
            {"role": "assistant", "content": ticket.route},
        ]
    }


def write_jsonl(path: Path, tickets: Iterable[Ticket]) -> None:
    """Write the tickets as chats, one JSON object a line, atomically."""
    lines = (json.dumps(to_messages(ticket), ensure_ascii=False) + "\n" for ticket in tickets)
    write_bytes(Path(path), "".join(lines).encode())


def _message(route: str, phrases: Phrases, rng: random.Random) -> str:
    """Put one clean message together: the request, and around it what people also write."""
    own = phrases.routes[route]
    request = rng.choice(own.wants + own.says)
    if request in own.wants:
        request = rng.choice(phrases.openers).replace("{want}", request)
    parts = [request]
    for chance, extras in ((FILLER, phrases.fillers), (ASIDE, phrases.asides), (QUOTE, phrases.quotes)):
        if rng.random() < chance:
            parts.insert(rng.choice((0, len(parts))), rng.choice(extras))
    if rng.random() < GREETING:
        parts.insert(0, rng.choice(phrases.greetings))
    if rng.random() < CLOSING:
        parts.append(rng.choice(phrases.closings))
    other = rng.choice([other for other in ROUTES if other != route])
    topic, say = rng.choice(phrases.routes[other].topics), rng.choice(phrases.routes[other].says)
    parts = [part.replace("{topic}", topic).replace("{say}", say[0].upper() + say[1:]) for part in parts]
    return " ".join(_filled(part, phrases, rng) for part in parts)


def _filled(template: str, phrases: Phrases, rng: random.Random) -> str:
    """Fill the slots; a slot that a template names twice gets one filling, `{other}` an item unlike `{item}`."""
    fillings: dict[str, str] = {}
    for slot in SLOT.findall(template):
        if slot in fillings:
            continue
        if slot == "order":
            fillings[slot] = rng.choice(("order ", "order #", "my order ")) + str(rng.randrange(10_000, 100_000))
        elif slot == "ref":
            fillings[slot] = str(rng.randrange(10_000, 100_000))
        elif slot == "other":
            fillings[slot] = rng.choice([item for item in phrases.slots["item"] if item != fillings.get("item")])
        else:
            fillings[slot] = rng.choice(phrases.slots[slot])
    text = template.format_map(fillings)
    return text[0].upper() + text[1:]


def _noisy(text: str, rng: random.Random) -> str:
    """Return the text as people type it: some without capitals, some with slips of the finger."""
    if rng.random() < TYPOS:
        words = text.split(" ")
        long = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 4]
        for i in rng.sample(long, min(len(long), rng.choice((1, 1, 2)))):
            words[i] = _slip(words[i], rng)
        text = " ".join(words)
    return text.lower() if rng.random() < LOWERCASE else text


def _slip(word: str, rng: random.Random) -> str:
    """Return the word with one typo after its first letter: two letters swapped, one lost or one doubled."""
    at = rng.randrange(1, len(word) - 1)
    slips = (
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
    )
    return rng.choice(slips)
