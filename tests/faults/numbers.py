"""Numbers that are none, in every place they can come from, and losses that jump."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from faults.tools import Bench, Outcome, forked, go_on, waited
from sae import activations, kernels, planning, store
from sae import config as settings
from sae.activations import ActivationStream
from sae.autoencoder import SparseAutoencoder
from sae.errors import RunError, SAEError
from sae.learner import Learner
from sae.planning import Plan

VALUES = {"NaN": float("nan"), "+Inf": float("inf"), "-Inf": float("-inf"), "1e38": 1e38}
WHEN = 10
"""The step, or forward pass, at which it happens; checkpoints come every three."""


def injected(bench: Bench) -> Iterator[Outcome]:
    """F7: six sites times four values: the run ends, or stops and says so, with finite weights."""
    for site, break_it in SITES.items():
        for name, value in VALUES.items():
            plan = bench.plan(f"{site}-{name}".replace(" ", "-"))
            code = waited(forked(partial(_broken, plan, break_it, value)))
            try:
                sae = SparseAutoencoder.from_pretrained(plan.output)
                finite = all(bool(p.isfinite().all()) for p in sae.parameters())
            except SAEError as error:
                finite, code = False, f"{code}: {error}"
            yield finite and code in (0, 2), f"{name} in {site}: exit code {code}, finite {finite}"


def _broken(plan: Plan, break_it: Callable[[float], None], value: float) -> None:
    break_it(value)
    try:
        go_on(plan)
    except RunError:  # it gave up and said so
        os._exit(2)


def _at(owner: Any, name: str, change: Callable[[Any, tuple], None]) -> None:
    """Let `change(result, arguments)` spoil what the WHEN-th call of a function gave."""
    plain, calls = getattr(owner, name), iter(range(10**9))

    def spoilt(*args: Any, **options: Any) -> Any:
        found = plain(*args, **options)
        if next(calls) == WHEN:
            change(found, args)
        return found

    setattr(owner, name, spoilt)


def _rows(rows: slice) -> Callable[[float], None]:
    def change(value: float, batches: Any, _: tuple) -> None:
        for batch in batches.values():
            batch.x[rows] = value

    return lambda value: _at(ActivationStream, "draw", partial(change, value))


def _activations(value: float) -> None:
    def change(found: Any, _: tuple) -> None:
        for acts in found[0].values():
            acts[::7, 3] = value

    _at(activations, "read", change)


def _loss(value: float) -> None:
    _at(kernels, "topk_step", lambda stats, _: stats.loss.fill_(value))


def _gradient(value: float) -> None:
    _at(kernels, "topk_step", lambda _, args: args[0].W_dec.grad[2].fill_(value))


def _weights(value: float) -> None:
    _at(Learner, "apply", lambda _, args: args[0].sae.W_enc.data[:, 5].fill_(value))


SITES: dict[str, Callable[[float], None]] = {
    "activations": _activations,
    "one token": _rows(slice(3, 4)),
    "a whole batch": _rows(slice(None)),
    "the loss": _loss,
    "a gradient": _gradient,
    "the weights": _weights,
}


def spikes(bench: Bench) -> Iterator[Outcome]:
    """F8: three batches times 1e4: FVU within 1 % of the clean run, dead share within 2 points.

    On the bundled model: in an SAE of 48 features leaving out three sound batches changes the FVU
    by up to 1.7 % and the dead share by two features, here by 0.04 % and 0.2 points.
    """
    for seed in range(bench.times(2, 10)):
        clean, spiked = (_real(bench, f"{name}-{seed}", seed) for name in ("clean", "spiked"))
        waited(forked(partial(go_on, clean)), seconds=300)
        waited(forked(partial(_spiked, spiked)), seconds=300)
        before, after = _metrics(clean), _metrics(spiked)
        fvu, dead = after["fvu"] / before["fvu"] - 1, after["dead"] - before["dead"]
        yield fvu < 0.01 and dead < 0.02, f"seed {seed}: FVU {fvu:+.1%}, dead {dead:+.1%}"


def _real(bench: Bench, name: str, seed: int) -> Plan:
    """200 steps on the bundled model."""
    given = {
        "sae.d_sae": "1024",
        "sae.sparsity.kind": "topk",
        "optim.pool": "32768",
        "tokens": str(200 * 1024),
        "data.eval_tokens": "20000",
        "seed": str(seed),
        "output": str(bench.folder / name),
    }
    return planning.plan(settings.resolve(None, given))


def _spiked(plan: Plan) -> None:
    draw, calls = ActivationStream.draw, iter(range(10**9))

    def spiked(self: ActivationStream) -> Any:
        found = draw(self)
        if next(calls) in (60, 100, 140):
            for batch in found.values():
                batch.x.mul_(1e4)
        return found

    ActivationStream.draw = spiked  # in this process alone
    go_on(plan)


def _metrics(plan: Plan) -> dict[str, float]:
    """FVU and dead share on held-out text."""
    from sae.runs import evaluate_run, open_run

    (found,) = evaluate_run(open_run(plan.output)).values()
    assert found.fvu.value is not None and found.dead.value is not None
    return {"fvu": found.fvu.value, "dead": found.dead.value}


def again(bench: Bench) -> Iterator[Outcome]:
    """F7: a run whose batch was skipped is the run whose trainer was never handed that batch."""
    for name, value in VALUES.items():
        hashes = []
        for change in (_rows(slice(3, 4)), _left_out):
            plan = bench.plan(f"again-{len(hashes)}-{name}")
            waited(forked(partial(_broken, plan, change, value)))
            hashes.append(store.sha256(plan.output / "saes/layers.1.mlp_act/sae.safetensors"))
        yield hashes[0] == hashes[1], f"{name}: other weights than without the batch"


def _left_out(value: float) -> None:
    draw, calls = ActivationStream.draw, iter(range(10**9))

    def shorter(self: ActivationStream) -> Any:
        return draw(self) if next(calls) != WHEN else (draw(self), draw(self))[1]

    ActivationStream.draw = shorter
