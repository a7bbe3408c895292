"""The Hugging Face Hub: fetch and upload folders, and do without it where it does not answer."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sae.errors import RunError


@contextmanager
def cache_only_if_silent(name: str, repo_type: str = "model") -> Iterator[None]:
    """Read from the cache alone while the block runs, if the Hub does not answer.

    By itself its client tries for half a minute and says so eleven times; there is no setting.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(name, repo_type)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(name: str, repo_type: str) -> bool:
    """Whether the Hub says anything at all of a name, if only that there is no such thing."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type=repo_type))
    except (HfHubHTTPError, ValueError):  # ValueError: no name could look like this
        return True
    except Exception:  # of requests, httpx or httpx2, by the version of huggingface_hub
        return False
    return True


def is_name(path: str) -> bool:
    """Whether it could name a repository of the Hub and is no path on this disk."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path, re.ASCII)
    return bool(looks) and not Path(path).exists()


def fetch(
    name: str,
    revision: str | None = None,
    subfolder: str | None = None,
    *,
    wanted: Iterable[str],
) -> Path:
    """A folder with the files of a repository, from the Hub or from its cache.

    `wanted`: patterns of their names, below `subfolder` where that is given. Raises RunError.
    """
    from huggingface_hub import snapshot_download

    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    patterns = [f"{inside}{pattern}" for pattern in wanted]
    try:
        with cache_only_if_silent(name):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub, the cache, the disk: each has errors of its own
        raise RunError(
            f"{name}: no such folder, and as a repository of the Hub it cannot be read:\n"
            f"  {_first_line(error)}"
        ) from None
    found = folder / inside
    if not found.is_dir():
        raise RunError(f"{name} has no {subfolder}; look at its files on the Hub")
    return found


def upload(
    folder: Path, name: str, *, repo_type: str = "model", private: bool = False, message: str
) -> str:
    """Make a repository, if there is none, and put the files of a folder into it in one commit.

    Returns its address. Raises RunError where the Hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(name, repo_type=repo_type, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, repo_type=repo_type, commit_message=message
        )
    except Exception as error:  # of the client, by its version, or of the network below it
        raise RunError(
            f"{name}: the Hub did not take it: {_first_line(error)}\n"
            "  log in with `hf auth login`, and use a name of yours, such as USER/NAME"
        ) from None
    return str(made)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
