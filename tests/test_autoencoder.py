"""Proves the formulas, that folding and saving lose nothing, and that damaged files are refused."""

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sae import store
from sae.autoencoder import SparseAutoencoder, read_config
from sae.errors import ConfigError, FormatError, RunError
from sae.sparsity import ReluL1, TopK


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(sparsity=None, d_in=6, d_sae=20, **settings) -> SparseAutoencoder:
    sae = SparseAutoencoder(d_in, d_sae, sparsity or TopK(4), **settings)
    with torch.no_grad():
        for i, p in enumerate(sae.parameters()):
            p.copy_(randn(*p.shape, seed=i))
    return sae


@pytest.mark.parametrize("centred", [True, False])
def test_forward_is_the_formula(centred):
    sae, x = build(ReluL1(1.0), subtract_b_dec=centred), randn(3, 5, 6)
    out = sae(x)
    pre = (x - sae.b_dec * centred) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(out.pre, pre)
    torch.testing.assert_close(out.acts, pre.clamp_min(0))
    torch.testing.assert_close(out.recon, out.acts @ sae.W_dec + sae.b_dec)
    assert torch.equal(sae.encode(x), out.acts)
    assert torch.equal(sae.decode(out.acts), out.recon)


@pytest.mark.parametrize("centred", [True, False])
def test_activations_of_another_dtype_are_taken(centred):
    sae, x = build(subtract_b_dec=centred), randn(3, 6).bfloat16()
    assert torch.equal(sae(x).recon, sae(x.float()).recon)


def test_encode_and_decode_keep_nothing_on_self():
    sae = build()
    before = {name: id(value) for name, value in vars(sae).items()}
    sae(randn(3, 6))
    assert before == {name: id(value) for name, value in vars(sae).items()}


def test_initial_encoder_is_the_transposed_decoder_of_norm_a_tenth():
    sae = SparseAutoencoder(6, 20, TopK(4))
    mean = randn(6)
    sae.initialise(mean, torch.Generator().manual_seed(3))
    torch.testing.assert_close(sae.decoder_norms, torch.full((20,), 0.1))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert torch.equal(sae.b_dec, mean)
    assert not sae.b_enc.any()
    again = SparseAutoencoder(6, 20, TopK(4))
    again.initialise(mean, torch.Generator().manual_seed(3))
    assert torch.equal(again.W_dec, sae.W_dec)


def test_building_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    SparseAutoencoder(6, 20, TopK(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_map_to_another_width_has_an_encoder_of_its_own():
    sae = SparseAutoencoder(6, 20, TopK(4), d_out=9, subtract_b_dec=False)
    assert (sae.d_in, sae.d_sae, sae.d_out) == (6, 20, 9)
    assert sae(randn(3, 6)).recon.shape == (3, 9)
    torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.full((20,), 0.1))


@pytest.mark.parametrize(
    ("settings", "message"), [({"d_out": 9}, "subtract_b_dec"), ({"sparsity": TopK(21)}, "k 21")]
)
def test_settings_that_do_not_fit_are_config_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        SparseAutoencoder(**({"d_in": 6, "d_sae": 20, "sparsity": TopK(4)} | settings))


def test_wrong_width_says_what_came():
    with pytest.raises(ValueError, match=r"width 6, got \[3, 7\]"):
        build().encode(randn(3, 7))


@pytest.mark.parametrize("sparsity", [ReluL1(1.0), TopK(4)])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("scale", [0.037, 12.0])
def test_folded_takes_and_gives_raw_activations(sparsity, centred, scale):
    sae, raw = build(sparsity, subtract_b_dec=centred).double(), randn(7, 6).double()
    out, folded = sae(raw * scale), sae.folded(scale)(raw)
    torch.testing.assert_close(folded.recon, out.recon / scale)
    torch.testing.assert_close(folded.acts, out.acts)
    torch.testing.assert_close(folded.pre, out.pre)


def test_unfolded_is_the_inverse_of_folded():
    sae = build()
    again = sae.folded(0.037).unfolded(0.037)
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-6, atol=0)
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())


def test_folding_leaves_the_original_alone():
    sae = build()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with torch.no_grad():
        for p in sae.folded(2.0).parameters():
            p.zero_()
    assert all(torch.equal(before[n], v) for n, v in sae.state_dict().items())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_must_be_positive(scale):
    for fold in (build().folded, build().unfolded):
        with pytest.raises(ValueError, match="positive scale"):
            fold(scale)


@pytest.mark.parametrize("sparsity", [ReluL1(2.5), TopK(4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same(tmp_path, sparsity, dtype):
    sae = build(sparsity, d_in=6, d_out=9, subtract_b_dec=False, dtype=dtype)
    sae.save_pretrained(tmp_path / "a", {"hookpoint": "layers.2.mlp_act"})
    again = SparseAutoencoder.from_pretrained(tmp_path / "a")
    assert again.config() == sae.config()
    assert all(torch.equal(again.state_dict()[n], v) for n, v in sae.state_dict().items())
    assert all(p.requires_grad for p in again.parameters())
    again.save_pretrained(tmp_path / "b", {"hookpoint": "layers.2.mlp_act"})
    for name in ("sae.safetensors", "cfg.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_cfg_yaml_holds_settings_and_metadata(tmp_path):
    build().save_pretrained(tmp_path, {"scale": 0.5})
    config = yaml.safe_load((tmp_path / "cfg.yaml").read_text())
    assert config == {
        "format": 1,
        "d_in": 6,
        "d_sae": 20,
        "d_out": 6,
        "subtract_b_dec": True,
        "sparsity": {"kind": "topk", "k": 4},
        "dtype": "float32",
        "metadata": {"scale": 0.5},
    }


def test_metadata_comes_back_as_it_was(tmp_path):
    """Text that looks like a number under some rules of YAML too: a hash may be 12e4567."""
    metadata = {"a": "1234567e89012345", "b": "1e5", "c": 1e-05, "d": "no", "e": "0x1F", "f": None,
                "g": "12:30", "h": [1, True], "i": {"j": "↵\n"}, "k": "2024-01-01"}  # fmt: skip
    build().save_pretrained(tmp_path, metadata)
    assert read_config(tmp_path)["metadata"] == metadata
    assert yaml.safe_load((tmp_path / "cfg.yaml").read_text())["metadata"] == metadata


def test_loading_can_change_the_dtype(tmp_path):
    build().save_pretrained(tmp_path)
    sae = SparseAutoencoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in sae.parameters()} == {torch.bfloat16}


def make_run(path, names):
    for i, name in enumerate(names):
        build(d_sae=20 + i).save_pretrained(path / "saes" / name)
        store.write_manifest(path / "saes" / name)
    (path / "config.yaml").write_text("")
    return path


def test_a_run_gives_its_only_sae_or_the_one_named(tmp_path):
    one = make_run(tmp_path / "one", ["layers.2.mlp_act"])
    assert SparseAutoencoder.from_pretrained(one).d_sae == 20
    two = make_run(tmp_path / "two", ["layers.1.mlp_act", "layers.2.mlp_act"])
    assert SparseAutoencoder.from_pretrained(two, "layers.2.mlp_act").d_sae == 21
    with pytest.raises(RunError, match=r"layers\.1\.mlp_act, layers\.2\.mlp_act"):
        SparseAutoencoder.from_pretrained(two)
    with pytest.raises(RunError, match=r"did you mean 'layers\.2\.mlp_act'"):
        SparseAutoencoder.from_pretrained(two, "layers.2.mlp_akt")


def test_missing_folders_and_files_say_so(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        SparseAutoencoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="holds no SAE"):
        SparseAutoencoder.from_pretrained(tmp_path)
    for name in ("cfg.yaml", "sae.safetensors"):
        build().save_pretrained(tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(FormatError, match=f"{name} is missing"):
            SparseAutoencoder.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"subtract_bdec": True}, "did you mean 'subtract_b_dec'"),
        ({"format": 2}, "format 2"),
        ({"d_sae": "20"}, "d_sae '20'"),
        ({"d_sae": 0}, "d_sae 0"),
        ({"d_out": None}, "d_out None"),
        ({"dtype": "float7"}, "dtype 'float7'"),
        ({"dtype": []}, "dtype"),
        ({"subtract_b_dec": "yes"}, "subtract_b_dec 'yes'"),
        ({"skip": 1}, "skip 1"),
        ({"skip": True}, "no subtract_b_dec then"),
        ({"sites": 6}, "sites 6"),
        ({"sites": [2, 3]}, "add up to d_out 6"),
        ({"sites": [6, 0]}, "add up to d_out 6"),
        ({"d_out": 9}, "needs d_out equal"),
        ({"sparsity": "topk"}, "sparsity 'topk'"),
        ({"sparsity": {"kind": "tpk"}}, "did you mean 'topk'"),
        ({"sparsity": {"kind": "topk"}}, "wrong settings"),
        ({"sparsity": {"kind": "topk", "k": "4"}}, "sparsity.k '4'"),
        ({"sparsity": {"kind": "topk", "k": 21}}, "k 21"),
    ],
)
def test_a_wrong_config_is_refused_in_three_lines_at_most(tmp_path, change, message):
    build().save_pretrained(tmp_path)
    file = tmp_path / "cfg.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(FormatError, match=message) as caught:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) <= 3
    assert "cfg.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "d_in: 6", "\x00"])
def test_a_broken_config_is_refused(tmp_path, text):
    build().save_pretrained(tmp_path)
    (tmp_path / "cfg.yaml").write_text(text)
    with pytest.raises(FormatError, match=r"cfg\.yaml"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_enc": None}, "missing b_enc"),
        ({"W_encc": torch.ones(1)}, "unknown W_encc; did you mean 'W_enc'"),
        ({"b_dec": torch.ones(5)}, r"b_dec is \[5\] float32, expected \[6\] float32"),
        ({"W_dec": torch.ones(20, 6).half()}, r"W_dec is \[20, 6\] float16"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, change, message):
    build().save_pretrained(tmp_path)
    file = tmp_path / "sae.safetensors"
    tensors = {n: t for n, t in (load_file(file) | change).items() if t is not None}
    save_file(tensors, file)
    with pytest.raises(FormatError, match=message) as caught:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_cut_off_weights_file_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    file = tmp_path / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(FormatError, match="damaged"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_a_crosscoder_is_an_sae_on_concatenated_activations(tmp_path):
    """The same weights give the same; only the decoder norms are told apart by site, and saved."""
    plain, cross = build(d_in=10), build(d_in=10, sites=(4, 6))
    first, second = randn(7, 4), randn(7, 6, seed=1)
    x = torch.cat([first, second], dim=1)
    for got, want in zip(cross(x), plain(x), strict=True):
        assert torch.equal(got, want)
    by_site = torch.stack([plain.W_dec[:, :4].norm(dim=1), plain.W_dec[:, 4:].norm(dim=1)])
    torch.testing.assert_close(cross.site_norms, by_site)
    torch.testing.assert_close(cross.decoder_norms, by_site.sum(0))
    cross.save_pretrained(tmp_path, inputs=x)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.sites == (4, 6) and torch.equal(again(x).recon, cross(x).recon)


def test_a_skip_adds_a_dense_map_of_the_input(tmp_path):
    sae, x = build(d_in=6, d_out=9, subtract_b_dec=False, skip=True), randn(7, 6)
    assert sae.W_skip is not None
    out = sae(x)
    torch.testing.assert_close(out.recon, sae.decode(out.acts) + x @ sae.W_skip)
    sae.save_pretrained(tmp_path, inputs=x, targets=randn(7, 9))
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(again(x).recon, out.recon)
    sae.initialise()
    assert not sae.W_skip.any()


def test_folding_takes_a_scale_for_each_dimension():
    sae = build(d_in=6, d_out=5, subtract_b_dec=False, skip=True, sites=(2, 3))
    scale, scale_out, x = torch.rand(6) + 0.5, torch.rand(5) + 0.5, randn(7, 6)
    raw = sae.folded(scale, scale_out)
    torch.testing.assert_close(raw(x).recon, sae(x * scale).recon / scale_out)
    torch.testing.assert_close(raw(x).acts, sae(x * scale).acts)
    back = raw.unfolded(scale, scale_out)
    for name, weights in sae.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], weights)
    with pytest.raises(ValueError, match="positive"):
        sae.folded(scale - 2)


def test_an_encoder_that_is_not_tied_has_directions_of_its_own():
    tied, free = SparseAutoencoder(6, 20, TopK(4)), SparseAutoencoder(6, 20, TopK(4))
    free.initialise(tied=False)
    assert torch.equal(tied.W_dec, free.W_dec) and torch.equal(tied.W_enc, tied.W_dec.T)
    assert not torch.equal(free.W_enc, free.W_dec.T)
    torch.testing.assert_close(free.W_enc.norm(dim=0), torch.full((20,), 0.1))
