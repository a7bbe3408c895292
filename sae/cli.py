"""The `sae` command: parse, call, print.

Options and YAML go through one check (`config.resolve`), so argparse only collects text. torch is
imported by the verbs that need it, after the mistakes that can be found without it.
"""

import argparse
import io
import os
import re
import shlex
import sys
import warnings
import webbrowser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, cast

from sae import __version__
from sae.errors import ConfigError, FormatError, RunError, SAEError, suggest
from sae.text import visible

LONG = 500
_IMPORTED = {"hookpoints", "inputs", "targets", "output", "model", "data"}
"""Settings, and groups of them, that an imported run takes."""
VERBS: dict[str, tuple[str, Callable[[list[str]], int | None]]] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns 0, 2 for what the user can mend, 1 for our mistakes.

    130 after Ctrl-C and 143 after SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ‖ or → still gets the rest
    try:
        with _calm_warnings(debug):
            try:
                return _dispatch(args)
            finally:
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("sae: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if debug:
            raise
        lines, code = _told(error)
        for line in lines:
            print(f"sae: {_shortened(visible(line))}", file=sys.stderr)
        return code
    return 0


def _shortened(line: str) -> str:
    """A line without the middle of what is far too long in it."""
    return line if len(line) <= 2 * LONG else f"{line[:LONG]} … {line[-LONG:]}"


def _told(error: Exception) -> tuple[list[str], int]:
    """What to say of an error, and the exit code."""
    text = str(error)
    first = (text.splitlines() or [""])[0][:200]
    if isinstance(error, SAEError):
        return text.splitlines(), 2
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate" in text:
        return [f"out of memory ({first})", "  lower optim.pool, optim.llm_batch or sae.d_sae"], 2
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return [f"{where}{error.strerror}; check the path, its permissions and the disk"], 2
    unexpected = f"unexpected {type(error).__name__}: {first}"
    return [unexpected, "  this is our mistake; --debug shows where it happened"], 1


def _dispatch(args: list[str]) -> int:
    if args[:1] == ["--debug"]:
        args = args[1:]
    _refuse_unusable(args)
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
    elif verb == "--version":
        print(__version__)
    elif verb in VERBS:
        return VERBS[verb][1](args[1:]) or 0
    else:
        hint = suggest(verb, VERBS) or "; sae --help tells what they do"
        raise RunError(f"no verb {verb!r}; there are {', '.join(VERBS)}{hint}")
    return 0


def _refuse_unusable(args: list[str]) -> None:
    """What no file can be called, nor any text hold."""
    for arg in args:
        try:
            usable = b"\0" not in os.fsencode(arg)
        except UnicodeEncodeError:  # half of a pair of surrogates
            usable = False
        if not usable:
            raise ConfigError(f"{arg!r} holds a character that no name or text may; remove it")


def _overview() -> str:
    lines = [
        "sae: train sparse autoencoders on a language model, read their features, export them",
        "",
        *(f"  sae {name:<9} {text}" for name, (text, _) in VERBS.items()),
        "",
        "sae VERB --help tells its options. Start with: sae train",
        "--debug shows the traceback of an error; --version the version.",
    ]
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are SAEErrors; `--a-b` and `--a_b` are the same option."""

    def __init__(self, verb: str, usage: str):
        super().__init__(
            prog=f"sae {verb}",
            usage=f"sae {verb} {usage}",
            description=VERBS[verb][0],
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        # argparse's own does not know -1e-3, and would take it for an option
        self._negative_number_matcher = re.compile(r"-\.?(\d|inf|nan)")

    def error(self, message: str) -> NoReturn:
        """Every mistake argparse finds."""
        message = re.sub(r"^argument (\S+): expected.*", r"\1: its value is missing", message)
        raise ConfigError(f"{message}\n  {self.prog} --help tells the options")

    def read(self, args: list[str]) -> dict[str, object]:
        """Option → text (or list of texts) of everything that was given.

        Raises ConfigError with a line for each option that does not exist.
        """
        given, mistakes = self.sift(args)
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        return vars(self.parse_args(given))

    def sift(self, args: list[str]) -> tuple[list[str], list[str]]:
        """`args` with the names of options as we know them; a line for each we do not know.

        What stands behind an option of one value is that value, dashes or not, but for options.
        """
        known = {s: action for action in self._actions for s in action.option_strings}
        kept, mistakes, skipping = [], [], False
        rest = list(args)
        while rest:
            arg = rest.pop(0)
            name, equals, value = arg.partition("=")
            option = _spelt(name)
            if self._negative_number_matcher.match(arg):
                kept.append(arg)
            elif option in known:
                skipping = False
                if known[option].nargs is None and not equals and rest:
                    behind = _spelt(rest[0].partition("=")[0])
                    equals, value = ("", "") if behind in known else ("=", rest.pop(0))
                kept.append(option + equals + value)
            elif arg == "--debug":
                continue
            elif re.fullmatch(r"--?[a-zA-Z][\w.-]*", name):
                hint = _nearest(option[2:], known) or f"; {self.prog} --help tells the options"
                mistakes.append(f"{name}: no such option{hint}")
                skipping = not equals
            elif not skipping:
                kept.append(arg)
        return kept, mistakes


def _spelt(name: str) -> str:
    """The name of an option with underscores, anything else as it is."""
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name


def _nearest(name: str, known: Iterable[str]) -> str:
    """The options that end in `name`, or the one most like it; of a grid only for one of a grid."""
    grid, of_grid = "--grid.", name.startswith("grid.")
    known = [option for option in known if option.startswith(grid) == of_grid]
    tails = [option for option in known if option.endswith("." + name.removeprefix("grid."))]
    if tails:
        return f"; did you mean {' or '.join(tails)}?"
    return suggest(f"--{name}", known)


def _verb(name: str, text: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        VERBS[name] = (text, function)
        return function

    return register


@_verb("train", "train an SAE for each hookpoint, or many in a grid of settings")
def train(args: list[str]) -> int:
    """sae train."""
    from sae import config

    parser = Parser("train", "[CONFIG.yaml] [--name value …] [--resume RUN|auto] [--dry-run]")
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="settings; else defaults")
    parser.add_argument("--dry_run", action="store_true", help="print what it needs, and stop")
    parser.add_argument(
        "--resume", metavar="RUN|auto", help="go on with an interrupted run; auto: or start it"
    )
    parser.add_argument("--max_time", metavar="90s|30m|8h", help="save and stop after that long")
    parser.add_argument(
        "--allow_changed_environment",
        action="store_true",
        help="resume on other versions, devices, threads or text: not the same bits",
    )
    for flag in config.flags():
        shown = "" if flag.default in (None, ()) else f" (default {_plain(flag.default)})"
        parser.add_argument(
            f"--{flag.name}",
            nargs="+" if flag.many else None,
            action="extend" if flag.many else "store",
            metavar=flag.type,
            help=(flag.help + shown).replace("%", "%%"),
        )
    parser.epilog = f"--grid.SETTING value …: {config.grid_help()}"
    for key in config.grid_keys():
        parser.add_argument(f"--grid.{key}", nargs="+", action="extend", help=argparse.SUPPRESS)
    given, mistakes = parser.sift(args)
    settings = vars(parser.parse_args(given))
    own = ("config", "dry_run", "resume", "max_time", "allow_changed_environment")
    options = {name: settings.pop(name) for name in own if name in settings}
    try:
        if "max_time" in options:
            options["max_time"] = _seconds("--max-time", options["max_time"])
        chosen = _chosen_config(options, settings)
    except ConfigError as error:
        raise ConfigError("\n".join([*mistakes, str(error)])) from None
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return _train(chosen, options)


def _chosen_config(options: dict, settings: dict):
    """The settings given, over those of CONFIG, of the run to resume, or the defaults."""
    from sae import config
    from sae.store import Run

    path = Path(options["config"]) if "config" in options else None
    resume = options.get("resume")
    if resume is None or resume == "auto":
        return config.resolve(path, settings, begun=resume == "auto")
    run = Run(resume)
    output = Path(settings.setdefault("output", str(run.path)))
    if output.absolute() != run.path.absolute():
        raise ConfigError(
            f"--output {output}: --resume {resume} goes on in {run.path}; leave it out"
        )
    return config.resolve(path or run.config_path, settings, begun=True)


def _train(config, options: dict) -> int:
    from sae.memory import keep_freed_memory

    keep_freed_memory()
    _quiet_libraries()
    from sae import checkpoint, planning, resuming, training
    from sae.config import refuse_idle_ramps
    from sae.progress import TrainingProgress

    run, saved = planning.output_of(config), None
    if "resume" in options and resuming.is_complete(run):
        resuming.check_complete(run, config)
    if options.get("resume") == "auto":
        if resuming.is_complete(run):
            print(f"{run} is complete; nothing to do")
            return 0
        if (saved := checkpoint.newest(run)) is None:
            refuse_idle_ramps(config)
            print(f"nothing to resume in {run}: this is a new run")
    elif "resume" in options:
        saved = resuming.saved_state(run)
    if saved:
        resuming.check_config(saved, config)
    plan = planning.plan(config, resuming="resume" in options, begun=saved is not None)
    if saved:
        allow = "allow_changed_environment" in options
        for change in resuming.check_environment(saved, plan, allow_changed=allow):
            print(f"changed {visible(change)}")
    for name, value in plan.lines():
        print(f"{name:<7} {visible(value)}")
    for row in plan.source.preview():
        print(f"row     {visible(row)}")
    if "dry_run" in options:
        for name, value in planning.estimate(plan):
            print(f"{name:<7} {value}")
        print("nothing was trained or written (--dry-run)")
        return 0
    if saved:
        print(f"resumes at {saved.facts['tokens']:,} of {config.tokens:,} tokens")
    sys.stdout.flush()
    start = saved.facts["tokens"] if saved else 0
    with TrainingProgress(config.tokens, start) as progress:
        folder = training.train(
            plan, progress.report, resume=saved, max_seconds=options.get("max_time")
        )
    return _say_trained(folder, config.tokens)


def _say_trained(folder: Path, wanted: int) -> int:
    """Where the run is and what to do with it; where it was stopped, how far it came."""
    from sae.store import Run, read_manifest

    manifest = read_manifest(folder)
    tokens, ended, run = manifest["tokens"], manifest["ended"], shlex.quote(str(folder))
    if ended == "text ended":
        print(f"the text ended after {tokens:,} of {wanted:,} tokens; the weights are saved")
    elif ended != "complete":
        print(f"{ended}: stopped after {tokens:,} of {wanted:,} tokens; the state is saved")
        print(f"next: sae train --resume {run}")
    if Run(folder).saes():
        print(f"trained {folder}")
        print(f"next: sae evaluate {run}; sae features {run}; sae top {_one_sae(folder)}")
    return {"SIGINT": 130, "SIGTERM": 143}.get(ended, 0)


@_verb("evaluate", "FVU, L0, dead features, cross-entropy recovered on held-out text")
def evaluate(args: list[str]) -> None:
    """sae evaluate."""
    parser = Parser("evaluate", "RUN [--sae NAME] [--tokens N] [--k 8 16 32] [--device cpu]")
    _add_run(parser)
    parser.add_argument("--tokens", metavar="int", help="held-out tokens; else data.eval_tokens")
    parser.add_argument("--k", nargs="+", metavar="int", help="baselines of the k largest neurons")
    given = parser.read(args)
    wanted = _count("--tokens", given["tokens"]) if "tokens" in given else None
    ks = tuple(_count("--k", k) for k in given.get("k", []))  # pyright: ignore
    opened = _open(given)
    from sae.progress import Bar
    from sae.runs import evaluate_run
    from sae.terminal import evaluation_table, make_console

    n_tokens = wanted or opened.config.data.eval_tokens
    with Bar("evaluating", n_tokens) as bar:
        found = evaluate_run(opened, n_tokens=n_tokens, ks=ks, progress=bar.advance)
    console = make_console()
    for name, evaluation in found.items():
        console.print(evaluation_table(evaluation, name))
        print(f"written {opened.folders[name] / 'eval.json'}")
    print(f"next: sae features {_run(opened.run.path, _text(given, 'sae'))}")


@_verb("features", "scan text and write the feature dictionary")
def features(args: list[str]) -> None:
    """sae features."""
    parser = Parser("features", "RUN [--sae NAME] [--tokens N] [--device cpu]")
    _add_run(parser)
    parser.add_argument("--tokens", metavar="int", help="tokens to scan (default 500000)")
    given = parser.read(args)
    n_tokens = _count("--tokens", given.get("tokens", 500_000))
    opened = _open(given)
    from sae.progress import Bar
    from sae.runs import scan_run
    from sae.store import read_manifest

    with Bar("scanning", n_tokens) as bar:
        written = scan_run(opened, n_tokens=n_tokens, progress=bar.advance)
    for folder in written.values():
        print(f"written {folder}")
    scanned = read_manifest(next(iter(written.values())))["tokens"]
    if scanned < n_tokens:
        print(f"scanned {scanned:,} tokens, not {n_tokens:,}: the text has no more")
    run = _one_sae(opened.run.path, _text(given, "sae"))
    print(f"next: sae browse {run}; sae top {run}; sae export {run} --format parquet --out DIR")


@_verb("top", "features and the text that excites them, in the terminal")
def top(args: list[str]) -> None:
    """sae top."""
    parser = Parser("top", "RUN [--feature 1,5,10-20] [--search WORD] [--sort density] [--text …]")
    _add_run(parser)
    parser.add_argument("--feature", metavar="1,5,10-20", help="these; one alone is shown in full")
    parser.add_argument("--search", metavar="WORD", help="in labels, tokens fired on, promoted")
    parser.add_argument("--sort", metavar="NAME", help="density, max, mean, n_fired or feature")
    parser.add_argument("--sample", metavar="SEED", help="draw live features by this seed instead")
    parser.add_argument("--limit", metavar="int", help="how many features (default 20)")
    parser.add_argument("--text", metavar="…", help="a text of your own, token by token")
    given = parser.read(args)
    _refuse_together(given, ("feature", "sample", "search", "text"))
    _refuse_together(given, ("feature", "sample", "sort", "text"))
    _refuse_together(given, ("feature", "limit", "text"))
    if "text" in given:
        _top_of_text(given)
    else:
        _top_of_dictionary(given)


def _top_of_dictionary(given: dict[str, object]) -> None:
    from sae.records import FeatureDictionary
    from sae.store import Run
    from sae.terminal import feature_page, feature_table, make_console

    limit = _count("--limit", given.get("limit", 20))
    run, name = Run(str(given["run"])), _text(given, "sae")
    dictionary = FeatureDictionary(run.features(name))
    console, chosen = make_console(), _chosen(dictionary, given, limit)
    again = f"sae top {_run(run.path, name)}"
    if len(chosen) == 1:
        console.print(feature_page(dictionary, chosen[0], console))
        print(f"next: {again} --search WORD; {again} --text '…'")
    else:
        console.print(feature_table(dictionary, chosen, console))
        print(f"next: {again} --feature {chosen[0]}")


def _chosen(dictionary, given: dict[str, object], limit: int) -> list[int]:
    """The features asked for, at least one."""
    from sae.records import parse_features

    if "feature" in given:
        return parse_features(str(given["feature"]), len(dictionary))
    if "sample" in given:
        chosen = dictionary.sample(limit, _count("--sample", given["sample"], least=0))
        problem = "--sample: no feature of this dictionary ever fires; train longer"
    else:
        search = str(given.get("search", ""))
        chosen = dictionary.ranked(str(given.get("sort", "max")), search)[:limit]
        problem = f"--search {search}: no feature mentions it; try a shorter word"
    if not chosen:
        raise RunError(problem)
    return chosen


def _top_of_text(given: dict[str, object]) -> None:
    if any("\ud800" <= c <= "\udfff" for c in str(given["text"])):  # bytes Python cannot decode
        raise ConfigError("--text: not UTF-8 text came; save it as UTF-8 or type it anew")
    opened = _open(given)
    from sae.runs import features_of
    from sae.terminal import make_console, prompt_view

    console = make_console()
    for name, found in features_of(opened, str(given["text"])).items():
        print(visible(name))
        console.print(prompt_view(found, console))


@_verb("browse", "read the features in a web browser, served from this machine only")
def browse(args: list[str]) -> None:
    """sae browse."""
    parser = Parser("browse", "RUN… [--sae NAME] [--port N] [--open] [--device cpu]")
    parser.add_argument("run", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument("--sae", metavar="NAME", help="only this one of their SAEs")
    parser.add_argument("--port", metavar="N", help="of 127.0.0.1 (default 8765, or the next free)")
    parser.add_argument("--open", action="store_true", help="open the web browser too")
    parser.add_argument("--device", metavar="auto|cpu|cuda", help="where to compute (default auto)")
    given = parser.read(args)
    port = _count("--port", given["port"]) if "port" in given else None
    shown = [pages for run in cast("list[str]", given["run"]) for pages in _pages(run, given)]
    from sae.browser import server

    with server.open_socket(port) as listening:
        address = f"http://{server.HOST}:{listening.getsockname()[1]}/"
        print(f"{len(shown)} feature dictionar{'y' if len(shown) == 1 else 'ies'} at {address}")
        print("Ctrl-C ends it", flush=True)
        if "open" in given:
            webbrowser.open(address)
        server.serve(shown, listening, _probe_of(str(given.get("device", "auto"))))


def _probe_of(device: str):
    """What loads the model behind some pages, once a page asks for it."""

    def load(pages):
        _quiet_libraries()
        from sae.live import open_probe

        return open_probe(pages.run, pages.folder.absolute().parent.name, device)

    return load


def _pages(path: str, given: dict[str, object]) -> list:
    """The pages of a run's SAEs; a dictionary that is missing is made first."""
    from sae.browser.history import Training
    from sae.browser.pages import Pages
    from sae.store import Run

    run, name = Run(path), _text(given, "sae")
    if name is None and not run.saes():
        print(f"{path} holds no SAE yet: its training can be watched")
        return [Training(run.path)]
    folders = run.chosen(name)
    for folder in folders:
        if not (folder / "features").is_dir():
            print(f"{folder} has no feature dictionary yet; it is made first", flush=True)
            device = ["--device", str(given["device"])] if "device" in given else []
            features([path, "--sae", folder.name, *device])
    return [Pages(run.features(folder.name)) for folder in folders]


@_verb("export", "write the dictionary or the weights for other tools")
def export(args: list[str]) -> None:
    """sae export."""
    from sae import formats

    parser = Parser("export", "RUN --format NAME --out DIR [--feature …]")
    parser.add_argument("run", metavar="RUN", nargs="+", help="folder of a run; html: of several")
    parser.add_argument("--sae", metavar="NAME", help="which SAE, where the run holds several")
    parser.add_argument("--format", metavar="NAME", help=_listed(formats.FORMATS))
    parser.add_argument("--out", metavar="DIR", help="a new folder")
    parser.add_argument("--feature", metavar="1,5,10-20", help="only these features")
    given = parser.read(args)
    from sae.records import parse_features
    from sae.store import Run

    for needed in ("format", "out"):
        if not given.get(needed):
            raise FormatError(f"--{needed} is missing; sae export RUN --format NAME --out DIR")
    name = str(given["format"])
    formats.check(name)
    runs, out = [Run(path) for path in cast("list[str]", given["run"])], str(given["out"])
    if name == "html":
        folders = [folder for run in runs for folder in run.chosen(_text(given, "sae"))]
        if len(folders) > 1:
            _export_pages(folders, out, given)
            return
    if len(runs) > 1:
        raise ConfigError(f"--format {name} takes one RUN, {len(runs)} came; html takes several")
    folder = runs[0].sae(_text(given, "sae"))
    chosen = None
    if "feature" in given:
        from sae.autoencoder import read_config

        chosen = parse_features(str(given["feature"]), read_config(folder)["d_sae"])
    for note in formats.write(name, folder, out, chosen):
        print(visible(note))
    print(f"written {out}")
    print(f"next: {formats.how_to_open(name, out)}")


def _export_pages(folders: list[Path], out: str, given: dict[str, object]) -> None:
    """Several dictionaries as one folder of pages."""
    from sae.formats import how_to_open
    from sae.formats.html import write_several

    if "feature" in given:
        raise ConfigError("--feature is for one dictionary; name it with --sae, or leave it out")
    write_several(folders, Path(out))
    print(f"written {out}, {len(folders)} dictionaries")
    print(f"next: {how_to_open('html', out)}")


@_verb("import", "read an SAE that another tool trained, as a run, or labels for one")
def import_(args: list[str]) -> None:
    """sae import."""
    from sae import config, formats

    parser = Parser("import", "SOURCE --output RUN [--format NAME] [--model.name …]")
    parser.add_argument(
        "--labels", metavar="RUN", help="SOURCE is Neuronpedia's explanations: labels for this run"
    )
    parser.add_argument("--sae", metavar="NAME", help="whose labels, where RUN holds several SAEs")
    parser.add_argument(
        "source", metavar="SOURCE", help="of another tool: a file, a folder or a Hub name"
    )
    parser.add_argument("--revision", metavar="REF", help="branch, tag or commit of a Hub name")
    parser.add_argument(
        "--format", metavar="NAME", help=f"{', '.join(formats.READABLE)} (default: by its files)"
    )
    parser.add_argument(
        "--allow_pickle_file", action="store_true", help="read tensors, and nothing else, of a .pt"
    )
    for flag in config.flags():
        if flag.name.partition(".")[0] in _IMPORTED:
            parser.add_argument(
                f"--{flag.name}",
                nargs="+" if flag.many else None,
                action="extend" if flag.many else "store",
                metavar=flag.type,
                help=flag.help.replace("%", "%%"),
            )
    given = parser.read(args)
    if "labels" in given:
        _import_labels(given)
        return
    if "sae" in given:
        raise ConfigError("--sae goes with --labels RUN; leave it out")
    source, name = str(given.pop("source")), given.pop("format", None)
    trusted = bool(given.pop("allow_pickle_file", False))
    revision = _text(given, "revision")
    given.pop("revision", None)
    from sae.importing import import_run

    found = import_run(
        source, None if name is None else str(name), given, trusted=trusted, revision=revision
    )
    print(f"read {visible(source)} as {found.format}")
    for note in found.notes:
        print(visible(note))
    print(f"written {found.folder}")
    run = shlex.quote(str(found.folder))
    print(f"next: sae evaluate {run}; sae features {run}; sae top {_one_sae(found.folder)}")


def _import_labels(given: dict[str, object]) -> None:
    if others := given.keys() - {"labels", "sae", "source"}:
        raise ConfigError(f"--labels takes SOURCE and --sae alone; leave out --{min(others)}")
    from sae.importing import import_labels

    run, name = str(given["labels"]), _text(given, "sae")
    for line in import_labels(run, str(given["source"]), name):
        print(visible(line))
    print(f"written {Path(run) / 'labels.json'}")
    print(f"next: sae top {_one_sae(Path(run), name)} --search WORD")


@_verb("push", "publish a run on the Hugging Face Hub")
def push(args: list[str]) -> None:
    """sae push."""
    parser = Parser("push", "RUN USER/NAME [--sae NAME] [--private]")
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as checkpoints/NAME")
    parser.add_argument("repo", metavar="USER/NAME", help="repository; made where there is none")
    parser.add_argument("--sae", metavar="NAME", help="only this one of its SAEs")
    parser.add_argument("--private", action="store_true", help="for you and those you invite alone")
    given = parser.read(args)
    from sae.store import Run

    run, name, repo = Run(str(given["run"])), _text(given, "sae"), str(given["repo"])
    for folder in [run.sae(name)] if name or not run.saes() else run.saes().values():
        if not (folder / "features").is_dir():
            print(f"{folder.name} has no features to publish; sae features {_run(run.path, name)}")
    _quiet_libraries()
    from sae.publishing import publish

    for address in publish(run.path, repo, sae=name, private="private" in given):
        print(f"published {address}")
    print(f"next: in Python, SparseAutoencoder.from_pretrained({repo!r})")


def _listed(options: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in options.items())


@_verb("verify", "check a run: hashes, settings, and what its weights give")
def verify(args: list[str]) -> None:
    """sae verify."""
    parser = Parser("verify", "RUN [--sae NAME]")
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as checkpoints/NAME")
    parser.add_argument("--sae", metavar="NAME", help="only this one of its SAEs")
    given = parser.read(args)
    from sae import verification
    from sae.store import Run

    run, name = Run(str(given["run"])), _text(given, "sae")
    done, problems = 0, []
    for finding in verification.verify(run, name):
        print(f"{'WRONG' if finding.problems else 'ok':<5} {visible(finding.what)}", end="")
        print("" if finding.problems else f": {visible(finding.holds)}", flush=True)
        done, problems = done + 1, problems + finding.problems
    if problems:
        problems.append("put back the files that belong there, or make them again")
        raise RunError("\n".join(problems))
    print(f"all is well with {run.path}: {done} checks")
    print(f"next: sae top {_one_sae(run.path, name)}")


def _add_run(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as checkpoints/NAME")
    parser.add_argument("--sae", metavar="NAME", help="which SAE, where the run holds several")
    parser.add_argument("--device", metavar="auto|cpu|cuda", help="where to compute (default auto)")


def _open(given: dict[str, object]):
    """The run with its model and text; what can be wrong with its folder is found without torch."""
    from sae.store import Run

    name = _text(given, "sae")
    run = Run(str(given["run"]))
    if name is not None or not run.saes():
        run.sae(name)
    from sae.memory import keep_freed_memory

    keep_freed_memory()
    _quiet_libraries()
    from sae.runs import open_run

    return open_run(run.path, name, str(given.get("device", "auto")))


def _run(path: Path, sae: str | None = None) -> str:
    """RUN, and --sae where it was given, as one types them."""
    return shlex.quote(str(path)) + (f" --sae {shlex.quote(sae)}" if sae else "")


def _one_sae(path: Path, sae: str | None = None) -> str:
    """The same for verbs that show one SAE: the first where the run holds several."""
    from sae.store import Run

    names = list(Run(path).saes())
    return _run(path, sae or (names[0] if len(names) > 1 else None))


def _refuse_together(given: dict[str, object], names: tuple[str, ...]) -> None:
    both = [f"--{name}" for name in names if name in given]
    if len(both) > 1:
        raise ConfigError(f"{' and '.join(both)} do not go together; give one of them")


def _text(given: dict[str, object], name: str) -> str | None:
    return str(given[name]) if name in given else None


def _count(name: str, value: object, least: int = 1) -> int:
    """A whole number as people type it: 500000, 500_000, 500,000 or 5e5."""
    text = str(value)
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    try:
        number = float(text) if re.fullmatch(r"[\d_]{1,30}(\.\d*)?([eE]\+?\d{1,2})?", text) else -1
    except ValueError:
        number = -1
    if number < least or number != int(number):
        raise ConfigError(f"{name}: {text[:40]!r} came, wanted a whole number of at least {least}")
    return int(number)


def _seconds(name: str, value: object) -> float:
    """A time as people type it: 90, 90s, 30m or 1.5h."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d*)?) ?(s|m|min|h)?", str(value))
    seconds = float(found[1]) * {"m": 60, "min": 60, "h": 3600}.get(found[2], 1) if found else 0
    if not seconds:
        raise ConfigError(f"{name}: {str(value)[:40]!r} came, wanted a time such as 90s, 30m or 8h")
    return seconds


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quiet_libraries() -> None:
    """No progress bars and notices of other libraries between our own lines."""
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        huggingface_hub.utils.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@contextmanager
def _calm_warnings(debug: bool) -> Iterator[None]:
    """Our own warnings as a line each; those of libraries only with --debug."""
    own = str(Path(__file__).parent)

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if debug or filename.startswith(own):
            print(f"sae: {visible(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main())
