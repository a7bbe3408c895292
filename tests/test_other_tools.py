"""The last piece of docs/in-other-tools.md does what it says; `make exchange` runs the others."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from sae.autoencoder import SparseAutoencoder
from sae.builtin import model_path
from sae.sparsity import TopK
from sae.store import write_manifest

DOC = Path(__file__).parents[1] / "docs" / "in-other-tools.md"


def piece(heading: str) -> str:
    """The Python of a section, all its blocks in one."""
    section = (
        DOC.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    )
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the doc's paths lead: the bundled model, and an SAE that hears everything."""
    place, d = tmp_path / "checkpoints" / "mine" / "saes" / "layers.2.mlp_out", 128
    sae = SparseAutoencoder(d, 2 * d, TopK(d), subtract_b_dec=False)
    with torch.no_grad():  # relu(x) - relu(-x) = x, of which at most d are active
        for tensor, transposed in ((sae.W_enc, False), (sae.W_dec, True)):
            both = torch.cat([torch.eye(d), -torch.eye(d)], dim=1)
            tensor.copy_(both.T if transposed else both)
    sae.save_pretrained(place, {"hookpoint": "layers.2.mlp_out"})
    write_manifest(place, {"hookpoint": "layers.2.mlp_out"})
    (tmp_path / "checkpoints" / "mine" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "checkpoints" / "builtin").symlink_to(model_path("builtin:"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_replace_in_a_plain_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An exact SAE leaves the model as it is; without its strongest feature it is another."""
    (folder / "piece.py").write_text(piece("transformers"), encoding="utf-8")
    found = runpy.run_path(str(folder / "piece.py"))
    model, batch = found["model"], found["batch"]
    with torch.no_grad():
        plain = model(**batch).logits[0, -1]
    torch.testing.assert_close(found["spliced"], plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["without"], plain, rtol=1e-3, atol=1e-3)
    said = (found["acts"].topk(3).indices.tolist(), plain.topk(3).indices.tolist())
    assert capsys.readouterr().out.split() == f"{said[0]} {said[1]}".split()
