"""OpenAI's sparse_autoencoder: one .pt file, for `Autoencoder.from_state_dict`.

encoder.weight is [d_sae d_in], decoder.weight [d_in d_sae]; pre_bias is always subtracted. Its TopK
autoencoders normalise every input by its own mean and deviation, which ours do not.
"""

from pathlib import Path

import torch

from sae.errors import FormatError
from sae.formats import foreign, torch_file
from sae.formats.foreign import Foreign, Notes

FILE = "autoencoder.pt"
_NAMES = {
    "encoder.weight": "W_enc",
    "latent_bias": "b_enc",
    "decoder.weight": "W_dec",
    "pre_bias": "b_dec",
}
_TRANSPOSED = ("encoder.weight", "decoder.weight")
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognises(source: Path) -> bool:
    """Whether it is a .pt file, or a folder as `write` leaves it."""
    return (source.is_file() and source.suffix == ".pt") or (source / FILE).is_file()


def write(sae_folder: Path, out: Path, features: list[int] | None = None) -> Notes:
    """Write autoencoder.pt to the new folder `out`."""
    return foreign.export("openai", sae_folder, out, features, _fill)


def _fill(folder: Path, own: Foreign) -> Notes:
    if own.kind == "topk":
        what = "a topk autoencoder without LayerNorm on its inputs"
        raise foreign.refuse("openai", what, foreign.instead_of(own))
    foreign.check_kind("openai", own, ("relu_l1",))
    foreign.check_square("openai", own)
    ours, notes = foreign.with_subtraction("openai", own, True)
    state = {theirs: ours[name] for theirs, name in _NAMES.items()}
    for name in _TRANSPOSED:
        state[name] = state[name].T.contiguous()
    d_sae = own.sae.d_sae
    statistics = (torch.zeros(d_sae, dtype=torch.long), torch.ones(d_sae), torch.zeros(d_sae))
    state |= dict(zip(_STATISTICS, statistics, strict=True))
    torch_file.write(folder / FILE, {**state, "activation": "ReLU", "activation_state_dict": {}})
    if own.hookpoint is not None:
        notes.append("the file has no place for hookpoint and model: provenance.json has them")
    return notes


def read(source: Path, *, trusted: bool = False) -> list[Foreign]:
    """The autoencoder of a .pt file; `trusted` allows to read it (see `torch_file`)."""
    file = source / FILE if source.is_dir() else source
    tensors, values = torch_file.read(file, trusted=trusted)
    activation = values.get("activation", "ReLU")
    if activation != "ReLU":
        reason = "it normalises every input by LayerNorm" if activation == "TopK" else "not known"
        raise FormatError(f"{file}: activation {activation!r:.40} cannot be read here ({reason})")
    weights = {name: tensor for name, tensor in tensors.items() if name not in _STATISTICS}
    foreign.check_names(file, weights, _NAMES)
    ours = foreign.by_our_names(weights, _NAMES, _TRANSPOSED)
    known = foreign.known_facts(file.parent, file)
    sparsity = foreign.trained("relu_l1", known)
    sae = foreign.assemble(file, ours, sparsity, subtract_b_dec=True)
    notes = () if known else (f"{file.name} says neither hookpoint nor model",)
    return [Foreign(sae, foreign.own_facts(known), notes)]
