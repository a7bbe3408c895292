"""What a newcomer needs and already has: a small pretrained model and text to read with it.

`builtin:stdlib` is the Python standard library's own source and prose, `builtin:facts` sentences
written from templates and a table of facts, `builtin:` both; as a model, `builtin:` is the small
transformer packed with this package.
"""

from collections.abc import Iterator
from pathlib import Path

from sae.builtin import facts, stdlib
from sae.builtin.document import Document
from sae.errors import DataError, ModelError, suggest

PREFIX = "builtin:"
SOURCES = ("builtin:", "builtin:stdlib", "builtin:facts")


def documents(source: str) -> Iterator[Document]:
    """The documents of a built-in text, in a fixed order.

    Raises:
        DataError: for a name that is not one of SOURCES.
    """
    if source not in SOURCES:
        raise DataError(f"data.source: no built-in text {source!r}{suggest(source, SOURCES)}")
    if source != "builtin:facts":
        yield from stdlib.documents()
    if source != "builtin:stdlib":
        yield from facts.documents()


def model_path(name: str = PREFIX) -> Path:
    """The folder of the bundled model, in the wheel or in a source checkout.

    Raises:
        ModelError: for another name, or when the folder is missing.
    """
    if name != PREFIX:
        raise ModelError(f"model.name: no built-in model {name!r}; there is one, 'builtin:'")
    package = Path(__file__).parent
    for folder in (package / "model", package.parents[1] / "checkpoints" / "builtin"):
        if (folder / "config.json").is_file():
            return folder
    raise ModelError("model.name: the bundled model is missing; reinstall the package")
