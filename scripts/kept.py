"""Results that outlive the process that computed them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae.store import write_atomic


class Kept:
    """Results by key in a JSON file; those found there are not computed again.

    `about` are the settings all of them share: a file made under others is refused, and so is one
    that is none of ours.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        self._data = {"about": about, "results": {}}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # now, not after the first computation
            if path.exists():
                self._data = {key: json.loads(path.read_text())[key] for key in self._data}
        except (OSError, ValueError, TypeError, KeyError) as error:
            sys.exit(f"{path} holds no results of a script, {error!r}; name another file")
        if self._data["about"] != about:
            sys.exit(f"{path} holds other settings, {self._data['about']}; name another file")

    def of(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result named `key`, computed and written down if it is not there."""
        results = self._data["results"]
        if key not in results:
            found = compute()
            if self.path.exists():  # another process may have added to it meanwhile
                results |= json.loads(self.path.read_text())["results"]
            results[key] = found
            write_atomic(self.path, json.dumps(self._data, indent=1))
            shown = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float))
            print(f"{key}: {shown}", flush=True)
        return results[key]
