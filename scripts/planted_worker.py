"""Train one dictionary on stored activations with another package's own trainer.

    python scripts/planted_worker.py JOB.json OUTPUT

`compare_planted.py` runs this with the Python of an environment that holds the package (checked
with sae-lens 6.54.12, eai-sparsify 1.3.3, dictionary-learning 0.1.0); nothing of this project is
imported. OUTPUT gets result.safetensors, the decoder and the activations on the two splits of the
exam, all for raw inputs, and info.json.

Recipes are those the packages document. What they say in steps of much longer trainings is taken
as a share of the steps.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from saelens_worker import NORM_TOKENS, batches
from safetensors.torch import load_file, save_file
from torch import Tensor

SITE = "planted"
CONTEXT = 64


class Trained(NamedTuple):
    """What a package made: [d_sae d] decoder rows, and x [n d] → activations [n d_sae]."""

    W_dec: Tensor
    encode: Callable[[Tensor], Tensor]
    seconds: float


class Stored:
    """The batches of the job, from the start each time it is iterated."""

    def __init__(self, job: dict[str, Any]):
        self.folder, self.batch = Path(job["activations"]), job["batch"]

    def __iter__(self) -> Iterator[Tensor]:
        return (acts.clone() for acts in batches(self.folder, self.batch))


# --------------------------------------------------------------------------------------- SAELens


def sae_lens(job: dict[str, Any], output: Path) -> Trained:
    """SAELens' own trainer with the settings of its `train_toy_sae`, for synthetic data.

    Inputs are scaled as in its tutorial, whose coefficients are for mean norm √d_in.
    """
    from sae_lens import SAE, LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    steps = job["samples"] // job["batch"]
    own: dict[str, dict[str, Any]] = {
        "standard": {"l1_coefficient": job["coefficient"], "l1_warm_up_steps": steps // 20},
        "gated": {"l1_coefficient": job["coefficient"], "l1_warm_up_steps": steps // 20},
        "jumprelu": {"l0_coefficient": job["coefficient"], "l0_warm_up_steps": steps // 20},
        "topk": {"k": job["k"]},
        "batchtopk": {"k": job["k"]},
    }
    kind, config = get_sae_training_class(job["variant"])
    sae = kind(
        config(
            d_in=job["d_in"],
            d_sae=job["d_sae"],
            normalize_activations="expected_average_only_in",
            **own[job["variant"]],
        )
    )
    norm = min(NORM_TOKENS, job["samples"]) // job["batch"]
    settings = SAETrainerConfig(
        total_training_samples=job["samples"],
        train_batch_size_samples=job["batch"],
        lr=job["lr"],
        lr_end=job["lr"],  # must be given; a constant schedule does not use it
        lr_decay_steps=steps // 5,
        logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
        n_batches_for_norm_estimate=norm,
    )
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=_after_first(Stored(job), norm))
    started = time.perf_counter()
    trainer.fit().save_inference_model(output / "sae")
    seconds = time.perf_counter() - started
    trained = SAE.load_from_disk(output / "sae")
    return Trained(trained.W_dec.detach(), trained.encode, seconds)


def _after_first(stored: Stored, n: int) -> Iterator[Tensor]:
    """The first `n` batches for the estimate of the norm, then all."""
    for number, acts in enumerate(stored):
        if number == n:
            break
        yield acts
    yield from stored


# -------------------------------------------------------------------------------------- sparsify


def sparsify(job: dict[str, Any], output: Path) -> Trained:
    """sparsify's own trainer on a model whose module gives the stored activations."""
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    acts = torch.cat(list(batches(Path(job["activations"]), job["batch"])))
    context = min(CONTEXT, job["batch"])

    class Lookup(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return acts[ids]

    class Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.add_module(SITE, Lookup())
            self.nothing = nn.Parameter(torch.zeros(1))  # a model needs a device

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.get_submodule(SITE)(input_ids)

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(acts) // context

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            return {"input_ids": torch.arange(row * context, (row + 1) * context)}

    config = TrainConfig(
        SparseCoderConfig(num_latents=job["d_sae"], k=job["k"]),
        batch_size=job["batch"] // context,
        lr=job["lr"],
        hookpoints=[SITE],
        init_seeds=[job["seed"]],
        log_to_wandb=False,
        save_every=10**9,
        save_dir=str(output),
        run_name="run",
    )
    trainer = Trainer(config, Samples(), Model())  # pyright: ignore[reportArgumentType]
    started = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - started
    coder = SparseCoder.load_from_disk(output / "run" / SITE)

    def encode(x: Tensor) -> Tensor:
        found = coder.encode(x)
        return x.new_zeros(len(x), job["d_sae"]).scatter(1, found.top_indices, found.top_acts)

    assert coder.W_dec is not None
    return Trained(coder.W_dec.detach(), encode, seconds)


# --------------------------------------------------------------------------- dictionary_learning


def dictionary_learning(job: dict[str, Any], output: Path) -> Trained:
    """`trainSAE` with the settings of dictionary_learning_demo."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.p_anneal import PAnnealTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

    steps = job["samples"] // job["batch"]
    warmup = {"sparsity_warmup_steps": steps // 20}
    ks = {"k": job["k"], "threshold_start_step": steps // 10}
    anneal = {
        "initial_sparsity_penalty": job["coefficient"],
        "sparsity_function": "Lp^p",
        "p_end": 0.2,
        "anneal_start": steps // 10,
    }
    trainer, own = {
        "standard": (StandardTrainer, warmup | {"l1_penalty": job["coefficient"]}),
        "p_anneal": (PAnnealTrainer, warmup | anneal),
        "jumprelu": (JumpReluTrainer, warmup | {"target_l0": job["k"]}),
        "top_k": (TopKTrainer, ks),
        "batch_top_k": (BatchTopKTrainer, ks),
    }[job["variant"]]
    config = {
        "trainer": trainer,
        "steps": steps,
        "activation_dim": job["d_in"],
        "dict_size": job["d_sae"],
        "layer": 0,
        "lm_name": SITE,
        "lr": job["lr"],
        "warmup_steps": steps // 100,
        "decay_start": steps * 4 // 5,
        "seed": job["seed"],
        "device": "cpu",
        **own,
    }
    started = time.perf_counter()
    trainSAE(
        Stored(job), [config], steps, save_dir=str(output), normalize_activations=True,
        device="cpu",
    )  # fmt: skip
    seconds = time.perf_counter() - started
    trained, _ = load_dictionary(str(output / "trainer_0"), "cpu")
    W_dec = trained.W_dec if job["variant"] == "jumprelu" else trained.decoder.weight.T
    return Trained(W_dec.detach(), trained.encode, seconds)


PACKAGES = {
    "sae-lens": sae_lens,
    "eai-sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["HF_HUB_OFFLINE"] = "1"
    job = json.loads(args.job.read_text())
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    trained = PACKAGES[job["package"]](job, args.output)
    if not trained.W_dec.isfinite().all():
        sys.exit("the decoder is not finite")
    exam = load_file(job["exam"])
    with torch.no_grad():
        acts = {name: trained.encode(x).contiguous() for name, x in exam.items()}
    save_file({"W_dec": trained.W_dec.contiguous(), **acts}, args.output / "result.safetensors")
    version = importlib.metadata.version(job["package"])
    info = {"version": version, "torch": torch.__version__, "seconds": trained.seconds}
    (args.output / "info.json").write_text(json.dumps(info))


if __name__ == "__main__":
    main()
