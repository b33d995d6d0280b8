"""The classic table: what 7B, 13B and 70B models take for weights and optimizer, and why. GB is 10^9 bytes here.

The sizes are Llama 2's. Activations, logits and workspace come on top: `decal plan MODEL` counts them. Importing this
file costs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9
RANK = 16
FULL = 16  # bytes a parameter: fp32 weight, gradient and Adam's two moments, 4 each
SIXTEEN_BIT = 2
NF4 = 4.127 / 8  # bytes: 4 bits a weight, 8-bit scales for 64 weights each, fp32 ones for 256 of those


@dataclass(frozen=True, kw_only=True)
class Llama2:
    """The shape of a Llama 2 model."""

    name: str
    layers: int
    width: int
    inner: int
    kv: int  # width of keys and of values
    vocabulary: int = 32_000

    @property
    def linears(self) -> int:
        """Weights of the linear layers in its blocks."""
        return self.layers * sum(rows * columns for rows, columns in self._shapes())

    @property
    def edges(self) -> int:
        """Parameters of embedding and head."""
        return 2 * self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        return self.linears + self.edges + self.width * (2 * self.layers + 1)  # and the norms

    def adapter(self, rank: int = RANK) -> int:
        """Parameters of an adapter on all linear layers: r · (in + out) of each."""
        return self.layers * sum(rank * (rows + columns) for rows, columns in self._shapes())

    def _shapes(self) -> list[tuple[int, int]]:
        attention = [(self.width, self.width)] * 2 + [(self.kv, self.width)] * 2
        return attention + [(self.inner, self.width)] * 3


MODELS = (
    Llama2(name="7B", layers=32, width=4096, inner=11008, kv=4096),
    Llama2(name="13B", layers=40, width=5120, inner=13824, kv=5120),
    Llama2(name="70B", layers=80, width=8192, inner=28672, kv=1024),
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One cell of the table with its arithmetic."""

    model: str
    method: str
    gb: float
    arithmetic: str


def lines() -> list[Line]:
    """Return the table, three lines for each model."""
    found: list[Line] = []
    for m in MODELS:
        p, a = m.parameters, m.adapter()
        state = a * FULL / GB
        dense = p * SIXTEEN_BIT / GB
        coded = (m.linears * NF4 + (p - m.linears) * SIXTEEN_BIT) / GB
        texts = (
            ("full", p * FULL / GB, f"{_b(p)} x 16 B (fp32 weight, gradient, two moments)"),
            ("LoRA", dense + state, f"{_b(p)} x 2 B = {dense:.1f}, adapter {_m(a)} x 16 B = {state:.2f}"),
            (
                "QLoRA",
                coded + state,
                f"{_b(m.linears)} x 4.127 bit + {_b(p - m.linears)} x 2 B = {coded:.2f}, adapter {state:.2f}",
            ),
        )
        found += [Line(model=m.name, method=method, gb=gb, arithmetic=how) for method, gb, how in texts]
    return found


def _b(count: int) -> str:
    return f"{count / 1e9:.3f}e9"


def _m(count: int) -> str:
    return f"{count / 1e6:.1f}e6"
