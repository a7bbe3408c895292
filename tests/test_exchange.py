"""Autoencoders survive the way out and back: every tensor bit for bit, or within 1e-6 where a note
says so; what a format cannot hold is refused by name; damaged files are a short FormatError.

The tables below say what each format holds. Round trips through the real packages are in
scripts/exchange.py.
"""

import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_torch_file import Canary

from sae import formats
from sae.autoencoder import DTYPES, SparseAutoencoder
from sae.errors import FormatError, RunError, SAEError
from sae.formats import npz, torch_file
from sae.formats.foreign import Foreign, by_our_names
from sae.sparsity import BatchTopK, Gated, JumpRelu, ReluL1, Sparsity, TopK
from sae.store import write_atomic, write_manifest

D_IN, D_SAE = 8, 20
FACTS = {"hookpoint": "layers.1.mlp_act", "model": "builtin:", "data": "builtin:"}
RUN = "hookpoints: [layers.1.mlp_act]\ndata: {context: 64}\n"
PREFIXES = [0.25, 1.0]


def relu() -> Sparsity:
    return ReluL1(2.5)


def topk() -> Sparsity:
    return TopK(3)


def batchtopk() -> Sparsity:
    return BatchTopK(3)


VARIANTS: dict[str, Callable[[], Sparsity]] = {
    "relu_l1": relu,
    "topk": topk,
    "batchtopk": batchtopk,
    "matryoshka": batchtopk,
    "jumprelu": lambda: JumpRelu(0.5, 0.7, tanh=2.0, preact_coef=0.1),
    "gated": lambda: Gated(2.5),
}
ALL = set(VARIANTS)
HOLDS = {
    "safetensors": ALL,
    "saelens": ALL,
    "sparsify": {"topk"},
    "dictionary_learning": ALL,
    "openai": {"relu_l1"},
    "openmoss": ALL - {"gated"},
    "gemma_scope": {"jumprelu", "batchtopk", "matryoshka"},
    "gemma_scope_2": {"jumprelu", "batchtopk", "matryoshka"},
}
_JUMPS = {"jumprelu", "batchtopk", "matryoshka"}
MAPS = {
    "transcoder": {
        "safetensors": ALL,
        "saelens": {"relu_l1", *_JUMPS},
        "sparsify": {"topk"},
        "gemma_scope": _JUMPS,
        "gemma_scope_2": _JUMPS,
    },
    "skip transcoder": {
        "safetensors": ALL,
        "saelens": {"relu_l1", *_JUMPS},
        "sparsify": {"topk"},
        "gemma_scope_2": _JUMPS,
    },
    "crosscoder": {"safetensors": ALL},
}
"""Which formats hold which kinds of maps."""
NO_BFLOAT16 = "gemma_scope"
SUBTRACTS = {
    "dictionary_learning": {"jumprelu": False} | dict.fromkeys(ALL - {"jumprelu", "relu_l1"}, True),
    "openai": {"relu_l1": True},
    "openmoss": dict.fromkeys(ALL, False),
    "gemma_scope": dict.fromkeys(ALL, False),
    "gemma_scope_2": dict.fromkeys(ALL, False),
}
"""Where a format fixes whether b_dec is subtracted: the other is folded into b_enc."""
FOLDED = {
    ("saelens", "jumprelu"): "log_threshold",
    ("saelens", "gated"): "b_mag",
    ("dictionary_learning", "jumprelu"): "log_threshold",
    ("dictionary_learning", "gated"): "b_mag",
    ("gemma_scope", "jumprelu"): "log_threshold",
    ("gemma_scope_2", "jumprelu"): "log_threshold",
    ("openmoss", "batchtopk"): "threshold",
    ("openmoss", "matryoshka"): "threshold",
}
"""The tensor that comes back within 1e-6 and not bit for bit."""
OPTIONAL = {"sparsify": "config.json", "safetensors": "fingerprint.safetensors"}
"""What may be missing."""


def make(
    sparsity: Sparsity,
    *,
    subtract: bool = True,
    d_out: int = D_IN,
    dtype: torch.dtype = torch.float32,
) -> SparseAutoencoder:
    """Random weights, none of them zero."""
    sae = SparseAutoencoder(D_IN, D_SAE, sparsity, d_out, subtract, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in sae.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for name, tensor in sae.tensors().items():
            if name in ("log_threshold", "r_mag"):
                tensor.mul_(0.3)
            if name == "threshold":
                tensor.fill_(0.3)
    return sae


def saved(run: Path, sae: SparseAutoencoder, settings: str = "", **facts: Any) -> Path:
    """The SAE's folder in a run."""
    folder = run / "saes" / "layers.1.mlp_act"
    known = {**FACTS, **facts}
    sae.save_pretrained(folder, known)
    write_manifest(folder, known)
    write_atomic(run / "config.yaml", RUN + settings)
    return folder


def exported(
    name: str, variant: str, tmp_path: Path, sae: SparseAutoencoder | None = None
) -> list[str]:
    """Write a variant to tmp_path / "out"; returns the notes."""
    settings = f"sae: {{prefixes: {PREFIXES}}}" if variant == "matryoshka" else ""
    folder = saved(tmp_path / "run", sae or make(VARIANTS[variant]()), settings)
    return formats.write(name, folder, tmp_path / "out")


def there_and_back(
    name: str, variant: str, tmp_path: Path, sae: SparseAutoencoder
) -> tuple[Foreign, list[str]]:
    notes = exported(name, variant, tmp_path, sae)
    found_name, (found,) = formats.read(tmp_path / "out", trusted=True)
    assert found_name == name
    return found, notes


PAIRS = [(name, variant) for name, held in HOLDS.items() for variant in sorted(held)]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads .pt files without starting a process each time."""

    def read(file: Path, *, trusted: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        assert trusted
        state = torch.load(file, weights_only=True)
        tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
        return tensors, {name: value for name, value in state.items() if name not in tensors}

    monkeypatch.setattr(torch_file, "read", read)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "variant"), PAIRS)
@pytest.mark.usefixtures("in_this_process")
def test_every_tensor_comes_back(
    tmp_path: Path, name: str, variant: str, dtype: str, subtract: bool
) -> None:
    sae = make(VARIANTS[variant](), subtract=subtract, dtype=DTYPES[dtype])
    if (name, dtype) == (NO_BFLOAT16, "bfloat16"):
        with pytest.raises(FormatError, match="gemma_scope cannot hold bfloat16"):
            exported(name, variant, tmp_path, sae)
        return
    found, notes = there_and_back(name, variant, tmp_path, sae)
    moved = SUBTRACTS.get(name, {}).get(variant, subtract) != subtract
    tensor_of, close = FOLDED.get((name, variant)), max(1e-6, 8 * torch.finfo(DTYPES[dtype]).eps)
    assert moved or tensor_of or not any("not bit for bit" in note for note in notes)
    assert found.sae.config() == sae.config() | ({"subtract_b_dec": not subtract} if moved else {})
    theirs, differing = found.sae.tensors(), set()
    for tensor_name, tensor in sae.tensors().items():
        if tensor_name == tensor_of and not moved:
            torch.testing.assert_close(theirs[tensor_name], tensor, rtol=close, atol=close)
        if not torch.equal(theirs[tensor_name], tensor):
            differing.add(tensor_name)
    assert differing <= {tensor_of, "b_enc" if moved else None}
    assert not differing or any("not bit for bit" in note for note in notes)
    if dtype == "float32":
        x = torch.randn(100, D_IN, generator=torch.Generator().manual_seed(2))
        for ours, again in zip(sae(x)[1:], found.sae(x)[1:], strict=True):
            torch.testing.assert_close(again, ours, rtol=1e-6, atol=1e-5 if differing else 0)
    facts = FACTS | {"context": 64} | ({"prefixes": PREFIXES} if variant == "matryoshka" else {})
    assert {key: found.facts.get(key) for key in facts} == facts


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", HOLDS)
def test_what_cannot_be_held_is_refused(tmp_path: Path, name: str, variant: str) -> None:
    if variant in HOLDS[name]:
        return
    kind = VARIANTS[variant]().kind
    wanted = f"--format {name} cannot hold a {kind} autoencoder"
    with pytest.raises(FormatError, match=wanted) as caught:
        exported(name, variant, tmp_path)
    assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "out").exists()
    assert variant in HOLDS[advised(caught.value)]


def advised(error: FormatError) -> str:
    """The format that a refusal tells to use instead."""
    return str(error).rpartition("use --format ")[2]


SIDES = {"inputs": ["layers.1.mlp_in"], "targets": ["layers.1.mlp_out"]}
ROUTE = {"hookpoint": "layers.1.mlp_in-to-layers.1.mlp_out", **SIDES}
LAYERS = ["layers.0.mlp_out", "layers.1.mlp_out"]
ROUTES = dict.fromkeys(("transcoder", "skip transcoder"), ROUTE) | {
    "crosscoder": {"hookpoint": "layers.0-1.mlp_out", "inputs": LAYERS, "targets": LAYERS}
}


def make_map(shape: str, variant: str, *, d_out: int = D_IN) -> SparseAutoencoder:
    """Random weights of a map; a crosscoder's two hookpoints are half as wide each."""
    sae = SparseAutoencoder(
        *(D_IN, D_SAE, VARIANTS[variant](), d_out, False),
        skip=shape == "skip transcoder",
        sites=[D_IN // 2] * 2 if shape == "crosscoder" else None,
    )
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, tensor in sae.tensors().items():
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn.abs() if name == "threshold" else 0.3 * drawn)
    return sae


EVERY_MAP = [(shape, name, variant) for shape in MAPS for name in HOLDS for variant in VARIANTS]


@pytest.mark.parametrize(("shape", "name", "variant"), EVERY_MAP)
def test_every_map_comes_back_or_is_refused(
    tmp_path: Path, shape: str, name: str, variant: str
) -> None:
    """Each pair of architecture and format, with the place it has; the files alone tell it too."""
    sae = make_map(shape, variant)
    prefixes = f"sae: {{prefixes: {PREFIXES}}}" if variant == "matryoshka" else ""
    folder = saved(tmp_path / "run", sae, prefixes, **ROUTES[shape])
    if variant not in MAPS[shape].get(name, ()):
        with pytest.raises(FormatError, match=f"--format {name} cannot hold") as caught:
            formats.write(name, folder, tmp_path / "out")
        assert len(str(caught.value).splitlines()) <= 3 and not (tmp_path / "out").exists()
        instead = advised(caught.value)
        holds = {name for name, held in MAPS[shape].items() if variant in held}
        assert instead in (holds - {"safetensors"} or holds)  # another tool's where there is one
        return
    notes = formats.write(name, folder, tmp_path / "out")
    (found,) = formats.read(tmp_path / "out")[1]
    assert found.sae.config() == sae.config()
    moved = {n for n, t in sae.tensors().items() if not torch.equal(found.sae.tensors()[n], t)}
    assert moved <= {FOLDED.get((name, variant))}
    assert not moved or any("not bit for bit" in note for note in notes)
    for tensor in moved:
        torch.testing.assert_close(found.sae.tensors()[tensor], sae.tensors()[tensor])
    assert {key: found.facts[key] for key in ROUTE} == ROUTES[shape]


@pytest.mark.parametrize(
    ("name", "variant"), [pair for pair in PAIRS if pair[1] not in ("topk", "matryoshka")]
)
@pytest.mark.usefixtures("in_this_process")
def test_some_features_alone(tmp_path: Path, name: str, variant: str) -> None:
    sae = make(VARIANTS[variant]())
    formats.write(name, saved(tmp_path / "run", sae), tmp_path / "out", [7, 2])
    found = formats.read(tmp_path / "out", trusted=True)[1][0].sae
    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.encode(x), sae.encode(x)[:, [7, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("name", ["saelens", "dictionary_learning"])
def test_batchtopk_is_known_without_provenance(tmp_path: Path, name: str, variant: str) -> None:
    """Their own files tell k and prefixes too."""
    sae = make(batchtopk())
    exported(name, variant, tmp_path, sae)
    (tmp_path / "out" / "provenance.json").unlink()
    (found,) = formats.read(tmp_path / "out", trusted=True)[1]
    assert found.sae.config() == sae.config()
    assert torch.equal(found.sae.tensors()["threshold"], sae.tensors()["threshold"])
    assert found.facts.get("prefixes") == (PREFIXES if variant == "matryoshka" else None)


def test_jumprelu_is_what_their_batchtopk_stays_where_k_is_not_known(tmp_path: Path) -> None:
    sae = make(batchtopk())
    exported("openmoss", "batchtopk", tmp_path, sae)
    (tmp_path / "out" / "provenance.json").unlink()
    (found,) = formats.read(tmp_path / "out")[1]
    x = torch.randn(100, D_IN, generator=torch.Generator().manual_seed(4))
    assert found.kind == "jumprelu"
    torch.testing.assert_close(found.sae.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)


def test_without_provenance_the_files_say_where_it_belongs(tmp_path: Path) -> None:
    exported("saelens", "relu_l1", tmp_path)
    (tmp_path / "out" / "provenance.json").unlink()
    found = formats.read(tmp_path / "out", trusted=True)[1][0]
    assert found.facts["hookpoint"] == FACTS["hookpoint"]
    assert found.facts["context"] == 64 and found.facts["model"] == "builtin:"
    assert found.sae.sparsity.config() == {"l1": 0.0}  # no place for it


def test_provenance_of_other_weights_is_not_believed(tmp_path: Path) -> None:
    exported("saelens", "relu_l1", tmp_path)
    file = tmp_path / "out" / "sae_weights.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, file)
    assert formats.read(tmp_path / "out", trusted=True)[1][0].sae.sparsity.config() == {"l1": 0.0}


# SAELens


def lens(folder: Path, sae: SparseAutoencoder, **changes: Any) -> Path:
    """A folder as SAELens writes it, None leaves a key out."""
    cfg = {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.1.mlp.hook_post"},
    } | changes
    folder.mkdir(exist_ok=True)
    text = json.dumps({key: value for key, value in cfg.items() if value is not None})
    (folder / "cfg.json").write_text(text)
    save_file(dict(sae.state_dict()), folder / "sae_weights.safetensors")
    return folder


def test_rescaled_topk_is_folded(tmp_path: Path) -> None:
    sae = make(topk())
    lens(tmp_path, sae, architecture="topk", k=3, rescale_acts_by_decoder_norm=True)
    (found,) = formats.read(tmp_path)[1]
    x = torch.randn(100, D_IN)
    norms = sae.decoder_norms
    acts = topk()(sae.pre(x) * norms)  # as SAELens does
    torch.testing.assert_close(found.sae.encode(x), acts)
    torch.testing.assert_close(found.sae(x).recon, sae.decode(acts / norms))
    assert "not bit for bit" in found.notes[0]


def test_names_that_mean_something_else_are_told(tmp_path: Path) -> None:
    names = {
        "blocks.1.hook_resid_post": "layers.1.resid_post",
        "transformer.h.1.mlp.act": "layers.1.mlp_act",
        "blocks.1.attn.hook_z": None,
    }
    for name, ours in names.items():
        lens(tmp_path, make(relu()), metadata={"hook_name": name})
        found = formats.read(tmp_path)[1][0]
        assert found.facts.get("hookpoint") == ours
        assert bool(found.notes) == (ours is None)
    processed = {"hook_name": "blocks.1.hook_resid_post"}
    processed |= {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    lens(tmp_path, make(relu()), metadata=processed)
    assert "exact without weight processing" in formats.read(tmp_path)[1][0].notes[0]


def test_files_before_version_6(tmp_path: Path) -> None:
    old = {"hook_point": "blocks.1.mlp.hook_post", "model_name": "gpt2", "context_size": 128}
    old |= {"activation_fn": "topk", "activation_fn_kwargs": {"k": 3}}
    lens(tmp_path, make(topk()), architecture=None, metadata=None, **old)
    (found,) = formats.read(tmp_path)[1]
    assert found.sae.sparsity.config() == {"k": 3}
    assert found.facts == {"model": "gpt2", "context": 128, "hookpoint": "layers.1.mlp_act"}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' is not known"),
        ({"dtype": None}, "dtype None: expected float32"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        (
            {"normalize_activations": "layer_norm"},
            "normalize_activations 'layer_norm': only 'none'",
        ),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"architecture": "topk"}, "k None: expected a whole number"),
        ({"architecture": "topk", "k": 99}, "only 20 features"),
        ({"d_in": 9}, "says d_in 9"),
        ({"d_sae": "many"}, "d_sae 'many'"),
        ({"apply_b_dec_to_input": "yes"}, "expected true or false"),
        ({"metadata": [1]}, "metadata .*expected an object"),
    ],
)
def test_saelens_mistakes(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    lens(tmp_path, make(relu()), **changes)
    with pytest.raises(FormatError, match=wanted) as caught:
        formats.read(tmp_path)
    assert len(str(caught.value).splitlines()) <= 3


def check_map_comes_back(sae: SparseAutoencoder, out: Path) -> None:
    """The files alone, without our own provenance, give the same map bit for bit."""
    (out / "provenance.json").unlink()
    (found,) = formats.read(out)[1]
    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(7))
    for ours, again in zip(sae(x)[1:], found.sae(x)[1:], strict=True):
        assert torch.equal(again, ours)
    assert {name: found.facts[name] for name in ROUTE} == ROUTE


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("variant", "architecture"), [("relu_l1", "transcoder"), ("jumprelu", "jumprelu_transcoder")]
)
def test_transcoders_go_to_saelens(
    tmp_path: Path, variant: str, architecture: str, skip: bool
) -> None:
    """With their two hookpoints, W_skip turned round, and as they were without provenance."""
    sae = make_map("skip transcoder" if skip else "transcoder", variant, d_out=5)
    formats.write("saelens", saved(tmp_path / "run", sae, **ROUTE), tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    theirs = architecture.replace("transcoder", "skip_transcoder") if skip else architecture
    assert (cfg["architecture"], cfg["d_out"], cfg["apply_b_dec_to_input"]) == (theirs, 5, False)
    assert cfg["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    if skip:
        stored = load_file(tmp_path / "out" / "sae_weights.safetensors")["W_skip"]
        assert stored.shape == (5, D_IN)
    check_map_comes_back(sae, tmp_path / "out")


# sparsify


def coder(folder: Path, sae: SparseAutoencoder, **changes: Any) -> Path:
    """A folder as sparsify writes it."""
    cfg = {"activation": "topk", "k": 3, "d_in": D_IN, "num_latents": D_SAE} | changes
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    tensors = dict(sae.state_dict())
    tensors["encoder.weight"] = tensors.pop("W_enc").T.contiguous()
    tensors["encoder.bias"] = tensors.pop("b_enc")
    save_file(tensors, folder / "sae.safetensors")
    return folder


def test_a_folder_of_coders(tmp_path: Path) -> None:
    """Each is named by its module; the run's config.json tells the model."""
    sae = make(topk())
    for name in ("layers.0", "layers.1.mlp"):
        coder(tmp_path / name, sae)
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    name, found = formats.read(tmp_path)
    assert name == "sparsify"
    points = ["layers.0.resid_post", "layers.1.mlp_out"]
    assert [foreign.facts["hookpoint"] for foreign in found] == points
    assert {foreign.facts["model"] for foreign in found} == {"EleutherAI/pythia-70m"}
    for foreign in found:
        assert all(torch.equal(t, sae.state_dict()[n]) for n, t in foreign.sae.state_dict().items())


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_go_to_sparsify(tmp_path: Path, skip: bool) -> None:
    """A module's input to its output; W_skip turned round; the folder and cfg tell it all."""
    sae = make_map("skip transcoder" if skip else "transcoder", "topk")
    formats.write("sparsify", saved(tmp_path / "run", sae, **ROUTE), tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "h.1.mlp" / "cfg.json").read_text())
    assert cfg["transcode"] and cfg["skip_connection"] == skip
    check_map_comes_back(sae, tmp_path / "out")


def test_maps_that_sparsify_has_not_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", make_map("transcoder", "topk", d_out=5), **ROUTE)
    with pytest.raises(FormatError, match="cannot hold a map from width 8 to 5"):
        formats.write("sparsify", folder, tmp_path / "out")
    across = {**ROUTE, "targets": ["layers.2.mlp_out"]}
    sae = make_map("transcoder", "topk")
    with pytest.raises(FormatError, match="is no module's input and output") as caught:
        formats.write("sparsify", saved(tmp_path / "other", sae, **across), tmp_path / "out")
    assert advised(caught.value) == "safetensors"


def test_what_reads_two_hookpoints_is_for_no_other_tool(tmp_path: Path) -> None:
    route: dict[str, Any] = {**ROUTE, "inputs": ["layers.0.mlp_in", "layers.1.mlp_in"]}
    folder = saved(tmp_path / "run", make_map("transcoder", "relu_l1"), **route)
    for name in HOLDS.keys() - {"safetensors", "sparsify"}:
        with pytest.raises(FormatError) as caught:
            formats.write(name, folder, tmp_path / "out")
        assert advised(caught.value) == "safetensors"


def test_what_is_no_matrix_is_not_turned() -> None:
    """A file may hold anything by the name of a matrix: it stays, for its shape to be refused."""
    theirs = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3, 4), "more": torch.zeros(1)}
    ours = by_our_names(theirs, {"a": "W_enc", "b": "W_dec"}, ("a", "b"))
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    assert shapes == {"W_enc": (3, 2), "W_dec": (2, 3, 4)}


def test_sparsify_names_the_module(tmp_path: Path) -> None:
    """The bundled model is a GPT-2, whose neurons are a module's output; another's may not be."""
    formats.write("sparsify", saved(tmp_path / "run", make(topk())), tmp_path / "out")
    assert (tmp_path / "out" / "h.1.mlp.act" / "cfg.json").is_file()
    folder = saved(tmp_path / "other", make(topk()), model="nobody/knows")
    (note,) = formats.write("sparsify", folder, tmp_path / "else")
    assert "in our words" in note
    assert (tmp_path / "else" / "layers.1.mlp_act" / "cfg.json").is_file()
    assert formats.read(tmp_path / "else")[1][0].facts["hookpoint"] == "layers.1.mlp_act"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"activation": "groupmax"}, "activation 'groupmax': only topk"),
        ({"d_in": 9}, "says d_in 9"),
        ({"k": 0}, "k 0: expected a whole number"),
        ({"transcode": 1}, "expected true or false"),
    ],
)
def test_sparsify_mistakes(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(FormatError, match=wanted):
        formats.read(coder(tmp_path / "layers.0", make(topk()), **changes))


# OpenMOSS


def moss(folder: Path, sae: SparseAutoencoder, norms: dict[str, float], **changes: Any) -> Path:
    """A folder as OpenMOSS writes it."""
    config = {"sae_type": "sae", "d_model": D_IN, "act_fn": "topk", "top_k": 3} | changes
    config |= {
        "hook_point_in": "blocks.1.mlp.hook_post",
        "hook_point_out": "blocks.1.mlp.hook_post",
    }
    names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
    names["log_threshold"] = "activation_function.log_jumprelu_threshold"
    tensors = {names[name]: tensor for name, tensor in sae.tensors().items()}
    for name, norm in norms.items():
        tensors[f"dataset_average_activation_norm.{name}"] = torch.tensor(norm)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize("names", [["in", "out"], ["blocks.1.mlp.hook_post"]])
def test_openmoss_norms_are_folded(tmp_path: Path, names: list[str]) -> None:
    """As its code computes: inputs times √d / norm, top-k over decoder norms, outputs back."""
    sae = make(topk(), subtract=False)
    norms = {name: 3.0 + i for i, name in enumerate(names)}
    moss(tmp_path, sae, norms, norm_activation="dataset-wise")
    (found,) = formats.read(tmp_path)[1]
    x = torch.randn(100, D_IN)
    scale_in, scale_out = (D_IN**0.5 / norms[names[i]] for i in (0, -1))
    hidden = sae.pre(x * scale_in) * sae.decoder_norms
    recon = sae.decode(topk()(hidden) / sae.decoder_norms) / scale_out
    torch.testing.assert_close(found.sae(x).recon, recon, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sae.encode(x), topk()(hidden), rtol=1e-5, atol=1e-5)
    assert len(found.notes) == 2 and found.facts == {"hookpoint": "layers.1.mlp_act"}


def test_openmoss_thresholds_are_over_decoder_norms(tmp_path: Path) -> None:
    """As its code computes: pre times the decoder's norm is compared, and divided again."""
    sae = make(VARIANTS["jumprelu"](), subtract=False)
    moss(tmp_path, sae, {}, act_fn="jumprelu", norm_activation="inference")
    (found,) = formats.read(tmp_path)[1]
    x = torch.randn(100, D_IN, generator=torch.Generator().manual_seed(5))
    scaled = sae.pre(x) * sae.decoder_norms
    acts = scaled * (scaled > sae.tensors()["log_threshold"].exp()) / sae.decoder_norms
    torch.testing.assert_close(found.sae.encode(x), acts)
    assert found.kind == "jumprelu" and "folded into the thresholds" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"act_fn": "batchtopk"}, "act_fn 'batchtopk' cannot be read"),
        ({"sae_type": "crosscoder"}, "sae_type 'crosscoder'"),
        ({"norm_activation": "token-wise"}, "norm_activation 'token-wise'"),
        ({"norm_activation": "dataset-wise"}, "is no positive number"),
        ({"norm_activation": "inference", "d_model": 9}, "says d_model 9"),
        ({"norm_activation": "inference", "use_glu_encoder": True}, "use_glu_encoder"),
    ],
)
def test_openmoss_mistakes(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(FormatError, match=wanted):
        formats.read(moss(tmp_path, make(topk()), {}, **changes))


# Gemma Scope


REPOSITORY = "models--google--gemma-scope-2b-pt-res/snapshots/abc/layer_20/width_16k/average_l0_71"


def scope(folder: Path, sae: SparseAutoencoder, **others: torch.Tensor) -> Path:
    """params.npz as Gemma Scope has it."""
    tensors = sae.tensors()
    tensors["threshold"] = tensors.pop("log_threshold").exp()
    folder.mkdir(parents=True)
    npz.write(folder / "params.npz", tensors | others)
    return folder


def test_gemma_scope_is_named_by_its_folders(tmp_path: Path) -> None:
    sae = make(VARIANTS["jumprelu"](), subtract=False)
    for name, facts in {
        REPOSITORY: {"model": "google/gemma-2-2b", "hookpoint": "layers.20.resid_post"},
        REPOSITORY.replace("2b-pt-res", "9b-it-mlp"): {
            "model": "google/gemma-2-9b-it",
            "hookpoint": "layers.20.mlp_out",
        },
        REPOSITORY.replace("res", "att"): {"model": "google/gemma-2-2b"},
        REPOSITORY.replace("res", "transcoders"): {"model": "google/gemma-2-2b"},
        "elsewhere": {},
    }.items():
        (found,) = formats.read(scope(tmp_path / name, sae))[1]
        assert found.facts == facts and bool(found.notes) == (len(facts) < 2)
        x = torch.randn(20, D_IN)
        assert torch.equal(found.sae.encode(x), sae.encode(x))


def test_gemma_scope_transcoders_have_small_letters(tmp_path: Path) -> None:
    sae = make(VARIANTS["jumprelu"](), subtract=False)
    file = scope(tmp_path / "a", sae, scaling_factor=torch.ones(D_SAE)) / "params.npz"
    npz.write(file, {name.lower(): tensor for name, tensor in npz.read(file).items()})
    assert torch.equal(formats.read(file)[1][0].sae.W_dec, sae.W_dec)
    with pytest.raises(FormatError, match="scaling_factor"):
        formats.read(scope(tmp_path / "b", sae, scaling_factor=torch.full((D_SAE,), 2.0)))


def test_gemma_scope_2_names_the_module(tmp_path: Path) -> None:
    exported("gemma_scope_2", "jumprelu", tmp_path)
    out = tmp_path / "out"
    (out / "provenance.json").unlink()
    for said, module, facts in [
        ("gemma-v3-1b-pt", "model.layers.7.output", ("google/gemma-3-1b-pt", "resid_post")),
        ("gemma-3-270m-pt", "model.layers.7.output", ("google/gemma-3-270m", "resid_post")),
        (
            "google/gemma-3-4b-it",
            "model.layers.7.post_feedforward_layernorm.output",
            ("google/gemma-3-4b-it", "mlp_out"),
        ),
    ]:
        config = {"architecture": "jump_relu", "model_name": said, "hf_hook_point_in": module}
        (out / "config.json").write_text(json.dumps(config))
        (found,) = formats.read(out)[1]
        assert found.facts == {"model": facts[0], "hookpoint": f"layers.7.{facts[1]}"}


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_go_to_gemma_scope_2(tmp_path: Path, skip: bool) -> None:
    """W_skip is [d_in d_out] there; the modules of a Gemma 3 are its two ends."""
    sae = make_map("skip transcoder" if skip else "transcoder", "jumprelu", d_out=5)
    formats.write("gemma_scope_2", saved(tmp_path / "run", sae, **ROUTE), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    assert config["affine_connection"] == skip
    stored = load_file(tmp_path / "out" / "params.safetensors")
    assert not skip or torch.equal(stored["affine_skip_connection"], sae.tensors()["W_skip"])
    (tmp_path / "out" / "provenance.json").unlink()
    ends = [f"model.layers.7.{side}_feedforward_layernorm.output" for side in ("pre", "post")]
    config |= dict(zip(("hf_hook_point_in", "hf_hook_point_out"), ends, strict=True))
    file.write_text(json.dumps(config | {"model_name": "gemma-v3-1b-pt"}))
    (found,) = formats.read(tmp_path / "out")[1]
    assert str(found.route) == "layers.7.mlp_in-to-layers.7.mlp_out"
    assert torch.equal(found.sae.W_dec, sae.W_dec)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"architecture": "topk"}, "architecture 'topk': expected jump_relu"),
        ({"affine_connection": True}, "missing affine_skip_connection"),
        ({"affine_connection": "yes"}, "expected true or false"),
        ({"hf_hook_point_in": ["a"]}, "expected text"),
    ],
)
def test_gemma_scope_2_mistakes(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    exported("gemma_scope_2", "jumprelu", tmp_path)
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.7.output"} | changes
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=wanted):
        formats.read(tmp_path / "out")


# All formats


@pytest.mark.parametrize("name", formats.UNSAFE)
def test_pickles_are_read_in_a_process_of_their_own(tmp_path: Path, name: str) -> None:
    sae = make(relu())
    found, _ = there_and_back(name, "relu_l1", tmp_path, sae)
    assert all(torch.equal(found.sae.tensors()[n], tensor) for n, tensor in sae.tensors().items())


PLAIN = [(name, max(held - {"matryoshka"})) for name, held in HOLDS.items()]
DAMAGED = [*PLAIN, ("saelens", "jumprelu"), ("saelens", "gated"), ("openmoss", "jumprelu")]


@pytest.mark.parametrize(("name", "variant"), DAMAGED)
def test_damaged_files(tmp_path: Path, name: str, variant: str) -> None:
    """Every file of an export, cut in half, empty or gone, is a short FormatError."""
    exported(name, variant, tmp_path)
    ours = ("manifest.json", "provenance.json")
    files = [f for f in (tmp_path / "out").rglob("*") if f.is_file() and f.name not in ours]
    assert files
    for file in files:
        whole = file.read_bytes()
        contents = [whole[: len(whole) // 2], b"", b"\x80\x04" * 50]
        for content in contents if file.name == OPTIONAL.get(name) else [*contents, None]:
            file.unlink() if content is None else file.write_bytes(content)
            with pytest.raises((FormatError, RunError)) as caught:
                formats.read(tmp_path / "out", name, trusted=True)
            assert len(str(caught.value).splitlines()) <= 3
            file.write_bytes(whole)


SHAPES = [[], [3], [D_SAE, 2], [0]]


@pytest.mark.parametrize("variant", ["jumprelu", "gated", "batchtopk", "topk"])
@pytest.mark.parametrize(
    "name", ["safetensors", "saelens", "sparsify", "openmoss", "gemma_scope", "gemma_scope_2"]
)
def test_tensors_of_another_shape(tmp_path: Path, name: str, variant: str) -> None:
    """One tensor at a time, of fewer or more dimensions, or of whole numbers."""
    if variant not in HOLDS[name]:
        return
    exported(name, variant, tmp_path)
    (tmp_path / "out" / "manifest.json").unlink()  # which would tell of any change
    if name == "gemma_scope":
        file, read, write = tmp_path / "out" / "params.npz", npz.read, npz.write
    else:
        (file,) = (tmp_path / "out").rglob("*[!t].safetensors")
        read, write = load_file, lambda file, tensors: save_file(tensors, file)
    whole = read(file)
    for tensor in whole:
        for shape in SHAPES:
            if list(whole[tensor].shape) == shape:
                continue
            write(file, {**whole, tensor: torch.ones(shape)})
            with pytest.raises(FormatError) as caught:
                formats.read(tmp_path / "out", name)
            assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("variant", ["jumprelu", "gated", "batchtopk", "matryoshka"])
@pytest.mark.usefixtures("in_this_process")
def test_pickled_tensors_of_another_shape(tmp_path: Path, variant: str) -> None:
    exported("dictionary_learning", variant, tmp_path)
    file = tmp_path / "out" / "ae.pt"
    whole, _ = torch_file.read(file, trusted=True)
    for tensor in whole:
        torch_file.write(file, {**whole, tensor: torch.ones(3, 2)})
        with pytest.raises(FormatError) as caught:
            formats.read(tmp_path / "out", trusted=True)
        assert len(str(caught.value).splitlines()) <= 3


HOSTILE: list[Any] = [None, -1, 10**30, 1.5, "\u202ex" * 500, [], {}, [[]], {"a": {}}, True]


@pytest.mark.parametrize(("name", "variant"), DAMAGED)
@pytest.mark.usefixtures("in_this_process")
def test_settings_of_another_kind(tmp_path: Path, name: str, variant: str) -> None:
    """Whatever stands in a JSON file of an export: it is read, or refused in three short lines."""
    exported(name, variant, tmp_path)
    for file in (tmp_path / "out").rglob("*.json"):
        whole = json.loads(file.read_text())
        for key in whole:
            for value in HOSTILE:
                file.write_text(json.dumps(whole | {key: value}))
                read_or_refuse(tmp_path / "out", name)
        file.write_text(json.dumps(whole))


def read_or_refuse(out: Path, name: str) -> None:
    """Read an export; an error has three lines at most, and nothing but ours is raised."""
    try:
        formats.read(out, name, trusted=True)
    except SAEError as error:
        assert len(str(error).splitlines()) <= 3


@pytest.mark.parametrize(
    ("name", "variant"), [pair for pair in DAMAGED if pair[0] not in formats.UNSAFE]
)
def test_flipped_bytes(tmp_path: Path, name: str, variant: str) -> None:
    """Eight bytes of every file changed, twenty times: it is read, or refused in three lines."""
    exported(name, variant, tmp_path)
    generator = torch.Generator().manual_seed(0)
    for file in [f for f in (tmp_path / "out").rglob("*") if f.is_file()]:
        whole = file.read_bytes()
        for turn in range(20):
            reach = min(len(whole), 400) if turn % 2 else len(whole)  # half of them in the header
            content = bytearray(whole)
            for at in torch.randint(reach, (8,), generator=generator).tolist():
                content[at] ^= 1 << int(torch.randint(8, (), generator=generator))
            file.write_bytes(content)
            read_or_refuse(tmp_path / "out", name)
        file.write_bytes(whole)


@pytest.mark.parametrize(("name", "variant"), PLAIN)
def test_the_canary_never_sings(tmp_path: Path, name: str, variant: str) -> None:
    """A pickle that leaves a mark, in the place of every file of an export, though trusted."""
    mark = tmp_path / "mark"
    exported(name, variant, tmp_path)
    for file in [f for f in (tmp_path / "out").rglob("*") if f.is_file()]:
        whole = file.read_bytes()
        file.write_bytes(pickle.dumps(Canary(mark)))
        with contextlib.suppress(FormatError, RunError):
            formats.read(tmp_path / "out", name, trusted=True)
        assert not mark.exists()
        file.write_bytes(whole)


def test_what_is_no_format(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="of no format known here"):
        formats.read(tmp_path)
    with pytest.raises(FormatError, match="did you mean 'saelens'"):
        formats.read(tmp_path, "saelns")


@pytest.mark.parametrize("name", formats.TABLES)
def test_tables_hold_no_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / f"features.{name}").touch()
    for given in (name, None):
        with pytest.raises(FormatError, match=f"{name} holds tables .* no weights") as caught:
            formats.read(tmp_path, given)
        assert len(str(caught.value).splitlines()) <= 3
