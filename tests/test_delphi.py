"""delphi's latent cache holds every activation of the scanned tokens, as its loader reads it."""

import json
from pathlib import Path

import pytest
import torch
from planted import CONTEXT, D_SAE, ROWS, SITE, Planted
from safetensors.torch import load_file
from test_neuronpedia import made  # noqa: F401 - the fixture
from torch import Tensor

from sae import formats
from sae.activations import read
from sae.hooks import Hookpoint


def loaded(module: Path) -> tuple[Tensor, Tensor]:
    """[ROWS CONTEXT D_SAE] activations and the tokens, put together as delphi does."""
    acts, tokens = torch.zeros(ROWS, CONTEXT, D_SAE), None
    for file in module.glob("*.safetensors"):
        first, last = map(int, file.stem.split("_"))
        split = load_file(file)
        row, column, feature = split["locations"].long().unbind(1)
        assert ((feature >= 0) & (feature <= last - first)).all()
        acts[row, column, feature + first] = split["activations"].float()
        tokens = split["tokens"]
    assert tokens is not None
    return acts, tokens


@pytest.mark.parametrize("features", [None, [30, 3]])
def test_every_activation(
    made: Planted,  # noqa: F811
    tmp_path: Path,
    features: list[int] | None,
) -> None:
    notes = formats.write("delphi", made.folder, tmp_path / "out", features)
    (module,) = (tmp_path / "out" / "latents").iterdir()
    acts, tokens = loaded(module)
    assert torch.equal(tokens, made.rows.tokens) and "float16" in notes[0]
    point = Hookpoint.parse(SITE)
    wanted = torch.zeros(ROWS, CONTEXT, D_SAE)
    x = read(made.model, [point], made.rows, torch.float32)[0][point]
    wanted[made.rows.kept] = made.sae.encode(x).detach()
    if features is not None:
        wanted[..., [i for i in range(D_SAE) if i not in features]] = 0
    torch.testing.assert_close(acts, wanted, rtol=1e-3, atol=2e-5)
    config = json.loads((module / "config.json").read_text())
    assert config["model_name"] == "tiny" and config["ctx_len"] == CONTEXT
    assert len(list(module.glob("*.safetensors"))) == 5


def test_large_locations_take_four_bytes(
    made: Planted,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sae.formats import delphi

    monkeypatch.setattr(delphi, "NARROW", 2)
    formats.write("delphi", made.folder, tmp_path / "out")
    (module,) = (tmp_path / "out" / "latents").iterdir()
    kinds = {load_file(file)["locations"].dtype for file in module.glob("*.safetensors")}
    assert torch.uint32 in kinds
