"""Machines that a run can be planned for, by name, from a table to which users add lines."""

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path

COMPILED_SHARES = {576: (0.168, 0.242, 0.107), 2048: (0.476, 0.476, 0.21)}
"""By states of so many numbers, the share of an H100's bf16 peak (989 TFLOP/s) that was reached: in Stage I, in Stage
II in full and with LoRA, layers compiled. From docs/experiments/gpu.md: 217,000, 367,000 and 226,000 tokens a second at
576; 59% of the 799 TFLOP/s of a large product in Stage I at 2048. Stage II was not measured there: in full it is taken
to be as fast, and LoRA as much slower as at 576."""

NOT_COMPILED = 0.334 / 0.517
"""What is left of that without compiling, from the step of the 1B shape there."""


@dataclass(frozen=True)
class Machine:
    """One of `devices` alike: peaks in 10^12 operations a second, memory in GB, bandwidths in GB a second.

    `link_gbs` leads to another device, in one direction. `per_machine` devices share a machine, which is tied to others
    by `network_gbs`, of all its cards together, in one direction. `source` says where the figures are from.
    """

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gb: float
    bandwidth_gbs: float
    link_gbs: float
    source: str
    devices: int = 1
    per_machine: int = 8
    network_gbs: float = 12.5

    def __str__(self) -> str:
        return self.name if self.devices == 1 else f"{self.devices} x {self.name}"

    @property
    def exchange_gbs(self) -> float:
        """GB a second that each device sends while all exchange in rings: over the slower of link and network.

        A ring enters and leaves each machine once, and as many rings as there are cards share the data.
        """
        return self.link_gbs if self.devices <= self.per_machine else min(self.link_gbs, self.network_gbs)

    @property
    def memory(self) -> float:
        """Bytes of one device."""
        return self.memory_gb * 1e9


_OPTIONAL = {"per_machine": 8, "network_gbs": 12.5}
_FIGURES = tuple(field.name for field in fields(Machine) if field.type is float and field.name not in _OPTIONAL)


def find_machine(name: str, own: str | Path | None = None) -> Machine:
    """The machine `name`, such as `h100`, or `a100-80gb:8` for eight of them, from the table or from the file `own`.

    Raises AnchorvecError for one that is in neither, with the list, and for a line of `own` that cannot be used.
    """
    table = machines(own)
    kind, _, devices = name.partition(":")
    if kind not in table:
        raise AnchorvecError(f"--machine: {kind!r} is none of {', '.join(table)}; add it to a file for --machines")
    if devices and not (devices.isdecimal() and int(devices) > 0):
        raise AnchorvecError(f"--machine: {name!r} names no number of devices; write, for example, {kind}:8")
    return replace(table[kind], devices=int(devices or 1))


def machines(own: str | Path | None = None) -> dict[str, Machine]:
    """All machines by name; those of the file `own` are added, or stand in place of the package's."""
    return _shipped() | ({} if own is None else _read(user_path(own).name, _text(user_path(own))))


@cache
def _shipped() -> dict[str, Machine]:
    return _read("machines.yaml", (files("anchorvec.planning") / "machines.yaml").read_text(encoding="utf-8"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AnchorvecError(f"--machines: {path} cannot be read ({error})") from error


def _read(name: str, text: str) -> dict[str, Machine]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AnchorvecError(f"--machines: {name} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise AnchorvecError(f"--machines: {name} holds no `NAME: {{...}}`; keys: {', '.join(_FIGURES)}, source")
    return {str(machine): _machine(f"{name}, {machine}", str(machine), line) for machine, line in content.items()}


def _machine(place: str, name: str, line: Any) -> Machine:
    line = line if isinstance(line, dict) else {}
    if unknown := sorted(map(str, line.keys() - {*_FIGURES, *_OPTIONAL, "source"})):
        keys = ", ".join([*_FIGURES, *_OPTIONAL, "source"])
        raise AnchorvecError(f"--machines: {place}: unknown key {unknown[0]}; keys: {keys}")
    figures: dict[str, Any] = {}
    for key in [*_FIGURES, *_OPTIONAL]:
        value = line.get(key, _OPTIONAL.get(key))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise AnchorvecError(f"--machines: {place}: {key} must be a positive number, and is {value!r}")
        figures[key] = float(value)
    if not figures["per_machine"].is_integer():
        raise AnchorvecError(f"--machines: {place}: per_machine must be a whole number, and is {line['per_machine']!r}")
    figures["per_machine"] = int(figures["per_machine"])
    return Machine(name, **figures, source=str(line.get("source", "yours")))


def share_of_peak(stage: str, hidden: int, *, lora: bool, compiled: bool) -> float:
    """The share of a GPU's bf16 peak that `stage` reaches on a model with states of `hidden` numbers.

    Between the two that were measured in proportion to the logarithm; above them as the larger; below them less, in
    proportion to the size. `lora`: adapters train; `compiled`: the layers are.
    """
    column = 0 if stage == "stage_one" else 2 if lora else 1
    (small, below), (large, above) = ((size, shares[column]) for size, shares in COMPILED_SHARES.items())
    way = math.log(hidden / small) / math.log(large / small)
    share = below * hidden / small if way < 0 else below + (above - below) * min(1.0, way)
    return share * (1.0 if compiled else NOT_COMPILED)
