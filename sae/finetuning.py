"""End-to-end fine-tuning: what a reconstruction does to the model's predictions, and its gradient.

Braun et al. 2024 (arXiv:2405.12241) train SAEs so that the model, run on with the reconstruction in
place of the activations, predicts what it predicts without; Karvonen 2025 (arXiv:2503.17272) finds
that a short fine-tuning for that at the end of the training does as well. The loss is
KL(plain ‖ spliced) beside the reconstruction's own, a factor making both gradients equally large.

The model's weights take no part: only the reconstruction gets a gradient, which the step of the SAE
then carries on to its weights (`push` of `steps.step`).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from sae import hooks
from sae.activations import Batch, autocast, is_ordinary
from sae.data import TokenBatch
from sae.hooks import Hookpoint
from sae.memory import MicroBatch
from sae.routes import Route


def spliced_passes() -> MicroBatch:
    """How many rows go through the language model at a time where it predicts."""
    return MicroBatch("the fine-tuning", "rows", "lower optim.batch or data.context")


@dataclass(frozen=True)
class Sequences:
    """Rows of text as the plain model sees them: activations and predictions of the kept tokens.

    `rows.kept` is False at special tokens and at massive ones, which keep their own activations.
    """

    model: PreTrainedModel
    rows: TokenBatch
    dtype: torch.dtype
    passes: MicroBatch
    acts: Mapping[Hookpoint, Float[Tensor, "n d"]]
    log_probs: Float[Tensor, "n vocab"]

    @classmethod
    @torch.no_grad()
    def read(
        cls,
        model: PreTrainedModel,
        hookpoints: list[Hookpoint],
        rows: TokenBatch,
        dtype: torch.dtype,
        passes: MicroBatch,
        max_norm: float | None = None,
    ) -> "Sequences":
        """One forward pass. `max_norm` as in `ActivationStream`."""

        def one_pass(some: slice) -> tuple[dict[Hookpoint, Tensor], Tensor]:
            with hooks.capture(model, hookpoints, stop=False) as acts:
                log_probs = _log_probs(model, rows[some], dtype)
            kept = rows.kept[some].to(model.device)
            return {point: acts[point][kept] for point in hookpoints}, log_probs

        found = [part for _, part in passes.split(len(rows), one_pass)]
        acts = {point: torch.cat([part[point] for part, _ in found]) for point in hookpoints}
        log_probs, ordinary = torch.cat([part for _, part in found]), is_ordinary(acts, max_norm)
        kept = rows.kept.clone()
        kept[rows.kept] = ordinary.cpu()
        return cls(
            model,
            replace(rows, kept=kept),
            dtype,
            passes,
            {point: values[ordinary] for point, values in acts.items()},
            log_probs[ordinary],
        )

    def batch(self, route: Route) -> Batch:
        """What one SAE reads and rebuilds, and what else its reconstruction does."""
        tokens = {p: Batch(acts, acts, self.rows.source) for p, acts in self.acts.items()}
        return replace(Batch.along(route, tokens), downstream=partial(self.divergence, route))

    def divergence(
        self, route: Route, recon: Float[Tensor, "n d_out"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n d_out"]]:
        """KL(plain ‖ spliced) in nats, mean over kept tokens; and its gradient at `recon`.

        All targets of the route are replaced, in raw activations; the other tokens' are not.
        """
        ends = [0, *self.rows.kept.sum(1).cumsum(0).tolist()]
        widths = [self.acts[point].shape[1] for point in route.targets]

        def one_pass(some: slice) -> tuple[Tensor, Tensor]:
            tokens = slice(ends[some.start], ends[min(some.stop, len(self.rows))])
            kept = self.rows.kept[some].to(recon.device)
            leaf = recon[tokens].detach().requires_grad_()
            with torch.enable_grad(), ExitStack() as stack:
                for point, part in zip(route.targets, leaf.split(widths, dim=1), strict=True):
                    swap = hooks.masked(kept, lambda _, part=part: part)
                    stack.enter_context(hooks.replace(self.model, point, swap))
                spliced = _log_probs(self.model, self.rows[some], self.dtype)
                plain = self.log_probs[tokens]
                total = kl_div(spliced, plain, reduction="sum", log_target=True)
                (grad,) = torch.autograd.grad(total, leaf)
            return total.detach(), grad

        found = [part for _, part in self.passes.split(len(self.rows), one_pass)]
        totals, grads = zip(*found, strict=True)
        return torch.stack(totals).sum() / len(recon), torch.cat(grads) / len(recon)


def _log_probs(
    model: PreTrainedModel, rows: TokenBatch, dtype: torch.dtype
) -> Float[Tensor, "n vocab"]:
    """Of what follows each kept token, fp32 at least."""
    with autocast(model.device, dtype):
        logits = model(rows.tokens.to(model.device), use_cache=False).logits
    kept = logits[rows.kept.to(logits.device)]
    return kept.to(torch.promote_types(kept.dtype, torch.float32)).log_softmax(-1)
