"""A `Probe` over a loaded model and SAE: what a text excites, and what changing features does."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae import config as settings
from sae import language_model
from sae.autoencoder import SparseAutoencoder, read_metadata
from sae.errors import DataError, ModelError
from sae.features import prompt_features
from sae.hooks import replace
from sae.language_model import LanguageModel
from sae.planning import pick_device
from sae.records import Change, Continuation, Reading, TokenValue, check_features
from sae.routes import Route
from sae.store import Run, read_manifest
from sae.text import TokenPieces

LISTED = 10
"""Next tokens that are listed."""
LONGEST = 200
"""Tokens that are generated at most."""


class LiveProbe:
    """Reads and steers a model through the features of one SAE; see `records.Probe`."""

    def __init__(self, lm: LanguageModel, sae: SparseAutoencoder, route: Route) -> None:
        self.lm, self.sae, self.route = lm, sae, route
        self.pieces = TokenPieces(lm.tokenizer)
        self._special = torch.tensor(sorted(lm.tokenizer.all_special_ids), dtype=torch.long)

    def read(self, text: str, k: int) -> list[Reading]:
        """The `k` strongest features on each token. DataError for a text too long, or empty."""
        model, tokenizer = self.lm.model, self.lm.tokenizer
        found = prompt_features(model, tokenizer, self.sae, self.route, text, k)
        return [Reading(piece, features) for piece, features in found]

    def steer(
        self,
        text: str,
        changes: Mapping[int, Change],
        *,
        tokens: int,
        temperature: float,
        seed: int,
    ) -> Continuation:
        """What the model says after `text` with some features changed; none: as it is, to the bit.

        Every token but the special ones goes on with x + Σ (new act − act) · W_dec instead of x:
        what the SAE does not explain stays. Raises DataError, ModelError, RunError.
        """
        if self.lm.model.get_output_embeddings() is None:
            raise ModelError(f"{self.lm.name} has no head that predicts the next token")
        if changes and len(self.route.points) > 1:
            raise ModelError(
                f"{self.route}: features can be changed where an SAE reads and writes one "
                "hookpoint; this one can only be read"
            )
        features = check_features(list(changes), self.sae.d_sae)
        changed = [changes[feature] for feature in features]
        ids = self.lm.tokenizer(text, verbose=False)["input_ids"]
        room = (self.lm.context or len(ids) + LONGEST) - len(ids)
        if not ids or room < 1:
            raise DataError(
                f"the text has {len(ids)} tokens; the model reads 1 to {self.lm.context}"
            )
        count = min(tokens, LONGEST, room)
        made, logits = self._generate(ids, features, changed, count, temperature, seed)
        values, best = logits.softmax(-1).topk(min(LISTED, len(logits)))
        return Continuation(
            [
                TokenValue(i, self.pieces.piece(i), p)
                for i, p in zip(best.tolist(), values.tolist(), strict=True)
            ],
            self.pieces.pieces([*ids, *made])[len(ids) :],
        )

    @torch.no_grad()
    def _generate(
        self,
        ids: list[int],
        features: list[int],
        changes: list[Change],
        count: int,
        temperature: float,
        seed: int,
    ) -> tuple[list[int], Float[Tensor, " vocab"]]:
        """`count` tokens, fewer where the model ends the text; the logits of the first."""
        model: Any = self.lm.model
        random = torch.Generator().manual_seed(seed)
        made: list[int] = []
        first = torch.empty(0)
        new, past = torch.tensor([ids], device=model.device), None
        for _ in range(max(1, count)):
            with self._changed(new, features, changes):
                out = model(input_ids=new, past_key_values=past, use_cache=True)
            logits, past = out.logits[0, -1].float().cpu()[: self.pieces.n_ids], out.past_key_values
            first = first if len(made) else logits
            made.append(_draw(logits, temperature, random))
            if made[-1] == self.lm.tokenizer.eos_token_id:
                break
            new = torch.tensor([made[-1:]], device=model.device)
        return made[:count], first

    @contextmanager
    def _changed(self, ids: Tensor, features: list[int], changes: list[Change]) -> Iterator[None]:
        """Forward passes over `ids` go on with the changed activations."""
        fn = self._edit(torch.isin(ids.cpu(), self._special), features, changes)
        with replace(self.lm.model, self.route.inputs[0], fn) if features else nullcontext():
            yield

    def _edit(
        self, special: Tensor, features: list[int], changes: list[Change]
    ) -> Callable[[Tensor], Tensor]:
        scale = torch.tensor([c.scale for c in changes], device=self.sae.device)
        add = torch.tensor([c.add for c in changes], device=self.sae.device)

        def edit(x: Float[Tensor, "batch seq d"]) -> Tensor:
            acts = self.sae.encode(x.to(self.sae.dtype))[..., features].float()
            difference = acts * (scale - 1) + add
            difference[special.to(x.device)] = 0
            return x + (difference @ self.sae.W_dec[features].float()).to(x.dtype)

        return edit


def open_probe(run: Path, sae: str, device: str = "auto") -> LiveProbe:
    """Load the model of a run and one of its SAEs; raises ModelError and RunError."""
    opened = Run(run)
    folder, config = opened.sae(sae), settings.load(opened.config_path)
    lm = language_model.load(config.model, pick_device(device))
    loaded = SparseAutoencoder.from_pretrained(folder, device=lm.model.device)
    origin = read_metadata(folder)
    return LiveProbe(lm, loaded, Route.parse(read_manifest(folder)["hookpoint"], origin))


def _draw(logits: Float[Tensor, " vocab"], temperature: float, random: torch.Generator) -> int:
    """The likeliest token at temperature 0, else one drawn."""
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=random))
