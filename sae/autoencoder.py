"""The sparse autoencoder: four tensors and a sparsity.

acts = sparsity((x − b_dec) @ W_enc + b_enc)        recon = acts @ W_dec + b_dec [+ x @ W_skip]
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jaxtyping import Float
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from sae import fingerprint, hub
from sae.config import YAML_BYTES, dump_yaml, parse_yaml
from sae.errors import ConfigError, FormatError, RunError, suggest
from sae.fingerprint import FINGERPRINT
from sae.kernels import site_norms
from sae.sparsity import Sparsity, make_sparsity
from sae.store import MANIFEST, SETTINGS, WEIGHTS, Run, check_files, write_atomic
from sae.untrusted import read_limited

FORMAT = 1
CONFIG = "cfg.yaml"
DECODER_NORM = 0.1
WIDEST = 1 << 28
_SPARSITY = "sparsity."
"""How the names of the sparsity's tensors begin in the state of a module, but not on the disk."""
_OPTIONAL = ("skip", "sites", "metadata")
_KEYS = ("format", "d_in", "d_sae", "d_out", "subtract_b_dec", "sparsity", "dtype", *_OPTIONAL)
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}

Scale = float | Float[Tensor, " d"]
"""What activations are multiplied by: one number, or one for each dimension."""

_CARD = """---
library_name: sae-toolkit
tags: [sparse-autoencoder, interpretability]
---
# A sparse autoencoder, {sae.d_in} → {sae.d_sae} features, {sae.sparsity.kind}

```python
from sae.autoencoder import SparseAutoencoder

sae = SparseAutoencoder.from_pretrained("{repo}")
```
"""


class Output(NamedTuple):
    """What one forward pass gives."""

    pre: Float[Tensor, "*batch d_sae"]
    acts: Float[Tensor, "*batch d_sae"]
    recon: Float[Tensor, "*batch d_out"]


class SparseAutoencoder(nn.Module):
    """An autoencoder (or, with another `d_out`, a map) through `d_sae` sparse features.

    `subtract_b_dec`: whether the input is centred by b_dec first, which needs d_out == d_in.
    `skip`: whether a dense map W_skip [d_in d_out] stands beside the features (skip transcoder,
    Paulo et al. 2025, arXiv:2501.18823). `sites`: widths of the hookpoints that lie side by side in
    the output (crosscoder, Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders): a
    feature has a decoder norm at each, and their sum counts. Raises ConfigError where the settings
    do not fit together.
    """

    W_skip: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        sparsity: Sparsity,
        d_out: int | None = None,
        subtract_b_dec: bool = True,
        *,
        skip: bool = False,
        sites: Sequence[int] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        d_out = d_in if d_out is None else d_out
        self.sites = (d_out,) if sites is None else tuple(sites)
        _check_shape(d_in, d_out, subtract_b_dec, skip, self.sites)
        sparsity.check(d_sae)
        sparsity.allocate(d_sae, device, dtype)
        self.sparsity = sparsity
        self.subtract_b_dec = subtract_b_dec

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.W_enc = parameter(d_in, d_sae)
        self.b_enc = parameter(d_sae)
        self.W_dec = parameter(d_sae, d_out)
        self.b_dec = parameter(d_out)
        self.register_parameter("W_skip", parameter(d_in, d_out) if skip else None)
        if not self.W_dec.is_meta:
            self.initialise()

    @torch.no_grad()
    def initialise(
        self,
        b_dec: Float[Tensor, " d_out"] | None = None,
        generator: torch.Generator | None = None,
        examples: Float[Tensor, "n d_out"] | None = None,
        *,
        tied: bool | None = None,
    ) -> None:
        """Decoder rows of random direction and norm 0.1, W_enc their transpose, biases, W_skip 0.

        `b_dec`: the mean of the data. Without a CPU `generator` the weights are those of seed 0.
        The first n features take the directions of `examples` from b_dec. Unless `tied`, and where
        d_out ≠ d_in, the encoder gets directions of its own.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.W_dec.copy_(_directions(self.d_sae, self.d_out, generator))
        if examples is not None:
            towards = examples[: self.d_sae] - (0 if b_dec is None else b_dec)
            norms = torch.linalg.vector_norm(towards, dim=-1, keepdim=True)
            rows = self.W_dec[: len(towards)]
            rows.copy_(torch.where(norms > 0, DECODER_NORM * towards / norms, rows))
        if self.d_in == self.d_out if tied is None else tied:
            self.W_enc.copy_(self.W_dec.T)
        else:
            self.W_enc.copy_(_directions(self.d_sae, self.d_in, generator).T)
        self.b_enc.zero_()
        if self.W_skip is not None:
            self.W_skip.zero_()
        self.b_dec.zero_() if b_dec is None else self.b_dec.copy_(b_dec)

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.W_dec.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return self.W_dec.dtype

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """‖W_dec[i]‖ of every feature, summed over the sites."""
        return self.site_norms.sum(0)

    @property
    def site_norms(self) -> Float[Tensor, "sites d_sae"]:
        """‖W_dec[i]‖ of every feature at each of the sites: how much it writes there."""
        return site_norms(self.W_dec, self.sites)

    def pre(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """(x − b_dec) @ W_enc + b_enc, or without −b_dec, in the dtype of the weights."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"expected activations of width {self.d_in}, got {list(x.shape)}")
        x = x.to(self.dtype)
        centred = x - self.b_dec if self.subtract_b_dec else x
        return centred @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, all ≥ 0 and most of them 0."""
        return self.sparsity(self.pre(x))

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """acts @ W_dec + b_dec: all of the reconstruction, unless there is W_skip."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Output:
        """Pre-activations, activations and reconstruction."""
        pre = self.pre(x)
        acts = self.sparsity(pre)
        recon = self.decode(acts)
        if self.W_skip is not None:
            recon = recon + x.to(self.dtype) @ self.W_skip
        return Output(pre, acts, recon)

    def folded(self, scale: Scale, scale_out: Scale | None = None) -> "SparseAutoencoder":
        """A copy for raw activations of one trained on raw · `scale` (targets: raw · `scale_out`).

        raw in, raw out: W_enc · scale, b_dec / scale_out, W_dec / scale_out, b_enc, W_skip ·
        scale / scale_out. Pre-activations and activations stay as they were, and with them all that
        the sparsity holds (thresholds). A scale is a number, or one for each dimension; targets
        have that of the inputs where none is given. Raises ValueError where one is not positive.
        """
        scale_out = scale if scale_out is None else scale_out
        _check_positive(scale, scale_out)
        rows = scale[:, None] if isinstance(scale, Tensor) else scale
        copy = self._like(device="meta")
        tensors = {
            "W_enc": self.W_enc * rows,
            "b_enc": self.b_enc.clone(),
            "W_dec": self.W_dec / scale_out,
            "b_dec": self.b_dec / scale_out,
            **{n: t.clone() for n, t in self.state_dict().items() if n.startswith(_SPARSITY)},
        }
        if self.W_skip is not None:
            tensors["W_skip"] = self.W_skip * rows / scale_out
        copy.load_state_dict({n: t.detach() for n, t in tensors.items()}, assign=True)
        return copy

    def unfolded(self, scale: Scale, scale_out: Scale | None = None) -> "SparseAutoencoder":
        """The inverse of `folded` with these scales, up to rounding."""
        scale_out = scale if scale_out is None else scale_out
        _check_positive(scale, scale_out)
        return self.folded(1 / scale, 1 / scale_out)

    def _like(self, device: str) -> "SparseAutoencoder":
        sparsity = make_sparsity(self.sparsity.kind, **self.sparsity.config())
        return SparseAutoencoder(
            self.d_in,
            self.d_sae,
            sparsity,
            self.d_out,
            self.subtract_b_dec,
            skip=self.W_skip is not None,
            sites=self.sites,
            device=device,
            dtype=self.dtype,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All it has learnt, by the names that files give them: the sparsity's beside the rest."""
        return {name.removeprefix(_SPARSITY): t for name, t in self.state_dict().items()}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold these in place of its own `tensors()`, which have the same names and shapes."""
        names = {name.removeprefix(_SPARSITY): name for name in self.state_dict()}
        self.load_state_dict({names[n]: t for n, t in tensors.items()}, assign=True)

    def config(self) -> dict[str, Any]:
        """What cfg.yaml holds, without the metadata; skip and sites only where there are any."""
        several = len(self.sites) > 1
        extras = {"skip": self.W_skip is not None, "sites": [*self.sites] if several else []}
        return {
            "format": FORMAT,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "d_out": self.d_out,
            "subtract_b_dec": self.subtract_b_dec,
            "sparsity": {"kind": self.sparsity.kind, **self.sparsity.config()},
            "dtype": str(self.dtype).removeprefix("torch."),
            **{name: value for name, value in extras.items() if value},
        }

    def save_pretrained(
        self,
        folder: str | Path,
        metadata: Mapping[str, Any] | None = None,
        *,
        inputs: Float[Tensor, "n d_in"] | None = None,
        targets: Float[Tensor, "n d_out"] | None = None,
    ) -> None:
        """Write sae.safetensors and cfg.yaml; `metadata` is plain data kept beside the weights.

        The sparsity's tensors lie beside the others, under their own names (`threshold`).

        With `inputs`, of which 8 rows will do, and the `targets` to rebuild where those differ,
        what they give is stored too, and checked at every load (see `sae.fingerprint`).
        """
        folder = Path(folder)
        text = dump_yaml(self.config() | {"metadata": dict(metadata or {})})
        tensors = {name: t.cpu().contiguous() for name, t in self.tensors().items()}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / CONFIG, text)
        write_atomic(folder / WEIGHTS, to_safetensors(tensors))
        (folder / FINGERPRINT).unlink(missing_ok=True)
        if inputs is not None:
            fingerprint.write(folder, self, inputs, targets, (metadata or {}).get("scale"))

    def push_to_hub(
        self,
        repo_id: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        inputs: Float[Tensor, "n d_in"] | None = None,
        private: bool = False,
    ) -> str:
        """Save to a repository of the Hub, with a short card; returns its address.

        `sae push RUN` publishes a run with its numbers and its features. Raises RunError.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, metadata, inputs=inputs)
            (Path(folder) / "README.md").write_text(_CARD.format(repo=repo_id, sae=self))
            return hub.upload(Path(folder), repo_id, private=private, message="Add the SAE")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        sae: str | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "SparseAutoencoder":
        """Read the folder of an SAE, or of a run, where `sae` chooses one if there are several.

        `path` may also be a repository of the Hub, at a `revision` of it. `dtype`: as stored where
        None. Raises RunError where there is no such folder or SAE, or the
        files are not those its manifest lists, and FormatError where files or tensors are missing,
        unknown, of the wrong shape, or do not give what the stored fingerprint expects.
        """
        folder = locate(path, sae, revision=revision, subfolder=subfolder)
        check_files(folder, CONFIG, WEIGHTS, FINGERPRINT)
        config = read_config(folder)
        stored = DTYPES[config["dtype"]]
        model = cls(
            config["d_in"],
            config["d_sae"],
            make_sparsity(**config["sparsity"]),
            config["d_out"],
            config["subtract_b_dec"],
            skip=config.get("skip", False),
            sites=config.get("sites"),
            device="meta",
            dtype=stored,
        )
        model.take(_read_tensors(folder / WEIGHTS, model))
        fingerprint.check(folder, model, (config.get("metadata") or {}).get("scale"))
        return model.to(device=device, dtype=dtype or stored)


def locate(
    path: str | Path,
    sae: str | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """The folder that holds sae.safetensors: `path` itself, or the SAE `sae` of the run there.

    What is no folder but looks like the name of a repository is fetched from the Hub. Raises
    RunError where there is no such folder, repository, run or SAE.
    """
    folder = _fetched(path, revision, subfolder)
    return Run(folder).sae(sae) if (folder / "saes").is_dir() else folder


def locate_all(path: str | Path) -> list[Path]:
    """The folders that `locate` chooses from; raises what it raises."""
    folder = _fetched(path, None, None)
    return Run(folder).chosen(None) if (folder / "saes").is_dir() else [folder]


def _fetched(path: str | Path, revision: str | None, subfolder: str | None) -> Path:
    """The folder of a run or an SAE, of the Hub in its cache."""
    if hub.is_name(str(path)):
        wanted = [f"*{name}" for name in (WEIGHTS, CONFIG, FINGERPRINT, MANIFEST, SETTINGS)]
        folder = hub.fetch(str(path), revision, subfolder, wanted=wanted)
    elif revision is not None:
        raise RunError(f"{path} lies on this disk and has no revisions; leave revision out")
    else:
        folder = Path(path) / (subfolder or "")
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; give an SAE's folder or a run's")
    if not any((folder / name).exists() for name in ("saes", WEIGHTS, CONFIG)):
        raise FormatError(
            f"{folder} holds no SAE: expected {WEIGHTS} and {CONFIG}, or a run with saes/"
        )
    return folder


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked content of an SAE folder's cfg.yaml; raises FormatError."""
    file = Path(folder) / CONFIG
    try:
        config = parse_yaml(read_limited(file, YAML_BYTES).decode())
    except FileNotFoundError:
        raise FormatError(f"{folder}: {CONFIG} is missing; copy it along with {WEIGHTS}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        summary = " ".join(str(error).split())[:120]
        raise FormatError(f"{file} cannot be read: {summary}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{file}: expected keys {', '.join(_KEYS)}, got {type(config).__name__}")
    try:
        _check_config(config)
    except ConfigError as error:
        raise FormatError(f"{file}: {error}") from None
    return config


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """Where an SAE belongs and how it was trained, as far as its folder says; FormatError."""
    return read_config(folder).get("metadata") or {}


def _check_config(config: dict[str, Any]) -> None:
    """Raise ConfigError on what this version cannot build."""
    number = config.get("format")
    if number != FORMAT:
        raise ConfigError(f"format {number!r}: this version reads {FORMAT}; update sae-toolkit")
    for key in config:
        if key not in _KEYS:
            raise ConfigError(f"unknown key {key!r}{suggest(str(key), _KEYS)}")
    if missing := [key for key in _KEYS if key not in config and key not in _OPTIONAL]:
        raise ConfigError(f"missing {', '.join(missing)}")
    for key in ("d_in", "d_sae", "d_out"):
        if type(config[key]) is not int or not 1 <= config[key] <= WIDEST:
            shown = repr(config[key])[:40]
            raise ConfigError(f"{key} {shown}: expected a whole number from 1 to {WIDEST:,}")
    for key in ("subtract_b_dec", "skip"):
        if type(config.get(key, False)) is not bool:
            raise ConfigError(f"{key} {config[key]!r}: expected true or false")
    sites = config.get("sites", [config["d_out"]])
    if not isinstance(sites, list) or not all(type(width) is int for width in sites):
        raise ConfigError(f"sites {str(sites)[:60]}: expected a list of widths")
    if not isinstance(config["dtype"], str) or config["dtype"] not in DTYPES:
        raise ConfigError(f"dtype {config['dtype']!r}: expected one of {', '.join(DTYPES)}")
    if not isinstance(config.get("metadata"), dict | None):
        raise ConfigError(f"metadata {config['metadata']!r}: expected names and values")
    shape = (config["d_in"], config["d_out"], config["subtract_b_dec"], config.get("skip", False))
    _check_shape(*shape, sites)
    _check_sparsity(config)


def _check_shape(
    d_in: int, d_out: int, subtract_b_dec: bool, skip: bool, sites: Sequence[int]
) -> None:
    """Raise ConfigError on settings of the shape that do not fit together."""
    if subtract_b_dec and d_out != d_in:
        raise ConfigError(
            f"subtract_b_dec: needs d_out equal to d_in, {d_out} and {d_in} came; set it to false "
            "where the output is not the input"
        )
    if subtract_b_dec and skip:
        raise ConfigError("skip: W_skip reads inputs that are not centred; no subtract_b_dec then")
    if sum(sites) != d_out or not all(width > 0 for width in sites):
        raise ConfigError(f"sites {[*sites]}: expected widths that add up to d_out {d_out}")


def _check_sparsity(config: dict[str, Any]) -> None:
    settings = config["sparsity"]
    if not isinstance(settings, dict) or not isinstance(settings.get("kind"), str):
        raise ConfigError(f"sparsity {settings!r}: expected its kind and settings")
    if not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"sparsity {settings!r}: expected names as keys")
    for key, value in settings.items():
        if key != "kind" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"sparsity.{key} {value!r}: expected a number")
    make_sparsity(**settings).check(config["d_sae"])


def _read_tensors(file: Path, model: SparseAutoencoder) -> dict[str, Tensor]:
    """The tensors of `file`, exactly those of `model` by name, shape and type, or FormatError."""
    if not file.is_file():
        raise FormatError(f"{file.parent}: {WEIGHTS} is missing; copy it along with {CONFIG}")
    tensors = fingerprint.load(file)
    expected = model.tensors()
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    wrong += [
        f"unknown {name}{suggest(name, expected)}" for name in tensors if name not in expected
    ]
    for name in expected.keys() & tensors.keys():
        want, got = expected[name], tensors[name]
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            wrong.append(f"{name} is {_describe(got)}, expected {_describe(want)}")
    if wrong:
        raise FormatError(
            f"{file} does not fit its {CONFIG}: {', '.join(sorted(wrong))}.\n"
            "Take both files from one save"
        )
    return tensors


def _check_positive(*scales: Scale) -> None:
    for scale in scales:
        numbers = torch.as_tensor(scale, dtype=torch.float64)
        if not ((numbers > 0) & numbers.isfinite()).all():
            raise ValueError(f"expected a positive scale, got {scale}")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """`n` random rows of norm 0.1, drawn on the CPU so that every device gets the same."""
    rows = torch.randn(n, d, generator=generator)
    return DECODER_NORM * rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
