"""All pages as a folder of files, for any web server or none: index.html opens by double click."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae.browser.pages import Pages, script
from sae.store import staged, write_json

ASSETS = Path(__file__).parent / "assets"


def asset_names() -> list[str]:
    """The files of the page code, index.html among them."""
    return sorted(file.name for file in ASSETS.iterdir() if file.is_file())


def write(
    shown: Sequence[Pages],
    out: Path,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda features: None,
) -> None:
    """Write the pages of some dictionaries to the new folder `out`; `facts` join its manifest
    and lie beside the pages as provenance.json.

    `progress` hears the number of features of each part. Raises RunError where `out` is taken.
    """
    with staged(out, extra=facts) as folder:
        (folder / "assets").mkdir()
        for name in asset_names():
            target = folder if name == "index.html" else folder / "assets"
            shutil.copyfile(ASSETS / name, target / name)
        if facts is not None:
            write_json(folder / "provenance.json", dict(facts))
        _put(folder, "index", [pages.about() for pages in shown])
        for number, pages in enumerate(shown):
            for key, value in pages.parts():
                _put(folder, f"{number}/{key}", value)
                if key.startswith("features-"):
                    progress(len(value["pages"]))
            for other, theirs in enumerate(shown):
                if other != number and theirs.comparable(pages):
                    _put(folder, f"{number}/compare-{other}", pages.compare(theirs))


def _put(folder: Path, key: str, value: Any) -> None:
    file = folder / "data" / f"{key}.js"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(script(key, value), encoding="ascii")
