"""Tables and pages fit the terminal, mark the same token with and without colour, and let no text
from the model reach the terminal as a command or as markup."""

import io
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import D_SAE, DEAD, SITE, Planted
from rich.cells import cell_len
from rich.console import Console
from safetensors.numpy import load_file, save_file

from sae import cli, store
from sae.evaluation import (
    CrossEntropy,
    Density,
    Estimate,
    Evaluation,
    NeuronBaseline,
    SiteEvaluation,
)
from sae.records import FEATURES_SCHEMA, Context, FeatureDictionary
from sae.terminal import (
    _plain,
    _snippet,
    evaluation_table,
    feature_page,
    feature_table,
    make_console,
    prompt_view,
)

ALIVE = 30
NASTY = "\x1b[31m\x07[bold]\u202e\u200b:smile:\n\x9b2J\x7f\u2066\u200d\ud800\u2028\ufeff\r\x08"


def console(width: int = 100, colour: bool = False) -> Console:
    made = make_console(io.StringIO())
    made.width = width
    return made if not colour else Console(
        file=io.StringIO(), force_terminal=True, color_system="truecolor", width=width,
        markup=False, emoji=False, highlight=False, legacy_windows=False, _environ={},
    )  # fmt: skip


def printed(what: Any, to: Console) -> str:
    to.print(what)
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_has_a_line_for_each_feature_and_fits(
    dictionary: FeatureDictionary, width: int
) -> None:
    features = dictionary.ranked()
    to = console(width)
    lines = printed(feature_table(dictionary, features, to), to).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    shown = [line.split()[0] for line in lines if re.match(r" *\d", line)]
    assert shown == [str(feature) for feature in features]
    for feature, line in zip(features, lines[-1 - len(features) :], strict=False):
        assert ("«" in line and "»" in line) or width < 80 or "never fires" in line, feature


def test_a_page_shows_every_example_with_its_mark(dictionary: FeatureDictionary) -> None:
    to = console(400)
    page = printed(feature_page(dictionary, ALIVE, to), to)
    for example in dictionary.examples([ALIVE]):
        window = dictionary.context(example).window(24, 12)
        marked = f"«{example.token}»" if example.token.isprintable() else "«"
        assert marked in page and len(window.pieces) <= 37
    record = dictionary.records([ALIVE])[0]
    assert f"{record.n_fired} tokens" in page and "layers.1.mlp_act of tiny" in page
    for word in ("promotes", "suppresses", "reads", "fires on", "effective", "nearest features"):
        assert word in page
    for low, high, _ in record.intervals:
        assert f"From {low:.3g} to {high:.3g}" in page


def test_a_feature_that_never_fires_has_a_page_too(dictionary: FeatureDictionary) -> None:
    to = console()
    page = printed(feature_page(dictionary, DEAD, to), to)
    assert "0 tokens" in page and "nearest features" in page and "Strongest" not in page


def test_colour_shades_by_activation_and_marks_the_token() -> None:
    context = Context(["a", " b", " c"], [0.0, 1.0, 4.0], 2)
    text = _snippet(context, 4.0, 40, plain=False)
    styles = {text.plain[s.start : s.end]: str(s.style) for s in text.spans}
    assert text.plain == "a b c" and "a" not in styles
    assert styles[" b"] == "black on rgb(255,209,158)"
    assert "on rgb(255,128,0)" in styles[" c"] and "underline" in styles[" c"]
    assert _snippet(context, 4.0, 40, plain=True).plain == "a b« c»"
    coloured = printed(text, console(colour=True))
    assert "48;2;255;128;0" in coloured


def test_a_snippet_keeps_its_mark_and_its_width() -> None:
    pieces = [f" w{i}" for i in range(50)]
    for peak in (0, 1, 25, 49):
        context = Context(pieces, [1.0] * 50, peak)
        for width in (8, 20, 60):
            text = _snippet(context, 1.0, width, plain=True).plain
            assert f"« w{peak}»" in text and cell_len(text) <= width


def test_no_color_and_pipes_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert _plain(make_console(io.StringIO()))
    assert not _plain(console(colour=True))
    monkeypatch.setenv("NO_COLOR", "1")
    assert _plain(Console(force_terminal=True, color_system="truecolor"))


def test_text_of_tokens_is_neither_command_nor_markup(made: Planted, tmp_path: Path) -> None:
    """The worst token everywhere a token can be: nothing unprintable comes out, brackets stay."""
    dictionary = FeatureDictionary(made.folder / "features")
    record = dictionary.records([ALIVE])[0]
    worst = replace(record.top_tokens[0], piece=NASTY)
    fake = _Nasty(dictionary, replace(record, top_tokens=[worst], writes=[worst], label=NASTY))
    to = console(200)
    out = printed(feature_page(fake, ALIVE, to), to) + printed(feature_table(fake, [ALIVE], to), to)
    out += printed(prompt_view([(NASTY, [(1, 2.0)])], to), to)
    assert all(line.isprintable() for line in out.split("\n"))
    assert "[bold]" in out and ":smile:" in out and "\\x1b[31m" in out


class _Nasty(FeatureDictionary):
    """A dictionary whose every token is hostile."""

    def __init__(self, genuine: FeatureDictionary, record: Any, piece: str = NASTY) -> None:
        super().__init__(genuine.folder)
        self.record, self.piece = record, piece

    def records(self, features: Any) -> list[Any]:
        return [self.record for _ in features]

    def context(self, example: Any) -> Context:
        genuine = super().context(example)
        return replace(genuine, pieces=[self.piece] * len(genuine.pieces))


LONG = 1 << 20


def views(made: Planted, piece: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, float]:
    """What shows a dictionary whose every token is `piece`, and seconds of this process's time."""
    dictionary = FeatureDictionary(made.folder / "features")
    record = dictionary.records([ALIVE])[0]
    few = [example for example in dictionary.examples([ALIVE]) if example.rank == 0]
    token = replace(record.top_tokens[0], piece=piece)
    fake = _Nasty(
        dictionary, replace(record, top_tokens=[token], writes=[token], label=piece), piece
    )
    monkeypatch.setattr(fake, "examples", lambda *_: few)
    to, start = console(100), time.process_time()
    out = printed(feature_page(fake, ALIVE, to), to) + printed(feature_table(fake, [ALIVE], to), to)
    out += printed(prompt_view([(piece, [(1, 2.0)])] * 3, to), to)
    return out, time.process_time() - start


@pytest.mark.parametrize("piece", ["a", "\x1b[2J", "日", "\u202e", "\ud800", " ", "a\u0301", "\n"])
def test_a_token_of_a_megabyte_is_shown_in_part_and_costs_no_more_than_that(
    made: Planted, piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = LONG // len(piece)
    part, seconds_of_part = views(made, piece * (count // 64), monkeypatch)
    out, seconds = views(made, piece * count, monkeypatch)
    assert out == part and seconds < 8 * seconds_of_part  # of 64 times the text
    assert all(line.isprintable() and cell_len(line) <= 100 for line in out.split("\n"))


@pytest.mark.parametrize(
    "args", [["--feature", f"{ALIVE}"], [], ["--search", "bold"], ["--sample", "1"]]
)
def test_sae_top_shows_a_hostile_dictionary_harmlessly(
    made: Planted, tmp_path: Path, args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Hostile tokens, text, label and origin in the files themselves, under a sound manifest."""
    run = Path(shutil.copytree(made.folder.parents[1], tmp_path / "run"))
    features = run / "saes" / SITE / "features"
    nasty = NASTY.replace("\ud800", "")  # Parquet holds UTF-8 only
    rows = pq.read_table(features / "features.parquet").to_pylist()
    for row in rows:
        row["label"] = nasty
        for token in [*row["top_tokens"], *(row["writes"] or []), *(row["reads"] or [])]:
            token["piece"] = nasty * (50_000 if row["feature"] == ALIVE else 1)
    pq.write_table(pa.Table.from_pylist(rows, FEATURES_SCHEMA), features / "features.parquet")
    tokens = load_file(features / "tokens.safetensors")
    raw = np.resize(np.frombuffer(nasty.encode(), np.uint8), len(tokens["piece_bytes"]))
    save_file(tokens | {"piece_bytes": raw}, features / "tokens.safetensors")
    manifest = store.read_manifest(features)
    origin = {k: v for k, v in manifest.items() if k not in store.OWN_KEYS} | {"model": nasty}
    store.write_manifest(features, origin)
    assert cli.main(["top", str(run), *args]) == 0
    out = capsys.readouterr().out
    assert "[bold]" in out and "\\x1b[31m" in out
    assert all(line.isprintable() for line in out.split("\n"))


def test_a_prompt_has_a_line_for_each_token() -> None:
    found = [("The", []), (" cat", [(12, 3.5), (7, 0.25)]), ("\n", [(7, 1.0)]), (" ", [])]
    to = console()
    lines = printed(prompt_view(found, to), to).splitlines()
    body = [line.split() for line in lines if line.split()[:1] and line.split()[0] in "The cat ↵ ␣"]
    assert body == [["The"], ["cat", "12", "(3.5)", "7", "(0.25)"], ["↵", "7", "(1)"], ["␣"]]


def test_pages_need_nothing_computed_later(made: Planted) -> None:
    table = pq.read_table(made.folder / "features/features.parquet")
    assert len(table) == D_SAE
    assert table["label"].null_count == D_SAE


def evaluation(**changes: Any) -> Evaluation:
    ce = CrossEntropy(*(Estimate(x, 0.01) for x in (2.0, 2.1, 4.0, 9.0)), Estimate(0.95, 0.002),
                      Estimate(0.98, 0.001))  # fmt: skip
    values = {
        "hookpoint": "layers.1.mlp_act", "d_in": 24, "d_out": 24, "d_sae": 192, "n_tokens": 100_000,
        "n_sequences": 400, "fvu": Estimate(0.1234, 0.0056), "l0": Estimate(16.04, 0.2),
        "dead": Estimate(0.05), "dense": Estimate(0.25), "density": Density((), ()),
        "cross_entropy": ce, "notes": ("the text ended early",),
        "baseline": (NeuronBaseline(16, Estimate(0.4, 0.01), Estimate(0.7, 0.02)),),
        "neurons_l0": Estimate(9.87, 0.1), "sites": (),
    }  # fmt: skip
    return Evaluation(**(values | changes))


def test_an_evaluation_has_its_numbers_with_their_errors() -> None:
    to = console(80)
    shown = " ".join(printed(evaluation_table(evaluation()), to).split())
    named = printed(evaluation_table(evaluation(), "layers.1.mlp_act-k=4"), console(80))
    assert named.startswith("layers.1.mlp_act-k=4  24 → 192 features")
    for words in (
        "layers.1.mlp_act 24 → 192 features, 100,000 held-out tokens",
        "SAE 0.123 ± 0.006 16.0 ± 0.2 0.950 ± 0.002 0.980 ± 0.001",
        "16 neurons 0.400 ± 0.010 16 0.700 ± 0.020",
        "all neurons 9.9 ± 0.1",
        "dead 5.000%, dense 25.0% of the features",
        "cross-entropy 2.000 ± 0.010 nats, with the SAE 2.100 ± 0.010",
        "the text ended early",
    ):
        assert words in shown, words


def test_an_evaluation_of_a_map_shows_its_targets_one_by_one() -> None:
    ce = evaluation().cross_entropy
    sites = tuple(SiteEvaluation(f"layers.{i}.mlp_out", Estimate(0.2 + i), ce) for i in range(2))
    found = evaluation_table(evaluation(d_in=48, d_out=16, sites=sites))
    shown = " ".join(printed(found, console(80)).split())
    for words in (
        "48 → 192 features → 16",
        "layers.1.mlp_out 1.200 0.950 ± 0.002 0.980 ± 0.001",
        "each hookpoint: replaced alone",
    ):
        assert words in shown, words


def test_an_evaluation_says_what_it_does_not_have() -> None:
    to = console(60)
    bare = evaluation(
        cross_entropy=None, baseline=(), neurons_l0=None, fvu=Estimate(None), notes=()
    )
    out = printed(evaluation_table(bare), to)
    assert "–" in out and "neurons" not in out and "nats" not in out
    assert all(cell_len(line) <= 60 for line in out.splitlines())
