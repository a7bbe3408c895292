"""A trained run, reopened: evaluate it, scan text for its features, look into a prompt."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae import config as settings
from sae import store
from sae.autoencoder import SparseAutoencoder
from sae.config import TrainConfig
from sae.data import TokenBatch
from sae.errors import RunError
from sae.evaluation import Evaluation, evaluate
from sae.features import ScanSettings, prompt_features, scan
from sae.planning import Inputs, open_inputs, pick_device, pick_dtype
from sae.routes import Route
from sae.store import Run

Progress = Callable[[int], None]


@dataclass(frozen=True)
class OpenRun:
    """A run with its model and text at hand; `folders` holds the chosen SAEs by name.

    That is the hookpoint's, or the folder's where a run has several SAEs of one hookpoint.

    `routes` says what each reads and rebuilds, `changes` how the model and the text are not those
    of the training, if so.
    """

    run: Run
    config: TrainConfig
    inputs: Inputs
    folders: dict[str, Path]
    routes: dict[str, Route]
    changes: list[str]

    def autoencoders(self) -> dict[str, SparseAutoencoder]:
        """The SAEs, for raw activations, on the model's device."""
        return {
            name: SparseAutoencoder.from_pretrained(folder, device=self.inputs.device)
            for name, folder in self.folders.items()
        }

    def rows(self, *, heldout: bool) -> Iterator[TokenBatch]:
        """One pass over the held-out or the training text, for reading (not in training order)."""
        batch = self.config.optim.llm_batch
        if heldout:
            return self.inputs.source.heldout(batch)
        return self.inputs.source.train(batch, repeat=False)


def open_run(path: str | Path, sae: str | None = None, device: str = "auto") -> OpenRun:
    """Open a run and all its SAEs, or the one named `sae`; warns where model or text have changed.

    Raises:
        RunError: no run there, or no such SAE.
        ModelError, DataError: its model or text is gone.
    """
    run = Run(path)
    store.check_files(run.path, run.config_path.name)
    config = settings.load(run.config_path)
    chosen = run.chosen(sae)
    manifests = {folder: store.read_manifest(folder) for folder in chosen}
    routes = {folder: _route(folder, manifests[folder]) for folder in chosen}
    inputs = open_inputs(config, pick_device(device))
    found = (change for manifest in manifests.values() for change in _changes(manifest, inputs))
    changes = list(dict.fromkeys(found))  # once, though every SAE of the run tells the same
    for change in changes:
        warnings.warn(f"{run.path}: {change}", stacklevel=2)
    folders = {_name(folder, route): folder for folder, route in routes.items()}
    along = {name: routes[folder] for name, folder in folders.items()}
    return OpenRun(run, config, inputs, folders, along, changes)


def _name(folder: Path, route: Route) -> str:
    return str(route) if folder.name == store.folder_name(str(route)) else folder.name


def _route(folder: Path, manifest: Mapping[str, Any]) -> Route:
    if not isinstance(manifest.get("hookpoint"), str):
        raise RunError(f"{folder / store.MANIFEST} does not say which hookpoint the SAE is for")
    return Route.parse(folder.name, manifest)


def _changes(manifest: Mapping[str, Any], inputs: Inputs) -> Iterator[str]:
    """How model and text differ from those that an SAE was trained on, as far as it says."""
    model, text = inputs.lm.revision, inputs.source.fingerprint
    if manifest.get("revision", model) not in (model, None):
        yield (
            f"THE MODEL HAS CHANGED since training ({manifest['revision']} then, {model} now): its "
            "activations are not those that the SAE knows"
        )
    if manifest.get("data_fingerprint", text) != text:
        yield (
            f"THE TEXT HAS CHANGED since training (fingerprint {manifest['data_fingerprint']} "
            f"then, {text} now): documents held out now may have been trained on"
        )


def evaluate_run(
    opened: OpenRun,
    *,
    n_tokens: int | None = None,
    ks: tuple[int, ...] = (),
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Evaluate every opened SAE on held-out text and write eval.json beside its weights.

    Raises RunError where another process writes the run.
    """
    with store.locked(opened.run.path):
        found = evaluate(
            opened.inputs.lm.model,
            opened.autoencoders(),
            opened.rows(heldout=True),
            routes=opened.routes,
            n_tokens=n_tokens or opened.config.data.eval_tokens,
            ks=ks,
            baselines=True,
            progress=progress,
        )
        for name, evaluation in found.items():
            folder = opened.folders[name]
            result = {"sae_sha256": store.sha256(folder / store.WEIGHTS)} | _origin(opened)
            result |= {"changes": opened.changes} if opened.changes else {}
            store.write_result(folder, "eval.json", result | evaluation.to_dict())
    return found


def scan_run(
    opened: OpenRun,
    *,
    n_tokens: int,
    scan_settings: ScanSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Scan training text and write the feature dictionary of every opened SAE.

    Raises RunError where another process writes the run.
    """
    with store.locked(opened.run.path):
        return scan(
            opened.inputs.lm.model,
            opened.inputs.lm.tokenizer,
            opened.folders,
            opened.rows(heldout=False),
            n_tokens,
            source=_origin(opened),
            settings=scan_settings,
            dtype=pick_dtype(opened.config.model.dtype, opened.inputs.device),
            progress=progress,
        )


def features_of(
    opened: OpenRun, text: str, k: int = 5
) -> dict[str, list[tuple[str, list[tuple[int, float]]]]]:
    """The `k` strongest features on each token of a text: (piece, [(feature, activation), …])."""
    lm = opened.inputs.lm
    return {
        name: prompt_features(lm.model, lm.tokenizer, sae, opened.routes[name], text, k)
        for name, sae in opened.autoencoders().items()
    }


def _origin(opened: OpenRun) -> dict[str, Any]:
    lm, source = opened.inputs.lm, opened.inputs.source
    return {
        "model": lm.name,
        "revision": lm.revision,
        "data": source.name,
        "data_fingerprint": source.fingerprint,
        "context": opened.config.data.context,
    }
