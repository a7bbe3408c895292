"""Train dictionaries on stored activations with another package's own trainer.

peers.py runs this with the Python of an environment that holds the package (checked with sae-lens
6.54.12, eai-sparsify 1.3.3, dictionary-learning 0.1.0); nothing of this project is imported. Each
line of the standard input is a job in JSON, whose "output" is the folder for what the package
saves, for raw activations; each is answered by a line with seconds and versions, or an "error".

Recipes are those the packages document. What they say in steps of much longer trainings is taken
as a share of the steps.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

SITE = "acts"
CONTEXT = 64
NORM_TOKENS = 131_072
"""Rows behind SAELens' estimate of the mean norm: as many as `sae train` takes, its first pool."""


class Stored:
    """The batches [batch d_in] of the job in their order, from the start at each iteration."""

    def __init__(self, job: dict[str, Any]):
        self.folder, self.batch = Path(job["activations"]), job["batch"]

    def __iter__(self) -> Iterator[Tensor]:
        for shard in sorted(self.folder.glob("*.safetensors")):
            acts = load_file(shard)["acts"]
            if len(acts) % self.batch:
                raise ValueError(f"{shard.name}: {len(acts)} rows, not in batches of {self.batch}")
            yield from (acts.clone() for acts in acts.split(self.batch))


# --------------------------------------------------------------------------------------- SAELens


def sae_lens(job: dict[str, Any], output: Path) -> float:
    """SAELens' own trainer; its defaults where nothing is said, at the constant rate they have.

    Inputs are scaled as in its tutorial, whose coefficients are for mean norm √d_in; so are the
    warm-up of the penalty, over 5 % of the steps, and the decay of the rate, over the last 20 %.
    """
    from sae_lens import LoggingConfig
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
    sae = trainer.fit()
    seconds = time.perf_counter() - started
    sae.save_inference_model(output)
    return seconds


def _after_first(stored: Stored, n: int) -> Iterator[Tensor]:
    """The first `n` batches for the estimate of the norm, then all."""
    for number, acts in enumerate(stored):
        if number == n:
            break
        yield acts
    yield from stored


# -------------------------------------------------------------------------------------- sparsify


def sparsify(job: dict[str, Any], output: Path) -> float:
    """sparsify's own trainer on a model whose module gives the stored activations."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    acts = torch.cat(list(Stored(job)))
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
    return time.perf_counter() - started


# --------------------------------------------------------------------------- dictionary_learning


def dictionary_learning(job: dict[str, Any], output: Path) -> float:
    """`trainSAE` with the settings of dictionary_learning_demo."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.p_anneal import PAnnealTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

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
    return time.perf_counter() - started


PACKAGES: dict[str, Callable[[dict[str, Any], Path], float]] = {
    "sae-lens": sae_lens,
    "eai-sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
}


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job; what there is to say of it."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])  # packages draw the weights from the global generator
    output = Path(job["output"])
    output.mkdir(parents=True, exist_ok=True)
    try:
        seconds = PACKAGES[job["package"]](job, output)
    except Exception as error:  # whatever it is, it is what the package's variant came to
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    version = importlib.metadata.version(job["package"])
    return {"version": version, "torch": torch.__version__, "seconds": seconds}


def main() -> None:
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["HF_HUB_OFFLINE"] = "1"
    answers, sys.stdout = sys.stdout, sys.stderr  # packages print
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
