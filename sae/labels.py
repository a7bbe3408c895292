"""What people and machines call features: labels.json of a run, by the weights they are about.

{sae_sha256: {feature: {"text": …, "by": …}}}. A label belongs to weights, not to a name: train
again, and the features are others.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock

from sae.errors import FormatError, RunError
from sae.store import SETTINGS, write_json
from sae.untrusted import read_json

FILE = "labels.json"
PERSON = "person"
LONGEST = 400
"""Characters; longer ones are reasoning, not labels."""
_BYTES = 1 << 28
_NUMBER = re.compile(r"0|[1-9][0-9]{0,10}")
"""A feature, as JSON has it for a key: without zeros in front, and not beyond all dictionaries."""


@dataclass(frozen=True)
class Label:
    """What a feature is called, and who says so: "person", or the name of a machine."""

    text: str
    by: str = PERSON


def run_of(dictionary: Path) -> Path | None:
    """The run that RUN/saes/NAME/features belongs to; None for a dictionary elsewhere."""
    parents = dictionary.absolute().parents
    is_in_run = dictionary.name == "features" and parents[1].name == "saes"
    return parents[2] if is_in_run and (parents[2] / SETTINGS).is_file() else None


def read(run: Path, sae_sha256: str) -> dict[int, Label]:
    """The labels of an SAE's features, {} where there are none; FormatError names a bad file."""
    found = _load(run / FILE).get(sae_sha256, {})
    return {int(feature): Label(**facts) for feature, facts in found.items()}


def write(run: Path, sae_sha256: str, feature: int, label: Label | None) -> None:
    """Give a feature a label, or take it away; RunError for one that is too long."""
    stored = label and _stored(label)
    with _changing(run, sae_sha256) as own:
        own.pop(str(feature), None)
        if stored is not None:
            own[str(feature)] = stored


def add(run: Path, sae_sha256: str, given: Mapping[int, Label]) -> list[int]:
    """Give features labels, but for those that a person has labelled, which are returned."""
    stored = {str(feature): _stored(label) for feature, label in given.items()}
    with _changing(run, sae_sha256) as own:
        kept = {feature for feature in stored if own.get(feature, {}).get("by") == PERSON}
        own.update({feature: facts for feature, facts in stored.items() if feature not in kept})
    return [feature for feature in given if str(feature) in kept]


@contextmanager
def _changing(run: Path, sae_sha256: str) -> Iterator[dict[str, dict[str, str]]]:
    """What the file holds for an SAE, to be changed while no other process writes it."""
    try:
        with filelock.FileLock(run / ".labels.lock", timeout=10):
            labels = _load(run / FILE)
            yield labels.setdefault(sae_sha256, {})
            write_json(run / FILE, labels)
    except filelock.Timeout:
        raise RunError(f"{run / FILE} is being written by another process; try again") from None


def _stored(label: Label) -> dict[str, str]:
    """What the file holds of a label; half a character becomes ?."""
    text = label.text.strip()
    if not 0 < len(text) <= LONGEST:
        raise RunError(f"a label has 1 to {LONGEST} characters; {len(text)} came")
    return {
        name: part.encode(errors="replace").decode()
        for name, part in asdict(Label(text, label.by)).items()
    }


def _load(file: Path) -> dict[str, dict[str, Any]]:
    try:
        labels = read_json(file, _BYTES)
    except FileNotFoundError:
        return {}
    if not isinstance(labels, dict) or not all(map(_is_sound, labels.values())):
        raise FormatError(f"{file} does not hold labels; mend it or remove it")
    return labels


def _is_sound(labels: object) -> bool:
    return isinstance(labels, dict) and all(
        _NUMBER.fullmatch(feature)
        and isinstance(facts, dict)
        and facts.keys() == {"text", "by"}
        and all(isinstance(text, str) for text in facts.values())
        for feature, facts in labels.items()
    )
