"""Features in a terminal: a table of many, a page of one, a prompt token by token, an evaluation.

Text of tokens passes through `text.visible` into `rich.Text`, never into markup. Where there is no
colour (NO_COLOR, a pipe) the marked token stands in «»; where there is, it is bold and underlined.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sae.records import (
    Context,
    Example,
    FeatureDictionary,
    FeatureRecord,
    FeatureValue,
    Histogram,
    NeuronValue,
    TokenValue,
)
from sae.store import read_manifest
from sae.text import counted, visible

if TYPE_CHECKING:  # it needs torch, which tables of features do without
    from sae.evaluation import Estimate, Evaluation

_PALE, _STRONG = (255, 236, 210), (255, 128, 0)
_BARS = " ▁▂▃▄▅▆▇█"
_BEFORE, _AFTER = 24, 12
"""Tokens of context on a feature's page."""
TOKEN, LABEL = 80, 400
"""Characters shown of one token, and of a label: a token may be a megabyte."""
_BESIDE_EXAMPLE = 40
"""Cells that the columns of numbers and the gaps need in the table."""


def make_console(file: TextIO | None = None) -> Console:
    """A console that prints text as it is given, without finding markup, emoji or numbers in it."""
    return Console(file=file, markup=False, emoji=False, highlight=False)


def feature_table(
    dictionary: FeatureDictionary, features: Sequence[int], console: Console
) -> Table:
    """A line for each feature: density, max, its strongest example and the tokens it promotes."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("feature", "density", "max"):
        table.add_column(name, justify="right", no_wrap=True, min_width=7)
    promotes = 28 if console.width >= 100 else 14
    width = max(20, console.width - _BESIDE_EXAMPLE - promotes)
    table.add_column("strongest example", no_wrap=True, overflow="crop", min_width=width)
    table.add_column("promotes", no_wrap=True, overflow="ellipsis", max_width=promotes)
    strongest = {e.feature: e for e in dictionary.examples(features, "top") if e.rank == 0}
    for record in dictionary.records(features):
        example = strongest.get(record.feature)
        shown = Text("never fires", style="dim")
        if example is not None:
            shown = _snippet(dictionary.context(example), record.max, width, _plain(console))
        table.add_row(
            str(record.feature),
            _percent(record.density),
            _number(record.max),
            shown,
            _pieces(record.writes if record.writes is not None else record.top_tokens),
        )
    return table


def feature_page(dictionary: FeatureDictionary, feature: int, console: Console) -> RenderableType:
    """All about one feature: numbers, histogram, tokens, neurons, neighbours, examples."""
    record = dictionary.records([feature])[0]
    manifest = read_manifest(dictionary.folder)
    origin = " of ".join(_shown(manifest[key]) for key in ("hookpoint", "model") if key in manifest)
    title = Text(f"Feature {feature}", style="bold").append(f"  {origin}", style="not bold dim")
    if record.label:
        title.append(f"\n{_shown(record.label, LABEL)}", style="not bold")
    parts: list[RenderableType] = [title, Text(), _statistics(record)]
    if record.histogram is not None:
        parts += [Text(), _bars(record.histogram)]
    parts += [Text(), _token_lists(record), *_relations(record)]
    parts += _examples(dictionary, record, _plain(console))
    return Group(*parts)


def prompt_view(
    found: Sequence[tuple[str, Sequence[tuple[int, float]]]], console: Console
) -> Table:
    """The features of a prompt: a line for each token, its features strongest first."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("token", no_wrap=True)
    table.add_column("features (activation)")
    top = max((act for _, pairs in found for _, act in pairs), default=0.0)
    for piece, pairs in found:
        line = Text()
        for feature, act in pairs:
            style = Style() if _plain(console) else _shade(act, top)
            line.append(f" {feature} ", style=style).append(f"({_number(act)})  ")
        table.add_row(Text(_listed(piece)), line)
    return table


def evaluation_table(evaluation: "Evaluation", name: str | None = None) -> RenderableType:
    """The numbers of one SAE, those of its k largest neurons below, each ± its standard error.

    `name`: the SAE's; its hookpoint where None.
    """
    e, ce = evaluation, evaluation.cross_entropy
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column()
    for column in ("FVU", "L0", "CE recovered", "(zero)"):
        table.add_column(column, justify="right")
    recovered = (ce and ce.recovered_mean, ce and ce.recovered_zero)
    table.add_row("SAE", _estimate(e.fvu), _estimate(e.l0, 1), *map(_estimate, recovered))
    for site in e.sites:
        ce_alone = site.cross_entropy
        recovered = (ce_alone and ce_alone.recovered_mean, ce_alone and ce_alone.recovered_zero)
        alone = (_shown(site.hookpoint), _estimate(site.fvu), "", *map(_estimate, recovered))
        table.add_row(*alone)
    for neurons in e.baseline:
        numbers = _estimate(neurons.fvu), f"{neurons.k}", _estimate(neurons.ce_recovered_mean)
        table.add_row(counted(neurons.k, "neuron"), *numbers)
    if e.neurons_l0 is not None:
        table.add_row("all neurons", "", _estimate(e.neurons_l0, 1))
    to = f" → {e.d_out}" if e.d_out != e.d_in else ""
    size = f"{e.d_in} → {e.d_sae:,} features{to}, {e.n_tokens:,} held-out tokens"
    title = Text(visible(name or e.hookpoint), style="bold").append(
        f"  {size}", style="not bold dim"
    )
    return Group(title, table, *(Text(line, style="dim") for line in _remarks(evaluation)))


def _remarks(evaluation: "Evaluation") -> Iterator[str]:
    """What stands below the table, a line each."""
    e, ce = evaluation, evaluation.cross_entropy
    dead, dense = (_percent(share.value or 0) for share in (e.dead, e.dense))
    yield f"dead {dead}, dense {dense} of the features"
    if ce is not None:
        yield (
            f"cross-entropy {_estimate(ce.model)} nats, with the SAE {_estimate(ce.sae)}, "
            f"mean-ablated {_estimate(ce.mean_ablated)}, zero-ablated {_estimate(ce.zero_ablated)}"
        )
    if e.baseline:
        yield "neurons: the k largest of each token as they are, the others at their mean"
    if e.sites:
        yield "each hookpoint: replaced alone, the others as the model has them"
    yield from e.notes


def _estimate(estimate: "Estimate | None", digits: int = 3) -> str:
    """value ± standard error; – where there is none."""
    if estimate is None or estimate.value is None:
        return "–"
    error = "" if estimate.se is None else f" ± {estimate.se:.{digits}f}"
    return f"{estimate.value:.{digits}f}{error}"


def _plain(console: Console) -> bool:
    """Whether colours would not be seen."""
    return console.no_color or console.color_system is None


def _percent(share: float) -> str:
    return f"{share:.3%}" if share < 0.1 else f"{share:.1%}"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _shade(act: float, top: float) -> Style:
    """From pale to strong orange by the share of the maximum; nothing at 0."""
    if act <= 0 or top <= 0:
        return Style()
    share = min(1.0, act / top)
    red, green, blue = (round(p + (s - p) * share) for p, s in zip(_PALE, _STRONG, strict=True))
    return Style.parse(f"black on rgb({red},{green},{blue})")


def _token(context: Context, index: int, top: float, plain: bool) -> Text:
    """One token of a context, shaded by its activation, the marked one marked."""
    shown = _shown(context.pieces[index])
    marked = index == context.peak
    if plain:
        return Text(f"«{shown}»" if marked else shown)
    style = _shade(context.acts[index], top)
    return Text(shown, style=style + Style(bold=True, underline=True) if marked else style)


def _snippet(context: Context, top: float, width: int, plain: bool) -> Text:
    """The marked token and as much around it as fits in `width` cells, twice as much before."""
    peak = _token(context, context.peak, top, plain)
    room = max(0, width - cell_len(peak.plain))
    last = len(context.pieces)
    after = _fill(context, range(context.peak + 1, last), top, room // 3, plain)
    used = sum(cell_len(token.plain) for token in after)
    before = _fill(context, range(context.peak - 1, -1, -1), top, room - used, plain)
    return Text.assemble(*reversed(before), peak, *after)


def _fill(context: Context, order: Iterable[int], top: float, room: int, plain: bool) -> list[Text]:
    """Tokens in `order` until they take up `room` cells."""
    found = []
    for index in order:
        token = _token(context, index, top, plain)
        room -= cell_len(token.plain)
        if room < 0:
            break
        found.append(token)
    return found


def _pieces(tokens: Sequence[TokenValue]) -> Text:
    """Tokens side by side, without the space that most begin with."""
    return Text("  ".join(_listed(token.piece).strip(" ") for token in tokens))


def _listed(piece: str) -> str:
    """A token on its own, visible even where it is nothing but spaces."""
    return _shown(piece) if piece.strip(" ") else _shown("␣" * min(len(piece), 2 * TOKEN))


def _shown(text: object, limit: int = TOKEN) -> str:
    """Text on one line and harmless, only its start where it is very long."""
    text = str(text)
    return visible(text) if len(text) <= limit else f"{visible(text[:limit])}…"


def _statistics(record: FeatureRecord) -> Table:
    """The numbers of a feature; those that do not exist are left out."""
    values = {
        "density": f"{_percent(record.density)} of tokens",
        "fires on": counted(record.n_fired, "token"),
        "max": _number(record.max),
        "mean when firing": None if record.mean is None else _number(record.mean),
        "neurons": None
        if record.participation is None
        else f"{record.participation:.1f} effective",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in values.items():
        if value is not None:
            table.add_row(Text(name, style="dim"), value)
    return table


def _bars(histogram: Histogram) -> Text:
    """The histogram on one line; heights are logarithmic, so that one token is seen beside 10⁵."""
    most = math.log1p(max(histogram.counts))
    steps = (math.ceil(math.log1p(count) / most * (len(_BARS) - 1)) for count in histogram.counts)
    bars = "".join(_BARS[step] for step in steps)
    line = Text(f"{_number(histogram.edges[0])} ", style="dim")
    line.append(bars, style="not dim")
    return line.append(f" {_number(histogram.edges[-1])}  activations, log counts")


def _token_lists(record: FeatureRecord) -> Table:
    """Side by side, the tokens it fires on, reads, promotes and suppresses."""
    lists = {
        "fires on": record.top_tokens,
        "reads": record.reads,
        "promotes": record.writes,
        "suppresses": record.suppresses,
    }
    there = {name: tokens for name, tokens in lists.items() if tokens}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in there:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for rank in range(max(map(len, there.values()), default=0)):
        cells = (tokens[rank] if rank < len(tokens) else None for tokens in there.values())
        table.add_row(*(_cell(cell, rank_of) for cell, rank_of in zip(cells, there, strict=True)))
    return table


def _cell(token: TokenValue | None, name: str) -> Text:
    if token is None:
        return Text()
    value = _percent(token.value) if name == "fires on" else f"{token.value:+.3g}"
    return Text(_listed(token.piece)).append(f" {value}", style="dim")


def _relations(record: FeatureRecord) -> list[RenderableType]:
    """A line each for neurons and neighbours."""
    found: list[RenderableType] = []
    lists: dict[str, Sequence[NeuronValue | FeatureValue] | None] = {
        "largest neurons": record.neurons,
        "nearest features": record.neighbours,
    }
    for name, items in lists.items():
        if items:
            line = Text(f"{name}  ", style="dim")
            for item in items:
                number = item.neuron if isinstance(item, NeuronValue) else item.feature
                line.append(f"{number}", style="not dim").append(f" ({item.value:+.2f})  ")
            found.append(line)
    return found


def _examples(
    dictionary: FeatureDictionary, record: FeatureRecord, plain: bool
) -> list[RenderableType]:
    """Examples under their headings: the strongest, each interval, the random ones."""
    examples = dictionary.examples([record.feature])
    groups = {"Strongest, one a sequence": [e for e in examples if e.kind == "top"]}
    for low, high, count in record.intervals:
        share = count / max(1, record.n_fired)
        name = f"From {_number(low)} to {_number(high)}, {share:.1%} of its activations"
        groups[name] = [e for e in examples if e.kind == "interval" and e.low == low]
    groups["Random, of all tokens it fires on"] = [e for e in examples if e.kind == "random"]
    found: list[RenderableType] = []
    for name, members in groups.items():
        if members:
            found += [Text(), Text(name, style="bold"), _lines(dictionary, members, record, plain)]
    return found


def _lines(
    dictionary: FeatureDictionary, examples: Sequence[Example], record: FeatureRecord, plain: bool
) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for example in examples:
        context = dictionary.context(example).window(_BEFORE, _AFTER)
        tokens = [_token(context, i, record.max, plain) for i in range(len(context.pieces))]
        line = Text.assemble(*tokens)
        if example.duplicates:
            line.append(f"  (+{example.duplicates} alike)", style="dim")
        table.add_row(_number(example.peak), line)
    return Padding(table, (0, 0, 0, 2))
