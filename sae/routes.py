"""What one SAE reads and what it rebuilds: one hookpoint, or a map from some to others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import FormatError
from sae.hooks import Hookpoint


@dataclass(frozen=True)
class Route:
    """From the activations at `inputs`, side by side, to those at `targets`.

    The same on both sides is an autoencoder: a plain SAE at one hookpoint, a crosscoder at several
    (Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders). mlp_in → mlp_out is a
    transcoder (Dunefsky et al. 2024, arXiv:2406.11944).
    """

    inputs: tuple[Hookpoint, ...]
    targets: tuple[Hookpoint, ...]

    @classmethod
    def at(cls, *points: Hookpoint) -> "Route":
        """That of an autoencoder at these hookpoints."""
        return cls(points, points)

    @classmethod
    def parse(cls, name: str, origin: Mapping[str, Any]) -> "Route":
        """The route that the metadata of an SAE tell; `name` is its hookpoint where they do not.

        Raises FormatError and HookpointError.
        """
        if "inputs" not in origin:
            return cls.at(Hookpoint.parse(str(origin.get("hookpoint", name))))
        sides = [origin["inputs"], origin.get("targets")]
        for side in sides:
            if not (isinstance(side, list) and side and all(isinstance(p, str) for p in side)):
                shown = str(side)[:60]
                raise FormatError(f"{name}: inputs or targets {shown}: expected lists of names")
        inputs, targets = (tuple(map(Hookpoint.parse, side)) for side in sides)
        return cls(inputs, targets)

    @property
    def points(self) -> list[Hookpoint]:
        """All hookpoints, each once."""
        return list(dict.fromkeys([*self.inputs, *self.targets]))

    @property
    def is_map(self) -> bool:
        """Whether what is rebuilt is not what is read."""
        return self.inputs != self.targets

    def contradiction(self, d_in: int, widths: Sequence[int]) -> str | None:
        """Why no model has it with inputs of d_in in all and targets of these widths, if so."""
        if len(widths) != len(self.targets):
            return f"the targets are {len(widths)} side by side, {len(self.targets)} came"
        wide: list[tuple[str, float]]
        wide = [(point.space, width) for point, width in zip(self.targets, widths, strict=True)]
        if len(read := {point.space for point in self.inputs}) == 1:
            wide.append((read.pop(), d_in / len(self.inputs)))
        if not self.is_map:
            wide += [("what is rebuilt from itself", width) for width in (d_in, sum(widths))]
        known: dict[str, float] = {}
        for space, width in wide:
            if known.setdefault(space, width) != width:
                return f"{space} would have the widths {known[space]:g} and {width:g}"
        return None

    def x(self, acts: Mapping[Hookpoint, Float[Tensor, "n _"]]) -> Float[Tensor, "n d_in"]:
        """What it reads."""
        return _side_by_side(acts[point] for point in self.inputs)

    def y(self, acts: Mapping[Hookpoint, Float[Tensor, "n _"]]) -> Float[Tensor, "n d_out"]:
        """What it rebuilds."""
        return _side_by_side(acts[point] for point in self.targets)

    def origin(self) -> dict[str, Any]:
        """What `parse` needs, for the metadata of an SAE."""
        if len(self.points) == 1:
            return {"hookpoint": str(self)}
        sides = {"inputs": [*map(str, self.inputs)], "targets": [*map(str, self.targets)]}
        return {"hookpoint": str(self), **sides}

    def __str__(self) -> str:
        """'layers.2.mlp_act', 'layers.2.mlp_in-to-layers.2.mlp_out', 'layers.0-3.resid_post'."""
        read = _name(self.inputs)
        return f"{read}-to-{_name(self.targets)}" if self.is_map else read


def _side_by_side(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    return torch.cat([first, *others], dim=-1) if others else first


def _name(points: Sequence[Hookpoint]) -> str:
    """A range where consecutive layers have the same site; elsewhere the first, and how many."""
    first, last = points[0], points[-1]
    if len(points) == 1:
        return str(first)
    if first.layer is not None and last.layer is not None:
        layers = range(first.layer, last.layer + 1)
        if [*map(str, points)] == [f"layers.{layer}.{first.site}" for layer in layers]:
            return f"layers.{layers[0]}-{layers[-1]}.{first.site}"
    return f"{first}-and-{len(points) - 1}-more"
