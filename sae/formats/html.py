"""HTML: the dictionary as pages to read, from a disk or any web server."""

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
