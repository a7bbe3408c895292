"""One SAE in training: unfolded weights, Adam, schedules, and how long each feature is quiet."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import steps
from sae.activations import Batch, Downstream, Sites, Statistics
from sae.autoencoder import DECODER_NORM, SparseAutoencoder, read_metadata
from sae.config import Moment, TrainConfig, warmed_up
from sae.kernels import StepStats
from sae.memory import MicroBatch
from sae.planning import sparsity_of
from sae.revival import resample
from sae.sparsity import SMALL, power
from sae.steering import L0Control

AUXK_CANDIDATES = 2
"""Dead features among which AuxK chooses, in multiples of auxk: all of them would cost as much as a
dense step while many are dead."""
EVENED_BY = 256
"""Tokens that tell how much smaller a penalty is that adds up powers."""
TINY = 1e-12
"""A gradient that is smaller is none."""
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Learner:
    """Adam on one SAE; what it reads and writes is scaled site by site: `raw()` folds that in.

    A step has two halves, so that nothing is lost where a gradient is not finite: `gradients`
    leaves everything but the gradients as it was, `apply` does the rest. An L1 penalty makes
    activations too small, so its training ends with a refit: the decoder alone, without penalty
    (after Wright & Sharkey 2024, "Addressing feature suppression in SAEs", who tune the norms).
    """

    def __init__(
        self,
        config: TrainConfig,
        sae: SparseAutoencoder,
        reads: Sites,
        writes: Sites | None = None,
        *,
        dtype: torch.dtype,
    ):
        """`writes`: where y is not x; `dtype`: of the large products."""
        self.config, self.dtype, self.sae = config, dtype, sae
        self.reads, self.writes = reads, writes
        self.scale = reads.scale(sae.device)
        self.scale_out = self.scale if writes is None else writes.scale(sae.device)
        self.generator = torch.Generator().manual_seed(config.seed)
        own = list(sae.sparsity.parameters())
        weights = [p for p in sae.parameters() if all(p is not other for other in own)]
        groups = [{"params": weights, "pace": 1.0}, {"params": own, "pace": sae.sparsity.pace}]
        self.optimizer = torch.optim.Adam(
            groups, lr=config.optim.lr, betas=config.optim.betas, fused=True
        )
        self.quiet = torch.zeros(sae.d_sae, dtype=torch.long, device=sae.device)
        self.tokens_since_revival = 0
        self.revived = 0
        self.variance = 0.0  # E‖y − mean y‖² of the first batch
        self.refit: float = getattr(config.sae.sparsity, "refit", 0.0)
        target = config.sae.sparsity.wanted_l0()
        self.control = L0Control(target, sae.sparsity.lag) if target is not None else None
        self.chunk = MicroBatch("the SAE's step", "tokens", "lower optim.batch or sae.d_sae")
        self.lr = 0.0
        self.norm = torch.zeros(())
        self.kl = torch.zeros(())

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
        """
        reads, writes = x.sites, None if y is None else y.sites
        sae, to = _empty(config, reads, writes, x.mean.device), x if y is None else y
        learner = cls(config, sae, reads, writes, dtype=dtype)
        towards = None if examples is None else examples.y.float() * learner.scale_out
        sae.initialise(to.mean * learner.scale_out, learner.generator, towards, tied=y is None)
        if y is not None:
            learner._point_encoder(x.mean * learner.scale, examples)
        return learner

    @classmethod
    def going_on(
        cls,
        config: TrainConfig,
        folder: Path,
        x: Statistics,
        y: Statistics | None = None,
        *,
        dtype: torch.dtype,
    ) -> "Learner":
        """The weights of an SAE on the disk, for further training on activations like `x` and `y`.

        Raises FormatError where its scales are not those of as many hookpoints.
        """
        found = read_metadata(folder)
        reads = x.sites.rescaled(found.get("scale"))
        writes = None if y is None else y.sites.rescaled(found.get("scale_out"))
        device = x.mean.device
        learner = cls(config, _empty(config, reads, writes, device), reads, writes, dtype=dtype)
        old = SparseAutoencoder.from_pretrained(folder, device=device, dtype=torch.float32)
        old = old.unfolded(learner.scale, learner.scale_out)
        learner.sae.load_state_dict(old.state_dict())
        return learner

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
        reads = Sites.restored(state["reads"])
        writes = Sites.restored(state["writes"]) if "writes" in state else None
        sae = _empty(config, reads, writes, device)
        learner = cls(config, sae, reads, writes, dtype=dtype)
        sae.load_state_dict({name: state[name] for name in sae.state_dict()})
        for name, parameter in learner.sae.named_parameters():
            if f"{name}/step" in state:
                moments = {m: state[f"{name}/{m}"].to(device) for m in _MOMENTS}
                learner.optimizer.state[parameter] = moments
        learner.quiet.copy_(state["quiet"])
        learner.tokens_since_revival, learner.revived = state["revival"].tolist()
        learner.variance = state["variance"].item()
        learner.generator.set_state(state["generator"])
        if learner.control:
            learner.control.restore(state["control"])
        return learner

    def raw(self) -> SparseAutoencoder:
        """The SAE for raw activations, as it is now."""
        return self.sae.folded(self.scale, self.scale_out)

    def scales(self) -> dict[str, float | list[float]]:
        """What `raw` folds in, for the metadata of the SAE: a number, or one for each hookpoint."""
        found = {"scale": self.reads.plain()}
        return found if self.writes is None else found | {"scale_out": self.writes.plain()}

    def state(self) -> dict[str, Tensor]:
        """All that the rest of the training depends on."""
        tensors = {
            "reads": self.reads.state(),
            "variance": torch.tensor(self.variance, dtype=torch.float64),
            "quiet": self.quiet,
            "revival": torch.tensor([self.tokens_since_revival, self.revived]),
            "generator": self.generator.get_state(),
        }
        if self.writes is not None:
            tensors["writes"] = self.writes.state()
        if self.control:
            tensors["control"] = self.control.state()
        tensors |= self.sae.state_dict()
        for name, parameter in self.sae.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{name}/{moment}": value for moment, value in moments.items()}
        return tensors

    def gradients(self, batch: Batch, done: float) -> StepStats:
        """The gradients on raw activations; `done` is the share of the tokens learnt from."""
        training, _ = self._shares(batch, done)
        stats = self._gradients(batch, training)
        limit = self.config.optim.grad_clip
        self.norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), limit or float("inf"))
        return stats

    def apply(self, batch: Batch, stats: StepStats, done: float) -> None:
        """One Adam step with these gradients; dead features come back where it is time."""
        if not self.variance:
            self.variance = self._variance(batch)
        optim, finetune = self.config.optim, self.config.finetune
        done, tuned = self._shares(batch, done)
        self.lr = optim.lr * warmed_up(done, optim.lr_warmup) * self._decayed(done)
        if batch.downstream:
            self.lr = finetune.lr * (1 - tuned)
        for group in self.optimizer.param_groups:
            group["lr"] = group["pace"] * self.lr
        self.optimizer.step()
        self.sae.sparsity.observe(stats.cut)
        self.quiet = torch.where(stats.fired > 0, 0, self.quiet + len(batch.x))
        if not batch.downstream:
            self._steer(stats, done)
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
        extras = {"coef_factor": self.control.factor} if self.control else {}
        extras |= {"kl": self.kl.item()} if batch.downstream else {}
        return extras | {
            "loss": stats.loss.item(),
            "mse": stats.mse.item(),
            "fvu": stats.mse.item() / (self._variance(batch) or float("nan")),
            "l0": stats.l0.item(),
            "dead": self.dead.float().mean().item(),
            "revived": self.revived,
            "lr": self.lr,
            "sequences": len(torch.stack([document, position // context]).unique(dim=1)[0]),
        }

    def _shares(self, batch: Batch, done: float) -> tuple[float, float]:
        """How far training and fine-tuning are; of whole sequences the training is over."""
        training, tuned = self.config.shares(done)
        return (1.0, tuned) if batch.downstream else (training, 0.0)

    def _scaled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the weights take and give; one tensor where x is rebuilt."""
        x = batch.x.float() * self.scale
        return x, x if self.writes is None else batch.y.float() * self.scale_out

    @torch.no_grad()
    def _point_encoder(self, mean: Tensor, examples: Batch | None) -> None:
        """Of a map: what subtract_b_dec does where x is rebuilt, by b_enc.

        Features that begin with what `examples` write read what those have, from the mean.
        """
        W_enc, b_enc = self.sae.W_enc, self.sae.b_enc
        if examples is not None:
            towards = examples.x.float()[: self.sae.d_sae] * self.scale - mean
            norms = torch.linalg.vector_norm(towards, dim=-1, keepdim=True)
            own = W_enc[:, : len(towards)]
            own.copy_(torch.where(norms > 0, DECODER_NORM * towards / norms, own.T).T)
        b_enc.sub_(mean @ W_enc)

    def _gradients(self, batch: Batch, done: float) -> StepStats:
        x, y = self._scaled(batch)
        moment = self._moment(x, done)
        prefixes, other = self.config.sae.prefix_sizes(self.sae.d_sae), 0.0
        further = self._for_the_dead()
        if batch.downstream:
            further["push"], other = self._push(batch.downstream, x, y, moment)
        step = partial(
            steps.step, self.sae, x, y, moment, prefixes=prefixes, matmul_dtype=self.dtype
        )
        stats = self.chunk.fit(len(x), partial(step, **further))
        stats = replace(stats, loss=stats.loss + other)
        if self._refitting(done):
            for name, parameter in self.sae.named_parameters():
                if name not in ("W_dec", "W_skip"):
                    parameter.grad = None  # Adam leaves these alone: what is active stays so
        return stats

    def _push(
        self, downstream: Downstream, x: Tensor, y: Tensor, moment: Moment
    ) -> tuple[Tensor, Tensor]:
        """The gradient at the reconstruction of α · KL, as large as that of ‖recon − y‖² by α.

        And what the loss of the step lacks, which has Σ push · recon in place of α · KL. Karvonen
        2025 (arXiv:2503.17272) balances the losses, not their gradients. But KL depends on few
        directions of few tokens: on the bundled model its gradient was then 22 times the other,
        so that both FVU and cross-entropy got worse, and it would overrule any penalty.
        """
        recon = steps.reconstruct(self.sae, x, moment, matmul_dtype=self.dtype)
        self.kl, grad = downstream(recon / self.scale_out)
        grad = grad / self.scale_out
        own = 2 / len(y) * (recon - y)
        alpha = own.norm() / grad.norm().clamp_min(TINY)
        return alpha * grad, (self.kl - (grad * recon).sum()) * alpha / 2

    def _refitting(self, done: float) -> bool:
        """Whether the decoder alone is trained."""
        return self.refit > 0 and done >= 1 - self.refit

    def _moment(self, x: Tensor, done: float) -> Moment:
        """The settings that move, with the coefficient that is steered, or off in the refit."""
        moment = self.config.sae.sparsity.at(done)
        if self._refitting(done):
            return replace(moment, coef=0.0)
        factor = self.control.factor if self.control else 1.0
        return replace(moment, coef=moment.coef * factor * self._evened(x, moment.p))

    def _steer(self, stats: StepStats, done: float) -> None:
        """Move coefficient and thresholds towards the wanted L0, until the refit."""
        if self.control and done < 1 - self.refit:
            settings = self.config.sae.sparsity
            early = settings.at(done).coef < settings.at(1.0).coef
            by = self.control.observe(stats.l0.item(), self._decayed(done), early=early)
            self.sae.sparsity.raise_thresholds(by)

    @torch.no_grad()
    def _evened(self, x: Tensor, p: float) -> float:
        """What keeps a penalty with the power p as large as with 1, from some tokens of the batch.

        Karvonen et al. 2024, arXiv:2408.00113, take that from step to step, where p moves.
        """
        if p == 1:
            return 1.0
        sizes = self.sae.encode(x[:EVENED_BY]) * self.sae.decoder_norms
        return (sizes.sum() / power(sizes, p).sum().clamp_min(SMALL)).item()

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
        _, y = self._scaled(batch)
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
            x, y = self._scaled(batch)
            given = x, y, self._quietest_dead(len(x)), self.generator, self.chunk
            moved = resample(self.sae, self.optimizer, *given, tied=self.writes is None)
            self.revived += int(moved.sum())
            self.quiet[moved] = 0
            self.tokens_since_revival = 0


def _empty(
    config: TrainConfig, reads: Sites, writes: Sites | None, device: torch.device
) -> SparseAutoencoder:
    """An SAE of the wanted shape, its weights still to be set; without `writes` it rebuilds x."""
    to = reads if writes is None else writes
    return SparseAutoencoder(
        reads.width,
        config.sae.width(reads.width),
        sparsity_of(config, reads.width),
        to.width,
        config.sae.subtract_b_dec and writes is None,
        skip=config.sae.skip and writes is not None,
        sites=to.widths,
        device=device,
    )
