"""A route is found again from what an SAE says of itself, has a name fit for a folder, lays
activations side by side in its own order, and tells widths that cannot be its own."""

import re

import pytest
import torch

from sae.errors import FormatError, HookpointError
from sae.hooks import Hookpoint
from sae.routes import Route

IN, OUT = Hookpoint("layers.2.mlp_in"), Hookpoint("layers.2.mlp_out")
NEURONS = Hookpoint("layers.2.mlp_act")
ALL = tuple(Hookpoint(f"layers.{layer}.mlp_out") for layer in range(4))
ROUTES = {
    "layers.2.mlp_out": Route.at(OUT),
    "layers.2.mlp_in-to-layers.2.mlp_out": Route((IN,), (OUT,)),
    "layers.0-3.mlp_out": Route.at(*ALL),
    "layers.0.mlp_out-and-1-more": Route.at(ALL[0], ALL[2]),
    "layers.3.mlp_out-and-3-more": Route.at(*ALL[::-1]),
    "layers.2.mlp_in-and-1-more": Route.at(IN, OUT),
    "layers.2.mlp_in-to-layers.0-3.mlp_out": Route((IN,), ALL),
    "module:h.2-and-1-more": Route.at(Hookpoint("module:h.2"), Hookpoint("module:h.3")),
}


@pytest.mark.parametrize(("name", "route"), ROUTES.items(), ids=ROUTES)
def test_names_are_folders_and_origins_are_read_again(name: str, route: Route) -> None:
    assert str(route) == name and re.fullmatch(r"[\w.:-]+", name)
    assert Route.parse("any name", route.origin()) == route


def test_the_name_of_an_sae_is_its_hookpoint_where_nothing_else_is_known() -> None:
    assert Route.parse("layers.2.mlp_out", {}) == Route.at(OUT)
    with pytest.raises(HookpointError, match="any name"):
        Route.parse("any name", {})


@pytest.mark.parametrize("side", [None, "layers.2.mlp_in", [], [1]])
def test_what_is_no_list_of_names_is_refused(side: object) -> None:
    for origin in ({"inputs": side, "targets": ["a"]}, {"inputs": ["a"], "targets": side}):
        with pytest.raises(FormatError, match="expected lists of names"):
            Route.parse("x", origin)


def test_activations_lie_side_by_side_in_the_order_asked_for() -> None:
    acts = {point: torch.full((5, i + 1), float(i)) for i, point in enumerate(ALL)} | {
        IN: torch.ones(5, 2)
    }
    route = Route((IN, ALL[3]), (ALL[3], ALL[1]))
    assert route.x(acts)[0].tolist() == [1, 1, 3, 3, 3, 3]
    assert route.y(acts)[0].tolist() == [3, 3, 3, 3, 1, 1]
    assert route.points == [IN, ALL[3], ALL[1]] and route.is_map
    plain = Route.at(IN)
    assert plain.x(acts) is acts[IN] and not plain.is_map


@pytest.mark.parametrize(
    ("route", "d_in", "widths", "why"),
    [
        (Route((IN,), (OUT,)), 8, [8], None),
        (Route((IN,), (OUT,)), 8, [5], "the residual stream would have the widths 5 and 8"),
        (Route((IN,), (NEURONS,)), 8, [32], None),
        (Route.at(NEURONS), 8, [5], "layers.2.mlp_act would have the widths 5 and 8"),
        (Route.at(*ALL), 32, [8] * 4, None),
        (Route.at(*ALL), 36, [9] * 3, "the targets are 3 side by side, 4 came"),
        (Route.at(*ALL), 34, [8, 8, 8, 10], "the residual stream would have the widths 8 and 10"),
        (Route.at(IN, NEURONS), 40, [8, 32], None),
        (Route.at(IN, NEURONS), 41, [8, 32], "rebuilt from itself would have the widths 41 and 40"),
        (Route(ALL, (OUT,)), 8, [8], "the residual stream would have the widths 8 and 2"),
    ],
)
def test_widths_that_no_model_has(
    route: Route, d_in: int, widths: list[int], why: str | None
) -> None:
    found = route.contradiction(d_in, widths)
    assert found is None if why is None else why in str(found)
