"""Draw a run's features, as `sae top` shows them, into an SVG.

python scripts/picture.py checkpoints/quickstart docs/features.svg --limit 14
"""

import argparse
import io
import re
from pathlib import Path

from rich.console import Console

from sae.records import FeatureDictionary
from sae.store import Run
from sae.terminal import feature_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("svg")
    parser.add_argument("--limit", type=int, default=14)
    args = parser.parse_args()
    dictionary = FeatureDictionary(Run(args.run).features())
    console = Console(
        record=True, width=104, file=io.StringIO(), force_terminal=True,
        color_system="truecolor", markup=False, highlight=False,
    )  # fmt: skip
    console.print(feature_table(dictionary, dictionary.sample(args.limit, 0), console))
    svg = console.export_svg(title=f"sae top {args.run} --sample 0 --limit {args.limit}")
    svg = re.sub(r"@font-face \{.*?\}\n?", "", svg, flags=re.DOTALL)  # fonts from a server
    Path(args.svg).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
