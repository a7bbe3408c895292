"""A run that an older version wrote, kept in tests/data, still loads and gives what it must.

Format 1: manifests without a seal, no fingerprint, `interrupted` in place of `ended`.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae import cli, config, resuming
from sae.autoencoder import SparseAutoencoder
from sae.errors import RunError
from sae.records import FeatureDictionary
from sae.store import Run, read_manifest

OLD = Path(__file__).parent / "data" / "run-format-1"


def test_its_weights_and_features_load() -> None:
    assert read_manifest(OLD)["format"] == 1
    sae, weights = (
        SparseAutoencoder.from_pretrained(OLD),
        load_file(Run(OLD).sae() / "sae.safetensors"),
    )
    x = torch.randn(50, sae.d_in, generator=torch.Generator().manual_seed(0))
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    kept = torch.zeros_like(pre).scatter(1, pre.topk(4).indices, 1) * pre.relu()
    expected = kept @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(sae(x).recon, expected)
    dictionary = FeatureDictionary(Run(OLD).features())
    assert len(dictionary) == sae.d_sae == 8
    assert dictionary.examples(dictionary.sample(1, 0), "top")


def test_its_settings_mean_what_they_meant() -> None:
    settings = config.load(OLD / "config.yaml")
    assert settings.sae.sparsity.kind == "topk" and settings.tokens == 4096
    assert settings.sae.init == "random" and settings.optim.max_norm is None


def test_it_is_complete_and_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(OLD, tmp_path / "run")
    assert resuming.is_complete(run)
    with pytest.raises(RunError, match="the run is complete"):
        resuming.saved_state(run)
    assert cli.main(["top", str(run)]) == 0
    assert cli.main(["export", str(run), "--format", "jsonl", "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert cli.main(["verify", str(run)]) == 0, capsys.readouterr().err
