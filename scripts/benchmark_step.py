"""Tokens per second of a training step (gradients, clipping, fused Adam): autograd against kernels.

    python scripts/benchmark_step.py [--d-in 512 --d-sae 4096 --batch 2048 --seconds 3]

Both use bf16 products and take turns, so that a busy machine slows them alike, and the fastest step
counts. The ReLU rows are at a given share of active features, set through the encoder's bias;
`dense` is the kernel's way for batches in which many are.
"""

import argparse
import time
from collections.abc import Callable

import torch

from sae import losses
from sae.autoencoder import SparseAutoencoder
from sae.config import Moment
from sae.kernels import relu_l1_step, topk_step
from sae.sparsity import ReluL1, Sparsity, TopK

Step = Callable[[SparseAutoencoder, torch.Tensor], object]


def plain_step(sae: SparseAutoencoder, x: torch.Tensor) -> None:
    """The formulas under autocast, as one would write them first."""
    with torch.autocast(x.device.type, torch.bfloat16):
        out = sae(x)
    penalty = sae.sparsity.penalty(out.pre, out.acts.float(), sae.decoder_norms, Moment())
    for p in sae.parameters():
        p.grad = None
    (losses.reconstruction(out.recon.float(), x) + 5 * penalty).backward()


def relu_kernel(sae: SparseAutoencoder, x: torch.Tensor) -> None:
    relu_l1_step(sae, x, x, 5.0, matmul_dtype=torch.bfloat16)


def relu_dense_kernel(sae: SparseAutoencoder, x: torch.Tensor) -> None:
    relu_l1_step(sae, x, x, 5.0, matmul_dtype=torch.bfloat16, sparse_below=0)


def topk_kernel(sae: SparseAutoencoder, x: torch.Tensor) -> None:
    assert isinstance(sae.sparsity, TopK)
    topk_step(sae, x, x, sae.sparsity.k, matmul_dtype=torch.bfloat16)


def build(
    sparsity: Sparsity, x: torch.Tensor, d_sae: int, active: float | None
) -> tuple[SparseAutoencoder, torch.optim.Optimizer]:
    """An autoencoder with about `active` · d_sae positive pre-activations a token."""
    sae = SparseAutoencoder(x.shape[1], d_sae, sparsity, device=x.device)
    if active is not None:
        with torch.no_grad():
            pre = sae.pre(x[:64])
            sae.b_enc.sub_(torch.quantile(pre.flatten()[:200_000], 1 - active))
    # A learning rate of 0 keeps the share of active features; the work is the same.
    return sae, torch.optim.Adam(sae.parameters(), lr=0.0, fused=True)


def seconds(step: Step, sae: SparseAutoencoder, optim: torch.optim.Optimizer, x: torch.Tensor):
    """Of one whole step."""
    start = time.perf_counter()
    step(sae, x)
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optim.step()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=3.0, help="per row")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    x = torch.randn(args.batch, args.d_in, generator=torch.Generator().manual_seed(0))
    x = x.to(args.device)
    rows: list[tuple[str, Sparsity, float | None, dict[str, Step]]] = [
        (f"topk k={k}", TopK(k), None, {"plain": plain_step, "kernel": topk_kernel})
        for k in (16, 64)
    ]
    relu: dict[str, Step] = {"plain": plain_step, "kernel": relu_kernel, "dense": relu_dense_kernel}
    rows += [
        (f"relu_l1 {share:.1%} active", ReluL1(5.0), share, relu)
        for share in (0.005, 0.02, 0.055, 0.5)
    ]
    print(f"{args.d_in} -> {args.d_sae}, batch {args.batch}, {torch.get_num_threads()} threads")
    print(f"{'':24}{'plain':>10}{'kernel':>10}{'dense':>10}  tokens/s")
    for name, sparsity, share, steps in rows:
        sae, optim = build(sparsity, x, args.d_sae, share)
        times: dict[str, list[float]] = {key: [] for key in steps}
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end or len(times["plain"]) < 3:
            for key, step in steps.items():
                times[key].append(seconds(step, sae, optim, x))
        speed = {key: args.batch / min(t) for key, t in times.items()}
        print(f"{name:24}" + "".join(f"{speed[key]:10,.0f}" for key in speed))


if __name__ == "__main__":
    main()
