"""How quickly the pages of large dictionaries open, sort and search in Chromium.

    python scripts/benchmark_browse.py [--features 25000 1000000] [--folder DIR]

Each dictionary is synthetic (random numbers, words for tokens), written to DIR/<features> with the
package's own schemas where it is not there yet, then served by `sae browse` and, up to 100,000
features, exported by `sae export --format html`. Times are those inside the page, from the request
to the frame that shows the result. Where other work takes the cores, the CPU time beside it tells
more: that of the server and all of Chromium together. Needs `make install-browser`; on 2 cores it
takes ten minutes, most of them to write a million features.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from sae.autoencoder import SparseAutoencoder
from sae.records import EXAMPLES_SCHEMA, FEATURES_SCHEMA
from sae.sparsity import ReluL1
from sae.store import WEIGHTS, sha256, staged, write_atomic, write_manifest

WIDTH, ROWS, WORDS, D_IN = 128, 512, 4096, 16
EXAMPLES = {"top": 6, "interval": 5, "random": 1}
AT_ONCE = 1024
TIMES = 5
OPENED = 200
"""Feature pages that are opened."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

GO = """place => new Promise(done => {
  const start = performance.now();
  SAE.drawn = null;
  location.hash = place;
  const look = () => SAE.drawn === null ? requestAnimationFrame(look)
    : requestAnimationFrame(() => done(performance.now() - start));
  look();
})"""
LISTED = """const look = () => document.querySelector("#rows .row mark")
  ? requestAnimationFrame(() => { window.listed = performance.now(); })
  : requestAnimationFrame(look);
requestAnimationFrame(look);"""
"""Notes when the lines of the list are shown, counted from the start of the navigation."""
CLICK = """text => new Promise(done => {
  const heads = [...document.querySelectorAll("button.sort")];
  const button = heads.find(head => head.textContent.startsWith(text));
  const start = performance.now();
  button.click();
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
})"""
SEARCH = """text => new Promise(done => {
  const box = document.getElementById("search"), count = document.getElementById("count");
  const start = performance.now();
  box.value = text;
  box.dispatchEvent(new Event("input"));
  const look = () => /“|server only/.test(count.textContent)
    ? done([performance.now() - start, count.textContent]) : requestAnimationFrame(look);
  look();
})"""


def make(run: Path, n: int) -> None:
    """A run with one SAE and its dictionary of `n` features."""
    folder = run / "saes" / "layers.0.mlp_act"
    sae = SparseAutoencoder(D_IN, n, ReluL1(1.0))
    sae.save_pretrained(folder, {"hookpoint": "layers.0.mlp_act"})
    write_manifest(folder, {"hookpoint": "layers.0.mlp_act"})
    write_atomic(run / "config.yaml", "seed: 0\n")
    facts = {
        "model": "synthetic", "hookpoint": "layers.0.mlp_act", "d_sae": n, "tokens": ROWS * WIDTH,
        "sae_sha256": sha256(folder / WEIGHTS),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghijklmnop"), 5)) for _ in range(WORDS)]
    with staged(folder / "features", extra=facts) as out:
        text = generator.integers(0, WORDS, (ROWS, WIDTH), np.int32)
        pieces = [f" {words[i]}".encode() for i in text.ravel()]
        columns = {
            "tokens": text, "document": text * 0, "position": text * 0, "kept": text >= 0,
            "piece_bytes": np.frombuffer(b"".join(pieces), np.uint8),
            "piece_offsets": np.cumsum([0, *map(len, pieces)]),
        }  # fmt: skip
        save_file(columns, out / "tokens.safetensors")
        vocabulary = pa.array([f" {word}" for word in words])
        with (
            pq.ParquetWriter(out / "features.parquet", FEATURES_SCHEMA) as features,
            pq.ParquetWriter(out / "examples.parquet", EXAMPLES_SCHEMA) as examples,
        ):
            for start in range(0, n, AT_ONCE):
                ids = np.arange(start, min(start + AT_ONCE, n), dtype=np.int32)
                features.write_table(feature_rows(ids, n, vocabulary, generator))
                examples.write_table(example_rows(ids, vocabulary, generator))


def lists(rows: int, each: int, **columns: Any) -> pa.Array:
    """`each` structs for each row."""
    arrays = [pa.array(column) for column in columns.values()]
    items = pa.StructArray.from_arrays(arrays, list(columns))
    return pa.ListArray.from_arrays(np.arange(0, rows * each + 1, each, dtype=np.int32), items)


def histograms(rows: int, generator: np.random.Generator) -> pa.Array:
    """50 equal bins of (0, 1]."""
    edges = np.tile(np.linspace(0, 1, 51, dtype=np.float32), rows)
    counts = generator.integers(0, 99, rows * 50)
    parts = [
        pa.ListArray.from_arrays(np.arange(0, rows * k + 1, k, dtype=np.int32), pa.array(values))
        for k, values in ((51, edges), (50, counts))
    ]
    return pa.StructArray.from_arrays(parts, ["edges", "counts"])


def table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns as the schema has them."""
    arrays = {f.name: pa.array(columns[f.name]).cast(f.type) for f in schema}
    return pa.table(arrays, schema)


def say(name: str, text: str) -> None:
    print(f"  {name:<27}{text}", flush=True)


def memory() -> str:
    """Of the largest renderer process, now and at its peak."""
    now, peak = renderer_megabytes("VmRSS"), renderer_megabytes("VmHWM")
    return f"{now:8.0f} MB, {peak:.0f} MB"


def feature_rows(
    ids: np.ndarray, n: int, vocabulary: pa.Array, generator: np.random.Generator
) -> pa.Table:
    """Rows of features.parquet: ten of everything; two in a hundred are dead."""
    m = len(ids)
    fired = (generator.lognormal(4, 2, m) * (generator.random(m) > 0.02)).astype(np.int64)
    fired = np.minimum(fired, ROWS * WIDTH)

    def tokens() -> pa.Array:
        chosen = generator.integers(0, WORDS, 10 * m, np.int32)
        values = generator.random(10 * m, np.float32)
        return lists(m, 10, token=chosen, piece=vocabulary.take(pa.array(chosen)), value=values)

    def others(name: str, most: int) -> pa.Array:
        chosen = generator.integers(0, most, 10 * m, np.int32)
        return lists(m, 10, **{name: chosen, "value": generator.random(10 * m, np.float32)})

    xy = pa.array(generator.standard_normal(2 * m, np.float32))
    columns = {
        "feature": ids, "density": fired / (ROWS * WIDTH), "n_fired": fired,
        "max": generator.lognormal(0, 1, m).astype(np.float32) * (fired > 0),
        "mean": pa.array(generator.random(m, np.float32), mask=fired == 0),
        "histogram": histograms(m, generator), "logit_histogram": histograms(m, generator),
        **{name: tokens() for name in ("top_tokens", "writes", "suppresses", "reads")},
        "neurons": others("neuron", D_IN), "participation": 1 + 9 * generator.random(m, np.float32),
        "neighbours": others("feature", n), "cofiring": others("feature", n),
        "correlated_neurons": others("neuron", D_IN),
        "map_xy": pa.ListArray.from_arrays(np.arange(0, 2 * m + 1, 2, dtype=np.int32), xy),
        "label": pa.nulls(m, pa.string()),
    }  # fmt: skip
    return table(columns, FEATURES_SCHEMA)


def example_rows(ids: np.ndarray, vocabulary: pa.Array, generator: np.random.Generator) -> pa.Table:
    """Rows of examples.parquet, each with three activations."""
    per = sum(EXAMPLES.values())
    m = per * len(ids)
    column = generator.integers(3, WIDTH, m, np.int32)
    peak = generator.random(m, np.float32)
    at = np.stack([column - 3, column - 1, column], 1).ravel()
    ends = np.arange(0, 3 * m + 1, 3, dtype=np.int32)
    kinds = [kind for kind, count in EXAMPLES.items() for _ in range(count)]
    ranks = [rank for count in EXAMPLES.values() for rank in range(count)]

    def words() -> pa.Array:
        return vocabulary.take(pa.array(generator.integers(0, WORDS, m)))

    columns = {
        "feature": np.repeat(ids, per), "kind": kinds * len(ids), "rank": ranks * len(ids),
        "document": np.zeros(m), "position": column, "row": generator.integers(0, ROWS, m),
        "column": column, "peak": peak, "low": np.zeros(m), "high": np.ones(m),
        "duplicates": np.zeros(m), "before": words(), "token": words(), "after": words(),
        "indices": pa.ListArray.from_arrays(ends, pa.array(at)),
        "values": pa.ListArray.from_arrays(ends, pa.array(np.repeat(peak, 3))),
    }  # fmt: skip
    return table(columns, EXAMPLES_SCHEMA)


@contextmanager
def browsing(run: Path) -> Iterator[str]:
    """`sae browse RUN`; yields its address."""
    command = [sys.executable, "-m", "sae.cli", "browse", str(run)]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found, "the server did not start"
        say("server started", f"{time.perf_counter() - start:8.2f} s")
        yield found[0]
    finally:
        server.terminate()
        server.wait()


def renderer_megabytes(name: str) -> float:
    """The largest renderer process: VmRSS (now) or VmHWM (its peak)."""
    found = [0.0]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"--type=renderer" in (process / "cmdline").read_bytes():
                lines = (process / "status").read_text().splitlines()
                found += [int(x.split()[1]) / 1e3 for x in lines if x.startswith(f"{name}:")]
        except OSError:
            continue
    return max(found)


def cpu_seconds() -> float:
    """CPU time so far of all processes of Chromium and of `sae browse`."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if re.search(rb"chromium|sae.cli\0browse", (process / "cmdline").read_bytes()):
                after = (process / "stat").read_text().rpartition(")")[2].split()
                total += int(after[11]) + int(after[12])
        except OSError:
            continue
    return total / os.sysconf("SC_CLK_TCK")


def measure(browser: Any, address: str, n: int) -> None:
    """Open the list, sort, search, and open features; print each time."""
    times, busy = [], []
    for _ in range(TIMES):
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.add_init_script(LISTED)
        before = cpu_seconds()
        tab.goto(address)
        tab.wait_for_selector("main:not([aria-busy])")
        times.append(tab.evaluate("listed"))
        busy.append(1e3 * (cpu_seconds() - before))
        if len(times) < TIMES:
            tab.close()
    say(f"first list, {TIMES} times", ", ".join(f"{x:.0f}" for x in times) + " ms")
    say("  of CPU time, whole page", ", ".join(f"{x:.0f}" for x in busy) + " ms")
    before = cpu_seconds()
    sorts = [tab.evaluate(CLICK, name) for name in ("Max", "Neurons", "Density", "Max", "Max")]
    say("sort, slowest of 5", f"{max(sorts):8.0f} ms")
    say("  of CPU time, mean", f"{1e3 * (cpu_seconds() - before) / len(sorts):8.0f} ms")
    took, said = tab.evaluate(SEARCH, "abc")
    say("search in tokens", f"{took:8.0f} ms  ({said})")
    say("renderer, now and peak", memory())
    draw = random.Random(0)
    before = cpu_seconds()
    pages = sorted(tab.evaluate(GO, f"#/0/feature/{draw.randrange(n)}") for _ in range(OPENED))
    say(
        "feature page, p50, p95",
        f"{pages[OPENED // 2]:8.0f} ms, {pages[OPENED * 95 // 100]:.0f} ms",
    )
    say("  of CPU time, mean", f"{1e3 * (cpu_seconds() - before) / OPENED:8.0f} ms")
    say("renderer, now and peak", memory())
    say("map", f"{tab.evaluate(GO, '#/0/map'):8.0f} ms")
    tab.close()


def static(run: Path, out: Path) -> None:
    """`sae export --format html`, its time and size."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "sae.cli", "export", str(run), "--format", "html"]
    start = time.perf_counter()
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    sizes = [file.stat().st_size for file in out.rglob("*") if file.is_file()]
    say(
        "static export",
        f"{time.perf_counter() - start:8.0f} s, {sum(sizes) / 1e6:.0f} MB, {len(sizes)} files",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--features", type=int, nargs="+", default=[25_000, 1_000_000])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--without-static", action="store_true")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp())
    from playwright.sync_api import sync_playwright

    for n in given.features:
        run, start = folder / str(n), time.perf_counter()
        print(f"{n:,} features, load average {os.getloadavg()[0]:.1f}")
        if not run.exists():
            make(run, n)
            say("made", f"{time.perf_counter() - start:8.0f} s")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=given.chromium, args=FLAGS)
            with browsing(run) as address:
                measure(browser, address, n)
            if n <= 100_000 and not given.without_static:
                static(run, folder / f"{n}-html")
                print("  by double click:")
                measure(browser, (folder / f"{n}-html" / "index.html").as_uri(), n)
            browser.close()


if __name__ == "__main__":
    main()
