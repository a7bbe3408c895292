"""An imported SAE is a run: evaluate, features, top, export and verify work on it, and its manifest
says where it came from."""

import json
from pathlib import Path

import pytest
import torch
from test_exchange import (
    PREFIXES,
    ROUTE,
    SIDES,
    VARIANTS,
    exported,
    lens,
    make,
    make_map,
    relu,
    saved,
)
from tiny import CONTEXT, overrides, save

from sae import cli, formats
from sae.autoencoder import SparseAutoencoder
from sae.config import load
from sae.errors import FormatError, HookpointError, RunError
from sae.importing import import_run
from sae.sparsity import TopK
from sae.store import Run, read_manifest, sha256


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run and its export to SAELens."""
    from sae import planning, training
    from sae.config import resolve

    folder = save(tmp_path_factory.mktemp("trained"))
    training.train(planning.plan(resolve(None, overrides(folder))))
    formats.write("saelens", Run(folder / "run").sae(), folder / "lens")
    return folder


def test_an_imported_run_is_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "imported"
    texts = ["--data.source", str(trained / "texts"), "--model.dtype", "float32"]
    assert cli.main(["import", str(trained / "lens"), "--output", str(run), *texts]) == 0
    out = capsys.readouterr().out
    assert "as saelens" in out and f"next: sae evaluate {run}" in out
    for verb in (
        ["verify", str(run)],
        ["evaluate", str(run), "--tokens", "500"],
        ["features", str(run), "--tokens", "500"],
        ["top", str(run)],
        ["export", str(run), "--format", "saelens", "--out", str(trained / "again")],
        ["verify", str(run)],
    ):
        assert cli.main(verb) == 0, verb
    files = [trained / name / "sae_weights.safetensors" for name in ("lens", "again")]
    assert sha256(files[0]) == sha256(files[1])


def test_it_is_the_autoencoder_that_was_trained(trained: Path, tmp_path: Path) -> None:
    found = import_run(trained / "lens", overrides={"output": str(tmp_path / "run")})
    ours, theirs = (
        SparseAutoencoder.from_pretrained(trained / "run"),
        SparseAutoencoder.from_pretrained(tmp_path / "run"),
    )
    assert ours.config() == theirs.config()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor)
    config = load(tmp_path / "run" / "config.yaml")
    assert config.hookpoints == ("layers.1.mlp_act",) and config.data.context == CONTEXT
    assert config.model.name == str(trained / "model") and found.format == "saelens"
    assert config.sae.sparsity.kind == "topk" and config.sae.d_sae == 48


def test_the_manifest_says_where_it_came_from(trained: Path, tmp_path: Path) -> None:
    import_run(trained / "lens", overrides={"output": str(tmp_path / "run")})
    manifest = read_manifest(Run(tmp_path / "run").sae())
    origin = manifest["imported"]
    assert origin["format"] == "saelens" and origin["source"] == str(trained / "lens")
    weights = trained / "lens" / "sae_weights.safetensors"
    assert origin["files"][weights.name] == sha256(weights)
    assert manifest["hookpoint"] == "layers.1.mlp_act"
    assert read_manifest(tmp_path / "run")["imported"] == origin


def test_what_the_files_do_not_say_is_asked_for(tmp_path: Path) -> None:
    metadata = {"sae_lens_version": "6.54.0", "hook_name": "blocks.1.attn.hook_z"}
    source = lens(tmp_path / "lens", make(relu()), metadata=metadata)
    given = {"output": str(tmp_path / "run")}
    with pytest.raises(HookpointError, match=r"hook_z has no name here.*\n.*--hookpoints"):
        import_run(source, overrides=given)
    given |= {"hookpoints": ["layers.1.mlp_act"]}
    with pytest.raises(FormatError, match="give it: --model"):
        import_run(source, overrides=given)
    found = import_run(source, overrides=given | {"model.name": "builtin:"})
    assert list(Run(found.folder).saes()) == ["layers.1.mlp_act"]


def test_a_map_that_does_not_say_its_place_is_given_one(tmp_path: Path) -> None:
    """Such as the transcoders of Gemma Scope 1, which read what is no hookpoint of ours."""
    sae, where = make_map("transcoder", "jumprelu"), "gemma-scope-2b-pt-transcoders/layer_1"
    formats.write("gemma_scope", saved(tmp_path / "theirs", sae, **ROUTE), tmp_path / where)
    (tmp_path / where / "provenance.json").unlink()
    given: dict[str, object] = {"output": str(tmp_path / "run"), "model.name": "builtin:"}
    with pytest.raises(HookpointError, match=r"norm's output without its gain.*\n.*--targets"):
        import_run(tmp_path / where, overrides=given)
    for wrong in ({"inputs": SIDES["inputs"]}, SIDES | {"hookpoints": SIDES["inputs"]}):
        with pytest.raises(FormatError, match="both --inputs and --targets"):
            import_run(tmp_path / where, overrides=given | wrong)
    import_run(tmp_path / where, overrides=given | SIDES)
    (folder,) = Run(tmp_path / "run").saes().values()
    assert folder.name == "layers.1.mlp_in-to-layers.1.mlp_out"
    assert torch.equal(SparseAutoencoder.from_pretrained(folder).W_dec, sae.W_dec)


@pytest.mark.parametrize(
    ("d_out", "places", "why"),
    [
        (5, SIDES, "the residual stream would have the widths 5 and 8"),
        (5, {"hookpoints": SIDES["inputs"]}, "layers.1.mlp_in cannot have"),
        (8, SIDES | {"targets": ["layers.1.mlp_out"] * 2}, "1 side by side, 2 came"),
    ],
)
def test_places_that_contradict_the_widths_are_refused(
    tmp_path: Path, d_out: int, places: dict[str, list[str]], why: str
) -> None:
    source = saved(tmp_path / "theirs", make_map("transcoder", "topk", d_out=d_out), **ROUTE)
    given = {"output": str(tmp_path / "run"), "model.name": "builtin:"}
    with pytest.raises(FormatError, match=r"\ngive --hookpoints, or of a map") as caught:
        import_run(source, overrides=given | places)
    assert why in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_mistakes(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file or folder"):
        import_run(tmp_path / "nothing", overrides={"output": str(tmp_path / "run")})
    with pytest.raises(RunError, match="--output is missing"):
        import_run(trained / "lens")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(RunError, match="already exists"):
        import_run(trained / "lens", overrides={"output": str(tmp_path / "run")})
    with pytest.raises(FormatError, match=r"2 came, but .* holds 1"):
        import_run(
            trained / "lens",
            overrides={"output": str(tmp_path / "new"), "hookpoints": ["layers.1.mlp_act"] * 2},
        )
    assert json.loads((trained / "lens" / "cfg.json").read_text())["k"] == 4


def test_a_matryoshka_keeps_its_prefixes(tmp_path: Path) -> None:
    exported("saelens", "matryoshka", tmp_path)
    import_run(tmp_path / "out", overrides={"output": str(tmp_path / "again")})
    config = load(tmp_path / "again" / "config.yaml")
    assert config.sae.prefixes == tuple(PREFIXES) and config.sae.sparsity.kind == "batchtopk"


@pytest.mark.parametrize(
    ("name", "variant"),
    [("gemma_scope_2", "jumprelu"), ("saelens", "relu_l1"), ("sparsify", "topk")],
)
def test_a_transcoder_of_another_tool_is_a_run(
    tmp_path: Path, name: str, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its two ends and its dense map come along, and the verbs work on it."""
    folder, d = save(tmp_path), 16
    sae = SparseAutoencoder(d, 20, VARIANTS[variant](), d, False, skip=True)
    route = {"model": str(folder / "model"), "data": str(folder / "texts")}
    formats.write(name, saved(tmp_path / "theirs", sae, **ROUTE, **route), tmp_path / "out")
    (tmp_path / "out" / "provenance.json").unlink()
    given = ["--data.source", str(folder / "texts"), "--data.context", str(CONTEXT)]
    source = ["import", str(tmp_path / "out"), "--output", str(tmp_path / "run")]
    assert cli.main([*source, *given]) == 0, capsys.readouterr().err
    config = load(tmp_path / "run" / "config.yaml")
    assert config.inputs == ("layers.1.mlp_in",) and config.targets == ("layers.1.mlp_out",)
    assert config.sae.skip
    for verb in (["verify"], ["evaluate", "--tokens", "300"], ["features", "--tokens", "300"]):
        assert cli.main([verb[0], str(tmp_path / "run"), *verb[1:]]) == 0, verb


def test_a_topk_of_our_own_folder(tmp_path: Path) -> None:
    make(TopK(3)).save_pretrained(tmp_path / "sae", {"hookpoint": "layers.1.mlp_act"})
    given = {"output": str(tmp_path / "run"), "model.name": "builtin:"}
    assert import_run(tmp_path / "sae", overrides=given).format == "safetensors"
