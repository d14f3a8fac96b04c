"""An estimate as a table."""

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from anchorvec.planning.estimate import StageEstimate
    from anchorvec.planning.whole import RunEstimate


def show(estimate: "RunEstimate") -> Group:
    """The `estimate` of a run: a row for each stage and quantity, and what is to be said of it."""
    table = Table(show_header=False, title=f"Estimate for {estimate.machine}")
    for name, stage in estimate.stages.items():
        parts = ", ".join(f"{part.replace('_', ' ')} {gigabytes(size)}" for part, size in stage.memory.parts().items())
        fits = "" if stage.fits else "; DOES NOT FIT"
        table.add_row(
            f"{name}, memory",
            Text(f"{gigabytes(stage.memory.peak)} of {gigabytes(stage.capacity)} GB{fits}: {parts}"),
        )
        if not stage.fits:
            table.add_row("", Text(_way_out(stage)))
        if stage.whole_model > stage.memory.peak:
            table.add_row("", Text(f"{gigabytes(stage.whole_model)} GB when it starts: the whole model, in fp32"))
        if stage.exchanged:
            table.add_row(f"{name}, network", f"{gigabytes(stage.exchanged)} GB that each device sends in a step")
        table.add_row(f"{name}, arithmetic", f"{stage.tokens:,} tokens, {stage.flops:.3g} FLOPs")
        if stage.seconds is not None and stage.seconds_per_step is not None:
            share = "" if stage.share is None else f", at {stage.share:.0%} of the peak"
            table.add_row(
                f"{name}, time", f"{duration(stage.seconds)}: {duration(stage.seconds_per_step)} a step{share}"
            )
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in estimate.seconds.items())
    unknown = [name for name in estimate.stages if name not in estimate.seconds]
    without = f", without {' and '.join(unknown)}" if unknown else ""
    table.add_row("time", f"{duration(estimate.total_seconds)}{without}: {parts}")
    for note in estimate.notes:
        table.add_row("", Text(note))
    return Group(table)


def _way_out(stage: "StageEstimate") -> str:
    if stage.advice:
        return f"it fits with {' '.join(stage.advice)}"
    return "no setting makes it fit; take a device with more memory, or a smaller model"


def gigabytes(size: float) -> str:
    """`size` bytes in GB, in three digits."""
    return f"{size / 1e9:.3g}"


def duration(seconds: float) -> str:
    """`seconds` in the unit that suits them, in two digits or three."""
    for unit, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.2g} s"
