"""Do single features stand for single concepts, and does removing a few remove one fact?

    python scripts/study_facts.py [--out docs/figures] [--results checkpoints/facts.json]

Of the 166 concepts of `builtin:facts` (sae.concepts), judged at the token before each answer: the
best single feature, and its controls, neurons, random directions, principal components and an SAE
on the model with random weights. Unit and threshold are chosen on the training split, F1 is that on
held-out text. Then: features removed for one person's sport, and set for another sport. What is in
the results file is not computed again, nor are the SAEs in the folder of that name. Ten minutes
of one core. Writes facts_isolation.png and facts_removal.png.
"""

import argparse
import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import facts_removal
import facts_units as units
import matplotlib.pyplot as plt
import torch
from facts_removal import FEATURES_A_LAYER, STRICTNESS
from kept import Kept

from sae import concepts, hooks, language_model
from sae.autoencoder import SparseAutoencoder
from sae.config import ModelConfig, TrainConfig, resolve
from sae.hooks import Hookpoint
from sae.intervention import Autoencoders
from sae.isolation import bootstrap, isolated
from sae.language_model import LanguageModel

CONFIG = "configs/facts.yaml"
DOCUMENTS = 530
"""Training documents that are read: the text goes through all its sentences once in them."""
EVERYWHERE = 150
"""As many where all tokens of the sentences are judged."""
SEEDS = (1,)
"""Seeds of the SAEs besides 0, which all comparisons are made with."""
FINE = {"sae.prefixes": "[1]", "sae.sparsity.k": "32"}
"""A second SAE at each hookpoint, besides the one of CONFIG: its features are more specific."""

NAMES = {
    "tokens": "120000",
    "sae.d_sae": "2048",
    "sae.prefixes": "[1]",
    "sae.sparsity.kind": "topk",
    "sae.sparsity.k": "8",
}
"""SAEs whose features are removed: at the names in these layers, and FINE before the answers."""
NAME_POINTS = tuple(Hookpoint(f"layers.{layer}.resid_post") for layer in range(3))
ANSWER_POINT = Hookpoint("layers.3.resid_post")


def config(**settings: str) -> TrainConfig:
    """That of the study, with changes."""
    return resolve(CONFIG, settings)


class Isolation:
    """The banks of units, each computed when its row is asked for."""

    def __init__(self, lm: LanguageModel):
        self.lm, self.config = lm, config()
        self.points = hooks.resolve(lm.model, self.config.hookpoints)
        self.listed = concepts.concepts()

    def sides(self, lm: LanguageModel, points: list[Hookpoint]) -> tuple[units.Side, units.Side]:
        """The training and the held-out text, at the tokens before the answers."""
        return (
            units.read(lm, points, lambda text: text.asking, heldout=False, documents=DOCUMENTS),
            units.read(lm, points, lambda text: text.asking, heldout=True),
        )

    @cached_property
    def ours(self) -> tuple[units.Side, units.Side]:
        """Where the features are."""
        return self.sides(self.lm, self.points)

    def features(self, seed: int = 0) -> dict[str, Any]:
        """SAEs on the model."""
        saes = self.trained(self.ours[0], seed)
        return units.score(units.features(*saes), self.ours, self.listed, spread=True)

    def trained(self, side: units.Side, seed: int = 0) -> list[Autoencoders]:
        """The SAEs of both recipes."""
        return [units.train(side.acts, config(seed=str(seed), **more)) for more in ({}, FINE)]

    def neurons(self) -> dict[str, Any]:
        """All the model has."""
        points = hooks.resolve(self.lm.model, ["layers.*.mlp_act"])
        return units.score(units.themselves, self.sides(self.lm, points), self.listed, spread=True)

    def random_directions(self) -> dict[str, Any]:
        """As many as there are features."""
        assert self.config.sae.d_sae is not None
        bank = units.directions(2 * self.config.sae.d_sae)
        return units.score(bank, self.ours, self.listed)

    def principal_components(self) -> dict[str, Any]:
        """All, with both signs."""
        return units.score(units.components(self.ours[0].acts), self.ours, self.listed)

    def random_model(self) -> dict[str, Any]:
        """SAEs of the same recipe on the model with random weights."""
        torch.manual_seed(0)
        model = type(self.lm.model)(copy.deepcopy(self.lm.model.config)).eval()
        found = self.sides(dataclasses.replace(self.lm, model=model), self.points)
        bank = units.features(*self.trained(found[0]))
        return units.score(bank, found, self.listed)

    def probes(self) -> dict[str, Any]:
        """Supervised, so no control but a bound."""
        return units.score(units.probes(self.ours[0], self.listed), self.ours, self.listed)

    def probes_everywhere(self) -> dict[str, Any]:
        """The same from the token that tells a concept to the end of its sentence."""
        both = [
            units.read(self.lm, self.points, lambda text: text.kept, heldout=heldout, documents=n)
            for heldout, n in ((False, EVERYWHERE), (True, None))
        ]
        sides = both[0], both[1]
        return units.score(units.probes(sides[0], self.listed), sides, self.listed)


def study_isolation(lm: LanguageModel, kept: Kept) -> dict[str, dict[str, Any]]:
    """Prints the table; of each bank what `units.score` says."""
    study = Isolation(lm)
    banks = {
        "features": study.features,
        "neurons": study.neurons,
        "random directions": study.random_directions,
        "principal components": study.principal_components,
        "features, random model": study.random_model,
        "supervised probes": study.probes,
    }
    results = {name: kept.of(name, compute) for name, compute in banks.items()}
    print("\nAt the token before the answer\n", *units.table(results, study.listed), sep="\n")
    for seed in SEEDS:
        found = kept.of(f"features, seed {seed}", lambda seed=seed: study.features(seed))
        print(f"features with seed {seed}: isolated {bootstrap(isolated(tensor(found['f1'])))}")
    everywhere = kept.of("probes, everywhere", study.probes_everywhere)
    bound = bootstrap(isolated(tensor(everywhere["f1"])))
    print(f"from where a concept is told to the end of its sentence, probes isolate {bound}")
    for name in ("features", "neurons"):
        spread = tensor(results[name]["spread"])
        print(f"a concept is spread over {spread.median():.1f} {name} (median)")
    return results


class Causes:
    """The SAEs whose features are removed or set."""

    def __init__(self, lm: LanguageModel, folder: Path):
        self.lm, self.folder = lm, folder

    @cached_property
    def saes(self) -> Autoencoders:
        """Those in the folder; what is not there is trained."""
        return {point: self.sae(point) for point in (*NAME_POINTS, ANSWER_POINT)}

    def sae(self, point: Hookpoint) -> SparseAutoencoder:
        """One of them."""
        path = self.folder / str(point)
        if not path.exists():
            last = point == ANSWER_POINT
            side = units.read(
                self.lm, [point], lambda text: text.asking if last else text.naming,
                heldout=False, documents=DOCUMENTS,
            )  # fmt: skip
            more = FINE if last else NAMES
            units.train(side.acts, config(**more))[point].save_pretrained(path)
        return SparseAutoencoder.from_pretrained(path).requires_grad_(False)

    def removal(self, strictness: float) -> dict[str, Any]:
        """What is lost; only now are the SAEs needed."""
        return facts_removal.study_removal(self.lm, self.saes, strictness)


def study_causes(lm: LanguageModel, kept: Kept, folder: Path) -> dict[float, dict[str, Any]]:
    """Prints what is lost and moved; by strictness what `facts_removal.study_removal` says."""
    causes, removals = Causes(lm, folder), {}
    for strictness in STRICTNESS:
        compute = partial(causes.removal, strictness)
        found = removals[strictness] = kept.of(f"removal, strictness {strictness}", compute)
        for who, persons in (("all", found["persons"]), ("fresh", fresh(found["persons"]))):
            print(f"\nRemoved at strictness {strictness}, {len(persons)} persons ({who})\n")
            print(*removal_rows({"persons": persons}), sep="\n")
    rows = kept.of("setting", lambda: {"rows": facts_removal.study_setting(lm, causes.saes)})
    print("\n| set a layer | times the usual | moved | random |\n|---|---|---|---|")
    for row in rows["rows"]:
        moved, aside = (bootstrap(tensor(row[key])) for key in ("moved", "random"))
        print(f"| {row['features']} | {row['gain']:g} | {moved} | {aside} |")
    return removals


def fresh(persons: Sequence[Any]) -> list[Any]:
    """Those on whom no setting was tried while the study was made: two of each four."""
    return [person for index, person in enumerate(persons) if index % 4 > 1]


def removal_rows(removal: Mapping[str, Any]) -> Iterator[str]:
    """The table of one strictness in Markdown: means over persons."""
    keys = ("own", "probability", "random", "others", "same")
    yield f"| a layer | features | {' | '.join(keys)} |"
    yield "|---" * (2 + len(keys)) + "|"
    for n in range(1, FEATURES_A_LAYER + 1):
        cells = [str(bootstrap(column(removal, key, n))) for key in keys]
        yield f"| {n} | {column(removal, 'features', n).mean():.1f} | {' | '.join(cells)} |"


def tensor(values: list[float]) -> torch.Tensor:
    """In double precision."""
    return torch.tensor(values, dtype=torch.float64)


def column(removal: Mapping[str, Any], key: str, n: int) -> torch.Tensor:
    """[persons] a value with n features removed a hookpoint; with none nothing changes."""
    return tensor([person[key][n - 1] if n else 0.0 for person in removal["persons"]])


def draw_isolation(results: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Of each bank the share of concepts with at least so high an F1."""
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name, result in results.items():
        f1 = tensor(result["f1"]).sort().values
        style = "--" if name == "supervised probes" else "-"
        axes.plot(f1, torch.linspace(1, 0, len(f1)), style, lw=1.6, label=name)
    axes.axvline(concepts.ISOLATED, color="0.5", ls=":", lw=1)
    axes.set(xlabel="held-out F1 of the best single unit", ylabel="share of concepts above")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def draw_removal(removal: Mapping[str, Any], file: Path) -> None:
    """Known facts lost against the number of features removed, with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    labels = {
        "own": "the person's fact",
        "same": "others with the same sport",
        "others": "all others",
        "random": "the person's fact, random directions",
    }
    steps = range(FEATURES_A_LAYER + 1)
    for key, label in labels.items():
        lost = [bootstrap(100 * column(removal, key, n)) for n in steps]
        (line,) = axes.plot(steps, [each.mean for each in lost], "o-", ms=4, label=label)
        low, high = ([getattr(each, end) for each in lost] for end in ("low", "high"))
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), lw=0)
    axes.set(xlabel="features removed a layer", ylabel="known facts lost, %", xticks=steps)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=Path("checkpoints/facts.json"), help="kept and reused"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="for the figures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    lm = language_model.load(ModelConfig(), torch.device("cpu"))
    settings = config().model_dump(mode="json", exclude_defaults=True)
    about = {"config": settings, "fine": FINE, "names": NAMES}
    kept = Kept(args.results, about)
    draw_isolation(study_isolation(lm, kept), args.out / "facts_isolation.png")
    removals = study_causes(lm, kept, args.results.with_suffix(""))
    draw_removal(removals[STRICTNESS[0]], args.out / "facts_removal.png")
    print(
        f"\n{time.perf_counter() - start:.0f} s; results in {args.results}, figures in {args.out}"
    )


if __name__ == "__main__":
    main()
