"""Train one of SAELens' standard SAEs on stored activations, with SAELens' own trainer.

    python scripts/saelens_worker.py JOB.json OUTPUT

`compare_saelens.py` runs this with the Python of an environment that holds sae-lens (checked with
6.54.12); nothing of this project is imported. OUTPUT gets SAELens' sae_weights.safetensors and
cfg.json, for raw activations, and info.json.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

NORM_TOKENS = 131_072
"""Tokens behind SAELens' estimate of the mean norm: as many as ours takes, its first pool."""


def batches(folder: Path, batch: int) -> Iterator[Tensor]:
    """The stored activations [batch d] in their order; every shard holds whole batches."""
    for shard in sorted(folder.glob("*.safetensors")):
        acts = load_file(shard)["acts"]
        if len(acts) % batch:
            raise ValueError(f"{shard.name} holds {len(acts)} tokens, not whole batches of {batch}")
        yield from acts.split(batch)


def provider(job: dict[str, Any]) -> tuple[Iterator[Tensor], int]:
    """SAELens' data, fp32, and how many of its batches are for the estimate of the norm.

    The estimate would eat the batches it reads; they are given once more, so that the training
    sees every token that ours does.
    """
    folder, batch = Path(job["activations"]), job["batch"]
    first = min(NORM_TOKENS, job["tokens"]) // batch
    acts = chain(islice(batches(folder, batch), first), batches(folder, batch))
    return (a.float() for a in acts), first


def recipe(job: dict[str, Any], norm_batches: int) -> tuple[Any, Any]:
    """The recipe of SAELens' tutorial "Training a Sparse Autoencoder": its SAE and its trainer.

    L1 on activations weighted by decoder norms, inputs scaled to mean norm √d_in, b_dec not
    subtracted, L1 warm-up over 5 % of the steps, Adam at a constant rate, linear to 0 in the
    last 20 %.
    """
    from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    steps = job["tokens"] // job["batch"]
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(
            d_in=job["d_in"],
            d_sae=job["d_sae"],
            dtype="float32",
            device=job["device"],
            apply_b_dec_to_input=False,
            normalize_activations="expected_average_only_in",
            decoder_init_norm=0.1,
            l1_coefficient=job["l1"],
            lp_norm=1.0,
            l1_warm_up_steps=steps // 20,
        )
    )
    return sae, SAETrainerConfig(
        total_training_samples=job["tokens"],
        train_batch_size_samples=job["batch"],
        lr=job["lr"],
        lr_end=job["lr"] / 10,  # must be given; a constant schedule does not use it
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=steps // 5,
        n_restart_cycles=1,
        adam_beta1=0.9,
        adam_beta2=0.999,
        device=job["device"],
        autocast=job["autocast"],
        dead_feature_window=1000,
        feature_sampling_window=1000,
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=norm_batches,
    )


def train(job: dict[str, Any], output: Path) -> None:
    """Train, let SAELens fold the scale in and save; `seconds` are those of its fit()."""
    import sae_lens
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(job["seed"])  # SAELens draws the weights from the global generator
    acts, norm_batches = provider(job)
    sae, settings = recipe(job, norm_batches)
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=acts)
    started = time.perf_counter()
    sae = trainer.fit()
    seconds = time.perf_counter() - started
    if sae.cfg.normalize_activations != "none" or trainer.n_training_samples != job["tokens"]:
        sys.exit("this release of SAELens trains or saves otherwise than the one checked")
    sae.save_inference_model(output)
    info = {"sae_lens": sae_lens.__version__, "torch": torch.__version__, "seconds": seconds}
    (output / "info.json").write_text(json.dumps(info))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["HF_HUB_OFFLINE"] = "1"
    train(json.loads(args.job.read_text()), args.output)


if __name__ == "__main__":
    main()
