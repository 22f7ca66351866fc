"""Result table of a comparison: medians, ratios, memory peaks, and whether each target is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.duel import Series, mebibytes
from bench.rows import Bar, Row

HEAD = """\
| work | ours, s | {peer}, s | speedup | target | ours, tokens/s | {peer} | ours, MiB | {peer}, MiB | ratio | target | |
|---|--:|--:|--:|---|--:|--:|--:|--:|--:|---|---|"""


@dataclass(frozen=True)
class Result:
    """A measured row, or the reason why it could not be measured (`problem`)."""

    row: Row
    ours: Series | None = None
    peer: Series | None = None
    problem: str = ""

    @property
    def faster(self) -> float:
        """Speedup: the peer's median time divided by ours."""
        assert self.ours and self.peer
        return self.peer.median / self.ours.median

    @property
    def share(self) -> float:
        """Our peak memory divided by the peer's, for whole processes."""
        assert self.ours and self.peer
        return self.ours.peak / self.peer.peak

    def verdicts(self) -> list[tuple[Bar, bool]]:
        """Each target and whether it is met; a row that could not be measured meets none."""
        if self.problem or not (self.ours and self.peer):
            return [(bar, False) for bar in self.row.bars]
        return [(bar, bar.met(self.faster if bar.of == "time" else self.share)) for bar in self.row.bars]

    @property
    def met(self) -> bool:
        return all(met for _, met in self.verdicts())

    def line(self) -> str:
        """The row as Markdown."""
        if self.problem or not (self.ours and self.peer):
            return f"| {self.row.name} |" + " |" * 10 + f" **not measured**: {self.problem} |"
        bars = {bar.of: str(bar) for bar in self.row.bars}
        cells = (
            self.row.name,
            f"{self.ours.median:.2f}",
            f"{self.peer.median:.2f}",
            f"{self.faster:.2f}×",
            bars.get("time", ""),
            f"{self.ours.tokens[-1] / self.ours.median:,.0f}",
            f"{self.peer.tokens[-1] / self.peer.median:,.0f}",
            f"{mebibytes(self.ours.peak)} ({mebibytes(self.ours.above)})",
            f"{mebibytes(self.peer.peak)} ({mebibytes(self.peer.above)})",
            f"{self.share:.2f}×",
            bars.get("memory", ""),
            "met" if self.met else "**missed**: " + ", ".join(bar.of for bar, met in self.verdicts() if not met),
        )
        return "| " + " | ".join(cells) + " |"

    def record(self) -> dict[str, Any]:
        """Everything that was measured, as JSON-compatible data."""
        out: dict[str, Any] = {"name": self.row.name, "model": self.row.model, "problem": self.problem}
        out["bars"] = [{"of": bar.of, "limit": bar.limit, "met": met} for bar, met in self.verdicts()]
        if self.ours and self.peer:
            out |= {"faster": self.faster, "memory_share": self.share}
            out["cpu_share"] = sum(self.ours.cpu) / max(1e-9, sum(self.peer.cpu))  # robust on a busy machine
            out |= {"ours": asdict(self.ours), "peer": asdict(self.peer)}
        return out


def markdown(results: Sequence[Result], peer: str = "TRL") -> str:
    """Table of all rows. Memory is a process's peak; in brackets, the part above the loaded model."""
    return "\n".join([HEAD.format(peer=peer), *(result.line() for result in results)])


def settings(results: Sequence[Result], peer: str = "TRL") -> str:
    """The settings that each side used, one line per row."""

    def said(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in values.items())

    return "\n".join(
        f"- {r.row.name}: ours {said(r.ours.settings)}; {peer} {said(r.peer.settings)}; rounds: {len(r.ours.seconds)}"
        for r in results
        if r.ours and r.peer
    )
