"""The Hugging Face Hub, where it does not answer."""

from collections.abc import Iterator
from contextlib import contextmanager


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
