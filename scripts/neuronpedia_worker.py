"""SAEDashboard's side of scripts/neuronpedia.py: runs in a virtual environment of sae-dashboard,
where this package is not.

    python neuronpedia_worker.py JOB.json

    {"model": folder, "sae": SAELens folder, "tokens": safetensors file, "hook", "layer",
     "features", "batch": a batch of ours to parse, "out": file}

Writes SAEDashboard's own batch for the features, the seconds it took (by the clock, and of the
CPU), and what its class makes of our batch.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file


def model_of(folder: str) -> Any:
    """The GPT-2 of a folder in TransformerLens, its weights not processed."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = hf.config
    cfg = HookedTransformerConfig(
        n_layers=own.n_layer,
        d_model=own.n_embd,
        n_ctx=own.n_positions,
        n_heads=own.n_head,
        d_head=own.n_embd // own.n_head,
        d_mlp=own.n_inner,
        d_vocab=own.vocab_size,
        act_fn=own.activation_function,
        eps=own.layer_norm_epsilon,
        normalization_type="LN",
        original_architecture="GPT2LMHeadModel",
        device="cpu",
    )
    model = HookedSAETransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        convert_gpt2_weights(hf, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def dashboards(job: dict[str, Any], model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """SAEDashboard's batch for these features, set up as its NeuronpediaRunner does."""
    from sae_dashboard.components_config import (
        ActsHistogramConfig,
        Column,
        FeatureTablesConfig,
        LogitsHistogramConfig,
        LogitsTableConfig,
        SequencesConfig,
    )
    from sae_dashboard.layout import SaeVisLayoutConfig
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.neuronpedia.neuronpedia_runner import NeuronpediaRunner
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    sequences = SequencesConfig(
        stack_mode="stack-all",
        buffer=None,  # type: ignore
        compute_buffer=True,
        n_quantiles=5,
        top_acts_group_size=20,
        quantile_group_size=5,
    )
    parts = (ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig())
    column = Column(sequences, *parts, FeatureTablesConfig(n_rows=3))
    ids = {getattr(model.tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vis = SaeVisConfig(
        hook_point=job["hook"],
        features=job["features"],
        minibatch_size_features=len(job["features"]),
        minibatch_size_tokens=32,
        verbose=False,
        device="cpu",
        feature_centric_layout=SaeVisLayoutConfig(columns=[column]),
        ignore_tokens={i for i in ids if i is not None},
        dtype="float32",
    )
    cfg = NeuronpediaRunnerConfig(
        sae_set="set",
        sae_path=job["sae"],
        outputs_dir=".",
        n_prompts_total=tokens.shape[0],
        n_tokens_in_prompt=tokens.shape[1],
        model_id="model",
        layer=job["layer"],
    )
    texts = NeuronpediaRunner.get_vocab_dict(SimpleNamespace(model=model))  # type: ignore
    sae = SAE.load_from_disk(job["sae"])
    found = SaeVisRunner(vis).run(encoder=sae, model=model, tokens=tokens)
    return json.loads(NeuronpediaConverter.convert_to_np_json(model, found, cfg, texts))


def main(job_file: str) -> None:
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    job = json.loads(Path(job_file).read_text())
    model, tokens = model_of(job["model"]), load_file(job["tokens"])["tokens"].long()
    clocks = (time.perf_counter, time.process_time)
    started = [clock() for clock in clocks]
    batch = dashboards(job, model, tokens)
    seconds = [clock() - start for clock, start in zip(clocks, started, strict=True)]
    ours = json.loads(Path(job["batch"]).read_text())
    parsed = NeuronpediaDashboardBatch(**ours).to_dict() == ours
    result = {"seconds": seconds, "batch": batch, "parsed": parsed}
    Path(job["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
