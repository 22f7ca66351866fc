"""Prints a plan: memory by part, whether it fits, what to change, and the time of a step."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.planner.estimate import Plan, gib


def show_plan(out: Console, found: Plan) -> None:
    """Prints the parts of the peak memory, whether it fits, what to change, and the time of a step."""
    most = found.memory.peak
    title = f"{found.algorithm}, {found.shape.parameters / 1e6:,.0f}M parameters"
    table = Table(title=title, title_justify="left")
    table.add_column("memory")
    for name in ("size", "share"):
        table.add_column(name, justify="right")
    for name, count in {**found.memory.held, **found.memory.phases[found.memory.peak_phase]}.items():
        if count >= 1 << 20:
            table.add_row(name, gib(count), f"{count / most:.0%}")
    table.add_section()
    table.add_row(f"peak, in the {found.memory.peak_phase}", gib(most), "100%")
    for name in found.memory.phases:
        if name != found.memory.peak_phase:
            table.add_row(f"peak while {name}", gib(found.memory.of(name)), f"{found.memory.of(name) / most:.0%}")
    if found.workers:
        table.add_section()
        for name, (count, size) in found.workers.items():
            table.add_row(f"{count} × {name}", gib(count * size), "")
        where = "all processes together" if found.one_machine else "the largest process"
        table.add_row(where, gib(found.peak), "")
        table.title = f"{title}; memory by part is that of a single process"
    out.print(table)
    verdict = "fits" if found.fits else "does NOT fit"
    style = "green" if found.fits else "red"
    out.print(Text(f"{verdict} in {gib(found.limit)} of memory", style=style))
    if found.changes:
        changes = Table(title="settings to change, cheapest first", title_justify="left")
        for name in ("setting", "saves by itself", "costs"):
            changes.add_column(name, overflow="fold")
        for change in found.changes:
            changes.add_row(f"--{change.setting} {change.value}", gib(change.saves), change.cost)
        out.print(changes)
    elif not found.fits:
        out.print("No setting makes it fit. Use a smaller model, a larger machine, or more devices.")
    if found.seconds:
        times = Table(title="time of a step, from speeds measured just now", title_justify="left")
        times.add_column("part")
        times.add_column("seconds", justify="right")
        for name, seconds in found.seconds.items():
            times.add_row(name, f"{seconds:.2f}")
        times.add_section()
        step = sum(found.seconds.values())
        times.add_row("step", f"{step:.2f}")
        if found.steps:
            times.add_row(f"{found.steps} steps", f"{step * found.steps:,.0f}")
        out.print(times)
    if found.refused:
        out.print(Text(f"training would refuse this run: {found.refused}", style="red"), soft_wrap=True)
    for text in found.unknown:
        out.print(Text(f"unknown: {text}", style="yellow"), soft_wrap=True)
