"""HTML: the dictionary as pages to read, from a disk or any web server."""

from collections.abc import Sequence
from pathlib import Path

from sae.browser import static
from sae.browser.pages import Pages
from sae.formats.tables import provenance
from sae.store import features_folder


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> list[str]:
    """Write index.html, its assets and its data to the new folder `out`."""
    pages = Pages(features_folder(sae_folder), features)
    static.write([pages], out, provenance(pages.manifest, features))
    return []


def write_several(sae_folders: Sequence[Path], out: Path) -> None:
    """The same for several dictionaries, which can then be compared."""
    shown = [Pages(features_folder(folder)) for folder in sae_folders]
    sources = [provenance(pages.manifest, None) for pages in shown]
    static.write(shown, out, {"dictionaries": sources})
