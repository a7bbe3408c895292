"""The files of Neuronpedia's bulk import (docs.neuronpedia.org/api-and-data/exports):

MODEL/LAYER-SET/{release,model,sourceset,source}.jsonl and a features/batch-N.jsonl.gz and an
activations/batch-N.jsonl.gz for each batch.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from sae.formats import hookpoints
from sae.hooks import Hookpoint
from sae.store import write_atomic

CREATOR = "unknown"
"""Of every row; who imports the files puts in an id of their own."""
STEER = 10
PACKED = 3
"""Level of gzip: half the time of level 5, 14 % more bytes."""
_DIGITS = 24


class Source(NamedTuple):
    """What Neuronpedia calls a source: an SAE of one layer, and the text it was looked at on."""

    model: str
    layer: int
    set: str
    hook: str
    dataset: str
    sequences: int
    width: int
    """Tokens in a sequence."""

    @classmethod
    def of(
        cls,
        read: Hookpoint,
        rebuilt: Hookpoint,
        kind: str,
        manifest: Mapping[str, Any],
        shape: tuple[int, int],
    ) -> "Source":
        """The source of a feature dictionary, by what its SAE reads and rebuilds, its manifest and
        the shape of its tokens."""
        name = str(manifest["model"]).rstrip("/").rpartition("/")[2]
        model = re.sub(r"[^\w.-]+", "-", name).strip("-") or "model"
        site = read.site if read == rebuilt else f"{read.site}-to-{rebuilt.site}"
        kind_and_width = f"{kind}-{manifest['d_sae']}".replace("_", "")
        return cls(
            model,
            read.layer or 0,
            f"{site}-{kind_and_width}".replace("_", "-"),
            hookpoints.to_transformer_lens(read).name,
            str(manifest.get("data") or ""),
            *shape,
        )

    @property
    def tokens(self) -> int:
        """All that were read, special ones too."""
        return self.sequences * self.width

    @property
    def id(self) -> str:
        """Its name on Neuronpedia, within the model."""
        return f"{self.layer}-{self.set}"

    def head(self) -> dict[str, Any]:
        """What SAEDashboard's batches begin with."""
        named = {"model_id": self.model, "layer": self.layer, "sae_set": self.set}
        return named | {"sae_id_suffix": None}

    def prompts(self) -> dict[str, Any]:
        """What they say of the text, in every feature."""
        sizes = {"n_prompts_total": self.sequences, "n_tokens_in_prompt": self.width}
        return sizes | {"dataset": self.dataset}

    def settings(self, batch: int) -> dict[str, Any]:
        """run_settings.json, as far as it is about what was done here."""
        sizes = {"n_prompts_total": self.sequences, "n_tokens_in_prompt": self.width}
        return {
            "sae_set": self.set,
            "model_id": self.model,
            "layer": self.layer,
            "huggingface_dataset_path": self.dataset,
            **sizes,
            "n_features_at_a_time": batch,
            "n_quantiles": 5,
            "top_acts_group_size": 20,
            "quantile_group_size": 5,
        }

    def skipped(self, every: list[int], chosen: list[int]) -> dict[str, Any]:
        """skipped_indexes.json: the features that were not asked for."""
        return {
            "model_id": self.model,
            "layer": str(self.layer),
            "sae_set": self.set,
            "log_sparsity": None,
            "skipped_indexes": sorted(set(every) - set(chosen)),
        }


@dataclass(frozen=True)
class Interval:
    """The activations that a sequence is an example of; of the strongest, low and share are −1."""

    low: float
    high: float
    share: float
    """Of all tokens."""

    @cached_property
    def json(self) -> tuple[str, str, str]:
        """Each number as JSON: many sequences have the same."""
        return to_json(self.low), to_json(self.high), to_json(self.share)


class Shown(NamedTuple):
    """A sequence in which a feature fires. Its text and activations are JSON already, as the same
    text is shown for many features, and one after another would take most of the time."""

    interval: Interval
    tokens: str
    values: str
    mark: int
    """The place of the token that is shown for."""
    best: tuple[int, float]
    """The first place of the largest activation, and that."""
    least: float

    def dashboard(self) -> str:
        """As SAEDashboard's batches have it, as JSON."""
        low, high, share = self.interval.json
        return joined(
            bin_min=low,
            bin_max=high,
            bin_contains=share,
            qualifying_token_index=repr(self.mark),
            tokens=self.tokens,
            values=self.values,
        )


class Writer:
    """Writes the folder of a source under `exports`, a batch of features at a time."""

    def __init__(self, exports: Path, source: Source) -> None:
        self.source, self.folder = source, exports / source.model / source.id
        self.when = datetime.now(UTC).isoformat(timespec="seconds")
        self._layer, self._model, self._when = map(to_json, (source.id, source.model, self.when))
        for name in ("features", "activations"):
            (self.folder / name).mkdir(parents=True)
        for name, row in self._heads().items():
            write_atomic(self.folder / f"{name}.jsonl", _lines([to_json(row)]))

    def add(
        self,
        number: int,
        features: list[dict[str, Any]],
        shown: list[list[Shown]],
        directions: Float[Tensor, "n d_out"],
    ) -> None:
        """The files of a batch: features as SAEDashboard's batches have them, the sequences of
        each, and unit vectors."""
        vectors = directions.double().numpy().round(6).tolist()
        rows = [self._feature(*own) for own in zip(features, shown, vectors, strict=True)]
        sequences = [
            self._activation(feature["feature_index"], i, sequence)
            for feature, own in zip(features, shown, strict=True)
            for i, sequence in enumerate(own)
        ]
        for name, lines in (("features", rows), ("activations", sequences)):
            packed = gzip.compress(_lines(lines), compresslevel=PACKED, mtime=0)
            write_atomic(self.folder / name / f"batch-{number}.jsonl.gz", packed)

    def _heads(self) -> dict[str, dict[str, Any]]:
        """The one row of each of the small files."""
        by = {"creatorId": CREATOR, "createdAt": self.when}
        source, visible = self.source, {"visibility": "PUBLIC"}
        release = f"{source.model}-{source.set}"
        return {
            "release": {
                "name": release,
                "description": release,
                "creatorName": "",
                **by,
                **visible,
            },
            "model": {
                "id": source.model,
                "instruct": source.model.endswith("-it"),
                "displayNameShort": source.model,
                "displayName": source.model,
                "owner": "",
                "updatedAt": self.when,
                **by,
                **visible,
            },
            "sourceset": {
                "modelId": source.model,
                "name": source.set,
                "description": release,
                "creatorName": "",
                "releaseName": release,
                **by,
                **visible,
            },
            "source": {
                "id": source.id,
                "modelId": source.model,
                "setName": source.set,
                "dataset": source.dataset,
                "num_prompts": source.sequences,
                "num_tokens_in_prompt": source.width,
                "hasDashboards": True,
                **by,
                **visible,
            },
        }

    def _feature(self, made: dict[str, Any], shown: list[Shown], vector: list[float]) -> str:
        own = ("feature_index", "vector", "dataset")
        kept = {k: v for k, v in made.items() if k not in own and not k.startswith("n_")}
        return to_json(
            {
                "modelId": self.source.model,
                "layer": self.source.id,
                "index": str(made["feature_index"]),
                "creatorId": CREATOR,
                "createdAt": self.when,
                "sourceSetName": self.source.set,
                "maxActApprox": shown[0].interval.high if shown else 0,
                "hasVector": True,
                "vector": vector,
                "vectorDefaultSteerStrength": STEER,
                "hookName": self.source.hook,
                "topkCosSimIndices": [],
                "topkCosSimValues": [],
                **kept,
            }
        )

    def _activation(self, feature: int, number: int, shown: Shown) -> str:
        name = f"{self.source.model}/{self.source.id}/{feature}/{number}"
        low, high, share = shown.interval.json
        return joined(
            id=f'"c{hashlib.sha256(name.encode()).hexdigest()[:_DIGITS]}"',
            index=f'"{feature}"',
            layer=self._layer,
            modelId=self._model,
            maxValue=repr(shown.best[1]),
            maxValueTokenIndex=repr(shown.best[0]),
            minValue=repr(shown.least),
            creatorId=f'"{CREATOR}"',
            createdAt=self._when,
            dfaValues="[]",
            dfaTargetIndex="null",
            dfaMaxValue="null",
            lossValues="[]",
            binMin=low,
            binMax=high,
            binContains=share,
            qualifyingTokenIndex=repr(shown.mark),
            zIndices="null",
            zValues="null",
            tokens=shown.tokens,
            values=shown.values,
        )


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def to_json(value: object) -> str:
    """JSON in as few characters as it takes; ValueError on numbers that JSON does not have."""
    return _ENCODER.encode(value)


def joined(**parts: str) -> str:
    """JSON of an object whose parts are JSON already; the names need no escape."""
    return "{" + ",".join([f'"{name}":{part}' for name, part in parts.items()]) + "}"


def spliced(facts: Mapping[str, Any], **parts: str) -> str:
    """JSON of an object with these facts, at least one, and with parts that are JSON already."""
    return f"{to_json(facts)[:-1]},{joined(**parts)[1:]}"


def in_list(parts: Iterable[str]) -> str:
    """JSON of a list of what is JSON already."""
    return f"[{','.join(parts)}]"


def to_bytes(text: str) -> bytes:
    """UTF-8, with ? for half a character."""
    return text.encode("utf-8", "replace")


def _lines(rows: Iterable[str]) -> bytes:
    return to_bytes("".join(f"{row}\n" for row in rows))
