"""One SAE in training: unfolded weights, Adam, schedules, and how long each feature is quiet."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import steps
from sae.activations import Batch, Statistics
from sae.autoencoder import SparseAutoencoder, read_config
from sae.config import TrainConfig, warmed_up
from sae.kernels import StepStats
from sae.memory import MicroBatch
from sae.planning import sparsity_of
from sae.revival import resample

AUXK_CANDIDATES = 2
"""Dead features among which AuxK chooses, in multiples of auxk: all of them would cost as much as a
dense step while many are dead."""
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Learner:
    """Adam on one SAE; inputs are scaled by `scale`, targets by `scale_out`: `raw()` folds them in.

    A step has two halves, so that nothing is lost where a gradient is not finite: `gradients`
    leaves everything but the gradients as it was, `apply` does the rest. An L1 penalty makes
    activations too small, so its training ends with a refit: the decoder alone, without penalty
    (after Wright & Sharkey 2024, "Addressing feature suppression in SAEs", who tune the norms).
    """

    def __init__(
        self,
        config: TrainConfig,
        sae: SparseAutoencoder,
        scale: float,
        scale_out: float | None = None,
        *,
        dtype: torch.dtype,
    ):
        self.config, self.dtype, self.sae, self.scale = config, dtype, sae, scale
        self.is_map = scale_out is not None  # y is not x
        self.scale_out = scale if scale_out is None else scale_out
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer = torch.optim.Adam(
            sae.parameters(), lr=config.optim.lr, betas=config.optim.betas, fused=True
        )
        self.quiet = torch.zeros(sae.d_sae, dtype=torch.long, device=sae.device)
        self.tokens_since_revival = 0
        self.revived = 0
        self.variance = 0.0  # E‖y − mean y‖² of the first batch
        self.refit: float = getattr(config.sae.sparsity, "refit", 0.0)
        self.chunk = MicroBatch("the SAE's step", "tokens", "lower optim.batch or sae.d_sae")
        self.lr = 0.0
        self.norm = torch.zeros(())

    @classmethod
    def begin(
        cls,
        config: TrainConfig,
        x: Statistics,
        y: Statistics | None = None,
        examples: Batch | None = None,
        *,
        dtype: torch.dtype,
    ) -> "Learner":
        """A new SAE for activations like `x` (on their device) that rebuilds `y`, x where None.

        b_dec is at the mean of what is rebuilt; directions are random, or those of `examples`.
        `dtype`: of the large products.
        """
        to = x if y is None else y
        sae = _empty(config, len(x.mean), None if y is None else len(y.mean), x.mean.device)
        learner = cls(config, sae, x.scale, None if y is None else y.scale, dtype=dtype)
        towards = None if examples is None else examples.y.float() * to.scale
        sae.initialise(to.mean * to.scale, learner.generator, towards)
        if y is not None:
            with torch.no_grad():  # what subtract_b_dec does where x is rebuilt
                sae.b_enc.sub_(x.mean * x.scale @ sae.W_enc)
        return learner

    @classmethod
    def going_on(
        cls, config: TrainConfig, folder: Path, x: Statistics, *, dtype: torch.dtype
    ) -> "Learner":
        """The weights of an SAE on the disk, for further training on activations like `x`."""
        device = x.mean.device
        old = SparseAutoencoder.from_pretrained(folder, device=device, dtype=torch.float32)
        scale = (read_config(folder).get("metadata") or {}).get("scale", x.scale)
        sae = _empty(config, old.d_in, None, device)
        sae.load_state_dict(old.unfolded(scale).state_dict())
        return cls(config, sae, scale, dtype=dtype)

    @classmethod
    def restored(
        cls,
        config: TrainConfig,
        state: Mapping[str, Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "Learner":
        """The learner whose `state()` this is."""
        (d_in, _), (_, d_out) = state["W_enc"].shape, state["W_dec"].shape
        sae = _empty(config, d_in, d_out if "scale_out" in state else None, device)
        scales = [state[name].item() for name in ("scale", "scale_out") if name in state]
        learner = cls(config, sae, *scales, dtype=dtype)
        sae.load_state_dict({name: state[name] for name in sae.state_dict()})
        for name, parameter in learner.sae.named_parameters():
            if f"{name}/step" in state:
                moments = {m: state[f"{name}/{m}"].to(device) for m in _MOMENTS}
                learner.optimizer.state[parameter] = moments
        learner.quiet.copy_(state["quiet"])
        learner.tokens_since_revival, learner.revived = state["revival"].tolist()
        learner.variance = state["variance"].item()
        learner.generator.set_state(state["generator"])
        return learner

    def raw(self) -> SparseAutoencoder:
        """The SAE for raw activations, as it is now."""
        return self.sae.folded(self.scale, self.scale_out)

    def state(self) -> dict[str, Tensor]:
        """All that the rest of the training depends on."""
        tensors = {
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "variance": torch.tensor(self.variance, dtype=torch.float64),
            "quiet": self.quiet,
            "revival": torch.tensor([self.tokens_since_revival, self.revived]),
            "generator": self.generator.get_state(),
        }
        if self.is_map:
            tensors["scale_out"] = torch.tensor(self.scale_out, dtype=torch.float64)
        tensors |= self.sae.state_dict()
        for name, parameter in self.sae.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{name}/{moment}": value for moment, value in moments.items()}
        return tensors

    def gradients(self, batch: Batch, done: float) -> StepStats:
        """The gradients on raw activations; `done` is the share of the tokens trained on."""
        x, y = batch.x.float() * self.scale, batch.y.float() * self.scale_out
        stats = self._gradients(x, y, done)
        limit = self.config.optim.grad_clip
        self.norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), limit or float("inf"))
        return stats

    def apply(self, batch: Batch, stats: StepStats, done: float) -> None:
        """One Adam step with these gradients; dead features come back where it is time."""
        if not self.variance:
            self.variance = self._variance(batch)
        optim = self.config.optim
        self.lr = optim.lr * warmed_up(done, optim.lr_warmup) * self._decayed(done)
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        self.sae.sparsity.observe(stats.cut)
        self.quiet = torch.where(stats.fired > 0, 0, self.quiet + len(batch.x))
        self._revive(batch, done)

    def finite(self, stats: StepStats) -> Tensor:
        """Whether loss and gradients are numbers, as a tensor []."""
        return stats.loss.isfinite() & self.norm.isfinite()

    def healthy(self) -> bool:
        """Whether all weights are finite."""
        return all(bool(tensor.isfinite().all()) for tensor in self.sae.state_dict().values())

    @property
    def dead(self) -> Tensor:
        """[d_sae] which features have not fired for `optim.dead_after` tokens."""
        return self.quiet >= self.config.optim.dead_after

    def metrics(self, stats: StepStats, batch: Batch) -> dict[str, float]:
        """What a logged step writes down. `fvu` is that of this batch."""
        (document, position), context = batch.source.T, self.config.data.context
        return {
            "loss": stats.loss.item(),
            "mse": stats.mse.item(),
            "fvu": stats.mse.item() / (self._variance(batch) or float("nan")),
            "l0": stats.l0.item(),
            "dead": self.dead.float().mean().item(),
            "revived": self.revived,
            "lr": self.lr,
            "sequences": len(torch.stack([document, position // context]).unique(dim=1)[0]),
        }

    def _gradients(self, x: Tensor, y: Tensor, done: float) -> StepStats:
        refitting = done >= 1 - self.refit
        moment = self.config.sae.sparsity.at(done)
        if refitting:
            moment = replace(moment, coef=0.0)
        prefixes = self.config.sae.prefix_sizes(self.sae.d_sae)
        step = partial(
            steps.step, self.sae, x, y, moment, prefixes=prefixes, matmul_dtype=self.dtype
        )
        stats = self.chunk.fit(len(x), partial(step, **self._for_the_dead()))
        if refitting:
            for name, parameter in self.sae.named_parameters():
                if name != "W_dec":
                    parameter.grad = None  # Adam leaves these alone: what is active stays so
        return stats

    def _for_the_dead(self) -> dict[str, Any]:
        """What a step needs to bring dead features back."""
        auxk, coef = self.config.sae.sparsity.revival(self.sae.d_in)
        if not auxk:
            return {"dead": self.dead} if self.sae.sparsity.revival == "auxiliary" else {}
        return {
            "auxk": auxk,
            "auxk_coef": coef * self.variance,  # both losses in the same unit
            "dead": self._quietest_dead(AUXK_CANDIDATES * auxk),
        }

    def _variance(self, batch: Batch) -> float:
        """Mean over the batch of ‖y − mean y‖², scaled."""
        y = batch.y.float() * self.scale_out
        return (y - y.mean(0)).square().sum(1).mean().item()

    def _decayed(self, done: float) -> float:
        """1 → 0 over `lr_decay` before the refit, and once more over the refit."""
        if done >= 1 - self.refit:
            return (1 - done) / self.refit if self.refit else 0.0
        share = self.config.optim.lr_decay
        return min(1.0, (1 - self.refit - done) / share) if share else 1.0

    def _quietest_dead(self, limit: int) -> Tensor:
        """[d_sae] the dead features that have been quiet longest, at most `limit` of them."""
        quietest = torch.zeros_like(self.quiet, dtype=torch.bool)
        quietest[self.quiet.topk(min(limit, len(self.quiet))).indices] = True
        return quietest & self.dead

    def _revive(self, batch: Batch, done: float) -> None:
        """Resample every `dead_after` tokens until the learning rate starts to fall."""
        optim = self.config.optim
        self.tokens_since_revival += len(batch.x)
        if self.sae.sparsity.revival != "resample" or self._decayed(done) < 1:
            return
        if self.tokens_since_revival >= optim.dead_after:
            x, y = batch.x.float() * self.scale, batch.y.float() * self.scale_out
            dead = self._quietest_dead(len(x))
            moved = resample(self.sae, self.optimizer, x, y, dead, self.generator, self.chunk)
            self.revived += int(moved.sum())
            self.quiet[moved] = 0
            self.tokens_since_revival = 0


def _empty(
    config: TrainConfig, d_in: int, d_out: int | None, device: torch.device
) -> SparseAutoencoder:
    """An SAE of the wanted shape, its weights still to be set; without `d_out` it rebuilds x."""
    return SparseAutoencoder(
        d_in,
        config.sae.width(d_in),
        sparsity_of(config),
        d_out,
        subtract_b_dec=config.sae.subtract_b_dec and d_out is None,
        device=device,
    )
