"""The pages show what the dictionary holds: as parts, served, from a web server, from the disk.

And what a hostile page could send to the server is refused.
"""

import base64
import csv
import http.client
import io
import itertools
import json
import re
import shutil
import socket
import urllib.parse
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chromium import chromium, http_server, served, until, wanted
from hostile import STRINGS
from planted import D_SAE, DEAD, DENSE, Planted
from safetensors.numpy import load_file, save_file
from tiny import TOKENS, overrides, save

from sae import cli, labels
from sae.browser import server, static
from sae.browser.geometry import KINDS, decoder, match
from sae.browser.history import Training, history
from sae.browser.pages import AROUND, FEATURES, TEXT, Pages, script
from sae.browser.search import mentions
from sae.browser.tables import FeatureRows
from sae.errors import RunError
from sae.labels import Label
from sae.live import LiveProbe, open_probe
from sae.records import EXAMPLES_SCHEMA, FEATURES_SCHEMA, FeatureDictionary
from sae.store import OWN_KEYS, Run, read_manifest, write_manifest

TOKEN = "token-of-the-test"
FEATURE = 30


@pytest.fixture(scope="module")
def pages(made: Planted) -> Pages:
    return Pages(made.folder / "features")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained, scanned and evaluated."""
    folder = save(tmp_path_factory.mktemp("trained"))
    options = [part for name, value in overrides(folder).items() for part in (f"--{name}", value)]
    run = str(folder / "run")
    assert cli.main(["train", *options]) == 0
    assert cli.main(["features", run, "--tokens", "2000", "--device", "cpu"]) == 0
    assert cli.main(["evaluate", run, "--tokens", "300", "--device", "cpu"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def shown(pages: Pages, trained: Path) -> list[Pages]:
    """The planted dictionary twice, and that of a trained run."""
    return [pages, Pages(pages.folder), Pages(Run(trained).features())]


@pytest.fixture(scope="module")
def site(shown: list[Pages]) -> Iterator[str]:
    def probe_of(asked: Pages) -> LiveProbe:
        assert asked.run is not None
        return open_probe(asked.run, asked.folder.parent.name, "cpu")

    with served(lambda port: server.app(shown, port, TOKEN, probe_of)) as address:
        yield address


@pytest.fixture(scope="module")
def folder(shown: list[Pages], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static") / "html"
    static.write(shown, out)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def is_wrong(message: Any) -> bool:
    """Whether the console tells of more than a question that was refused with its reason."""
    return message.type in ("error", "warning") and "status of 400" not in message.text


@pytest.fixture(params=["served", "static", "file"])
def page(request: pytest.FixtureRequest, site: str, folder: Path, browser: Any) -> Iterator[Any]:
    """A tab whose `show(place)` opens a place of the pages; fails on errors, policy, strangers."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    tab = context.new_page()
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda m: wrong.append(m.text) if is_wrong(m) else None)
    tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    with http_server(folder) as static_site:
        base = {"served": site, "static": static_site, "file": folder.as_uri()}[request.param]
        tab.on(
            "request", lambda r: None if r.url.startswith((base, "blob:")) else wrong.append(r.url)
        )

        def show(place: str) -> None:
            tab.goto("about:blank")
            tab.goto(
                f"{base}/index.html{place}" if request.param != "served" else f"{base}/{place}"
            )
            tab.wait_for_selector("main:not([aria-busy])")

        tab.show, tab.mode = show, request.param
        yield tab
        context.close()
    assert wrong == []


# ---------------------------------------------------------------------------------------- parts


def unpacked(text: str, dtype: str = "<f4") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def test_columns_are_those_of_the_dictionary(pages: Pages, dictionary: FeatureDictionary) -> None:
    columns = pages.columns() | pages.more()
    assert columns["n"] == D_SAE
    for name in ("density", "max", "mean", "participation", "n_fired"):
        wanted = dictionary.table([name])[name].to_numpy().astype(np.float32)
        np.testing.assert_array_equal(unpacked(columns[name]), wanted)
    assert np.isnan(unpacked(columns["mean"])[DEAD])


def test_examples_are_those_of_the_dictionary(pages: Pages, dictionary: FeatureDictionary) -> None:
    part = pages.features(FEATURE // FEATURES)
    shown = part["pages"][FEATURE]["examples"]
    for example, given in zip(dictionary.examples([FEATURE]), shown, strict=True):
        context = dictionary.context(example).window(AROUND, AROUND)
        tokens = [part["tokens"][i] for i in given["tokens"]]
        assert [piece for _, piece in tokens] == context.pieces
        assert example.column - given["start"] == context.peak
        assert given["peak"] == pytest.approx(example.peak, rel=1e-4)
        ids, pieces = pages.text(example.row // TEXT)[example.row % TEXT]
        assert pieces == dictionary.context(example).pieces
        assert ids[given["start"] :][: len(tokens)] == [i for i, _ in tokens]


def test_a_choice_of_features_has_only_those(made: Planted) -> None:
    chosen = Pages(made.folder / "features", [30, 3])
    assert unpacked(chosen.columns()["features"], "<i4").tolist() == [3, 30]
    keys = [key for key, _ in chosen.parts()]
    assert [key for key in keys if key.startswith("features")] == ["features-0", "features-3"]
    assert [row[0] for row in chosen.rows(0)] == [3, 30]
    with pytest.raises(RunError, match="feature 999"):
        Pages(made.folder / "features", [999])


def test_rows_between_two_features(made: Planted) -> None:
    rows = FeatureRows(made.folder / "features" / "features.parquet")
    for start, stop in ((0, 1), (5, 20), (30, D_SAE), (0, D_SAE), (D_SAE, 99)):
        assert rows.between(start, stop)["feature"].to_pylist() == [*range(start, min(stop, D_SAE))]


def test_search_finds_what_is_written(made: Planted, dictionary: FeatureDictionary) -> None:
    found = mentions(dictionary.folder, "WARRANTY", examples=True)
    texts = {
        f: [e.before + e.token + e.after for e in dictionary.examples([f])] for f in range(D_SAE)
    }
    assert found == [f for f, own in texts.items() if any("warranty" in t for t in own)] != []
    assert mentions(dictionary.folder, "no such text", examples=True) == []
    assert set(mentions(dictionary.folder, "a", examples=False)) <= set(range(D_SAE))


def test_matching_finds_what_was_shuffled_split_and_lost() -> None:
    random = np.random.default_rng(2)
    axes, _ = np.linalg.qr(random.standard_normal((40, 40)))
    ours, order = axes[:10], random.permutation(8)
    # Of ours, 8 and 9 are lost; 0 has a second, less similar child.
    child = 0.6 * axes[0] + 0.8 * axes[30]
    found = match(ours, np.concatenate([ours[order], child[None]]))
    assert found["nearest"][:8].tolist() == np.argsort(order).tolist()
    kinds = [KINDS[k] for k in found["kind"]]
    assert kinds == ["shared"] * 8 + ["lost"] * 2
    assert found["children"].tolist() == [2, *[1] * 7, 0, 0]
    with pytest.raises(RunError, match="hookpoint"):
        match(ours, ours[:, :5])


def test_directions_are_those_of_the_decoder(made: Planted) -> None:
    rows = made.sae.W_dec.detach().numpy()
    wanted = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(decoder(made.folder), wanted, rtol=1e-6)


def test_the_history_is_that_of_the_logs(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    found = history(trained, Run(trained).sae())
    assert found["curves"]["tokens"] == [row["tokens"] for row in rows]
    assert found["curves"]["l0"] == pytest.approx([row["l0"] for row in rows], rel=1e-5)
    assert found["evaluation"]["n_tokens"] > 0 and found["events"] == []
    assert "layers.1.mlp_act" in found["config"]


def test_a_run_that_still_trains_can_be_watched(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    lines = [{"tokens": i, "hookpoint": "a", "loss": 1 / (i + 1)} for i in range(5000)]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(text + '\n[1]\n{"tokens": 1, "loss": NaN}\n{"tok')
    (tmp_path / "events.jsonl").write_text('{"tokens": 3, "event": "skipped"}\n')
    watched = Training(tmp_path)
    ((key, found),) = watched.parts()
    assert key == "run" and watched.about()["d_sae"] == 0
    assert found["curves"]["tokens"][-1] == 4999 and 500 < len(found["curves"]["tokens"]) <= 601
    assert found["events"] == [{"tokens": 3, "event": "skipped"}]
    with pytest.raises(RunError, match="sae features"):
        watched.part("columns")


def test_a_script_holds_no_markup() -> None:
    text = script("0/a", {"x": "</script><!-- \u2028 \ud800 é"})
    assert "<" not in text and text.isascii()
    assert json.loads(text[len('SAE.put("0/a",') : -3]) == {"x": "</script><!-- \u2028 \ud800 é"}


# --------------------------------------------------------------------------------------- server

OURS = {"Content-Type": "application/json", "X-SAE-Token": TOKEN}


def call(
    site: str, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, bytes, Any]:
    """A request exactly as written."""
    connection = http.client.HTTPConnection(site.removeprefix("http://"), timeout=60)
    data = json.dumps(body).encode() if body is not None else None
    given = {"Host": site.removeprefix("http://")} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in given.items():
        connection.putheader(name, value)
    if data is not None:
        connection.putheader("Content-Length", str(len(data)))
    connection.endheaders(data)
    with closing(connection), connection.getresponse() as answer:
        return answer.status, answer.read(), answer.headers


def ask(site: str, what: str, body: Any, **changes: str) -> tuple[int, Any]:
    headers = OURS | {"Origin": site} | {k.replace("_", "-"): v for k, v in changes.items()}
    status, text, _ = call(site, "POST", f"/api/{what}", body, **headers)
    return status, json.loads(text) if text.startswith(b"{") else None


def test_the_server_gives_the_parts_of_the_folder(site: str, folder: Path) -> None:
    for file in sorted((folder / "data").rglob("*.js")):
        name = file.relative_to(folder).as_posix()
        if name.endswith("labels.js"):
            continue
        status, text, headers = call(site, "GET", f"/{name}")
        assert (status, text) == (200, file.read_bytes()), name
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]


UP = ("..", "%2e%2e", "%252e%252e", "..%2f..", "....//", "..\\..", "%5c..%5c", "/etc", "~", "%00")
PLACES = ("/", "/assets/", "/data/", "/data/0/", "/data/0/features-")
TRAVERSALS = [f"{place}{up}/{up}/etc/passwd" for place in PLACES for up in UP]


def test_no_address_leads_out_of_the_run(site: str) -> None:
    assert len(TRAVERSALS) == 50
    for path in (*TRAVERSALS, "/data/0/../../config.yaml", "/config.yaml", "/labels.json"):
        assert call(site, "GET", path)[0] in (404, 400), path


@pytest.mark.parametrize(
    "key",
    [
        "3/columns",
        "-1/columns",
        "0/rows-99",
        "0/rows--1",
        "0/rows-1e3",
        "0/x",
        "0",
        "",
        "0/features-99999999999",
        "%D9%A3/columns",
    ],
)
def test_parts_that_are_not_there(site: str, key: str) -> None:
    assert call(site, "GET", f"/data/{key}.js")[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "localhost:1", "127.0.0.1.evil.example:80", ""]
)
def test_other_hosts_are_refused(site: str, host: str) -> None:
    for path in ("/", "/data/index.js"):
        status, text, _ = call(site, "GET", path, Host=host)
        assert status in (400, 403) and b"SAE.put" not in text and TOKEN.encode() not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": ""},
        {"X_SAE_Token": ""}, {"X_SAE_Token": "guess"}, {"X_SAE_Token": "ü"},
        {"Content_Type": "text/plain"}, {"Content_Type": "application/x-www-form-urlencoded"},
        {"Content_Type": "application/json;q=1"}, {"Content_Type": "multipart/form-data"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("what", ["label", "search"])
def test_requests_of_strangers_are_refused(
    site: str, made: Planted, what: str, changes: dict[str, str]
) -> None:
    body = {"dictionary": 0, "feature": 3, "text": "written by a stranger"}
    status, answer = ask(site, what, body, **changes)
    assert status == 403 and "error" in answer
    assert not (made.folder.parents[1] / labels.FILE).exists()


@pytest.mark.parametrize("site_of", ["cross-site", "same-site"])
def test_other_pages_cannot_load_our_parts(site: str, site_of: str) -> None:
    for path in ("/data/index.js", "/data/0/columns.js", "/assets/core.js"):
        assert call(site, "GET", path, Sec_Fetch_Site=site_of)[0] == 403


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_only_reading_and_asking(site: str, method: str) -> None:
    assert call(site, method, "/")[0] in (403, 404, 405)
    assert call(site, "GET", "/api/label")[0] in (404, 405)


@pytest.mark.parametrize(
    "body",
    [[], "x", {}, {"dictionary": 9}, {"dictionary": 0}, {"dictionary": "../1"},
     *({"dictionary": 0, "feature": f, "text": "a"} for f in (-1, D_SAE, True, "1", None)),
     *({"dictionary": 0, "feature": 1, "text": text} for text in (5, "x" * 401))],
)  # fmt: skip
def test_questions_that_make_no_sense(site: str, body: Any) -> None:
    status, answer = ask(site, "label", body)
    assert status == 400 and answer["error"]


def test_the_selection_as_parquet(site: str, dictionary: FeatureDictionary) -> None:
    _, answer = ask(site, "export", {"dictionary": 0, "features": [30, 3]})
    table = pq.read_table(io.BytesIO(base64.b64decode(answer["parquet"])))
    assert table["feature"].to_pylist() == [30, 3]
    assert table["max"].to_pylist() == [r.max for r in dictionary.records([30, 3])]


def test_ports() -> None:
    with server.open_socket() as first, server.open_socket() as second:
        with socket.create_connection(first.getsockname()):  # nobody is refused before serve()
            accepted, _ = first.accept()
            accepted.close()
            assert accepted.proto == socket.IPPROTO_TCP  # asyncio then sends without waiting
        assert first.getsockname()[0] == second.getsockname()[0] == "127.0.0.1"
        with pytest.raises(RunError, match="taken"):
            server.open_socket(first.getsockname()[1])
    with pytest.raises(RunError):
        server.open_socket(99999)


def test_the_verb_says_where_the_pages_are(
    made: Planted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shown = str(made.folder.parents[1]), []
    monkeypatch.setattr(server, "serve", lambda pages, *_: shown.extend(pages))
    assert cli.main(["browse", run, run]) == 0
    assert re.match(
        r"2 feature dictionaries at http://127\.0\.0\.1:\d+/\n", capsys.readouterr().out
    )
    assert [pages.d_sae for pages in shown] == [D_SAE, D_SAE]
    assert cli.main(["browse", "nowhere"]) == 2
    assert cli.main(["browse", run, "--port", "0"]) == 2


def test_several_dictionaries_are_exported_together(
    made: Planted, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(made.folder.parents[1]), tmp_path / "html"
    options = ["--format", "html", "--out", str(out)]
    assert cli.main(["export", run, run, str(trained), *options]) == 0
    assert "3 dictionaries" in capsys.readouterr().out
    found = {file.relative_to(out / "data").as_posix() for file in out.rglob("compare-*.js")}
    wanted = {f"{a}/compare-{b}.js" for a, b in itertools.permutations(range(3), 2)}
    assert found == wanted
    assert len(read_manifest(out)["dictionaries"]) == 3
    assert cli.main(["export", run, run, "--format", "csv", "--out", str(tmp_path / "csv")]) == 2
    assert "takes one RUN" in capsys.readouterr().err
    again = [*options[:-1], str(tmp_path / "x"), "--feature", "3"]
    assert cli.main(["export", run, run, *again]) == 2
    assert cli.main(["export", run, *again]) == 0


# ------------------------------------------------------------------------------------- Chromium


def test_the_list_sorts_filters_and_opens(page: Any, dictionary: FeatureDictionary) -> None:
    page.show("#/0/features?show=all")
    assert page.text_content("#count") == f"All {D_SAE} features"
    first = "#rows .row[aria-rowindex='2'] .id"
    assert page.text_content(first) == str(dictionary.ranked("max")[0])
    page.click("button.sort:has-text('Density')")
    assert page.text_content(first) == str(DENSE)
    page.click("button.sort:has-text('Feature')")
    assert page.text_content(first) == "0"
    page.select_option("#show", "dead")
    dead = [r.feature for r in dictionary.records(range(D_SAE)) if r.n_fired == 0]
    assert page.text_content("#count") == f"{len(dead)} of {D_SAE} features"
    page.click(f"#rows a >> text='{dead[0]}'")
    page.wait_for_selector(".badge.dead")


def test_search_in_the_list(page: Any, dictionary: FeatureDictionary) -> None:
    page.show("#/0/features?show=all")
    page.fill("#search", "birds")
    wanted = len(mentions(dictionary.folder, "birds", examples=False))
    until(lambda: page.text_content("#count").startswith(f"{wanted} of"))
    assert "q=birds" in page.url


def test_ranges_and_the_selection_as_a_file(page: Any, dictionary: FeatureDictionary) -> None:
    records = [r for r in dictionary.records(range(D_SAE)) if r.n_fired]
    page.show("#/0/features")
    page.focus("input[aria-label='Max, least']")
    for _ in range(6):
        page.keyboard.press("PageUp")
    left = int(page.text_content("#count").split(" of ")[0])
    assert 0 < left < len(records) and "max=" in page.url
    with page.expect_download() as caught:
        page.click("button:has-text('CSV')")
    rows = list(csv.DictReader(Path(caught.value.path()).read_text().splitlines()))
    wanted = sorted(records, key=lambda r: -r.max)[:left]
    assert [int(row["feature"]) for row in rows] == [r.feature for r in wanted]
    assert [int(row["n_fired"]) for row in rows] == [r.n_fired for r in wanted]
    assert [float(row["mean"]) for row in rows] == pytest.approx([r.mean for r in wanted])
    parquet = page.locator("button:has-text('Parquet')")
    assert parquet.is_enabled() == (page.mode == "served")


def test_a_feature_page_shows_its_record(page: Any, dictionary: FeatureDictionary) -> None:
    page.show(f"#/0/feature/{FEATURE}")
    record = dictionary.records([FEATURE])[0]
    assert page.text_content("h1 .id") == str(FEATURE)
    stats = page.text_content(".stats")
    assert f"{record.n_fired} tokens" in stats
    peaks = page.locator(".group >> nth=0 >> css=.token.marked").all_text_contents()
    tops = dictionary.examples([FEATURE], "top")
    assert [p.strip() for p in peaks] == [e.token.strip() for e in tops[:5]]
    page.click("text=Show 15 more")
    assert page.locator(".group >> nth=0 >> css=.example").count() == len(tops)
    _, _, count = record.intervals[0]
    assert f"holds {100 * count / record.n_fired:.1f}" in page.text_content(".group >> nth=1")
    page.check("input[value=full]")
    until(lambda: "Loading" not in page.text_content("#examples"))
    context = dictionary.context(tops[0])
    shown = page.locator(".context >> nth=0 >> css=.token").all_text_contents()
    assert len(shown) == len(context.pieces)
    page.hover(".context >> nth=0 >> css=.token.marked")
    tip = page.text_content("#tip")
    assert (
        "activation" in tip
        and f"{tops[0].position} of document {tops[0].document}" in tip.replace(",", "")
    )


def test_keys_lead_from_feature_to_feature(page: Any) -> None:
    page.show("#/0/feature/3")
    page.keyboard.press("ArrowRight")
    until(lambda: page.text_content("h1 .id") == "4")
    page.wait_for_selector("main:not([aria-busy])")
    page.keyboard.press("ArrowLeft")
    until(lambda: page.text_content("h1 .id") == "3")
    assert "#/0/feature/3" in page.url


def test_labels_are_given_when_served(page: Any, made: Planted) -> None:
    run, hostile = made.folder.parents[1], '</script><img src=x onerror="alert(1)">'
    page.show("#/0/feature/12")
    if page.mode != "served":
        assert f"sae browse {run}" in page.text_content(".label-line")
        return
    page.click("#edit-label")
    page.fill("#label-box", hostile)
    page.keyboard.press("Enter")
    page.wait_for_selector(".label-text#label")
    assert page.text_content("#label") == hostile
    assert FeatureDictionary(made.folder / "features").labels() == {12: Label(hostile)}
    page.show("#/0/features?show=labelled")
    assert page.text_content("#rows .label-text") == hostile
    page.show("#/0/feature/12")
    page.click("#edit-label")
    page.fill("#label-box", "")
    page.keyboard.press("Enter")
    page.wait_for_selector(".quiet#label")
    assert FeatureDictionary(made.folder / "features").labels() == {}


@pytest.mark.parametrize(
    "place",
    [
        "#/0/feature/99999",
        "#/0/feature/%3Cimg%20src=x%3E",
        "#/0/nonsense",
        "#/7/features",
        "#javascript:alert(1)",
    ],
)
def test_wrong_addresses_say_so(page: Any, place: str) -> None:
    page.show(place)
    assert re.search("Not here|features of", page.text_content("main"))


def test_the_run_page_shows_curves_and_evaluation(page: Any) -> None:
    page.show("#/2/run")
    assert f"{TOKENS:,} tokens" in page.text_content("#live")
    assert page.locator("svg.lines polyline").count() == 4
    text = page.text_content("main")
    assert "cross-entropy recovered" in text and "never resumed" in text and "sparsity" in text
    page.show("#/0/run")
    assert "no step is logged yet" in page.text_content("#live")


def test_the_map_opens_features(page: Any) -> None:
    page.show("#/0/map")
    box = page.locator("#map").bounding_box()
    steps = [(x, y) for x in range(4, 100, 4) for y in range(4, 100, 4)]
    for x, y in steps:
        page.mouse.move(box["x"] + box["width"] * x / 100, box["y"] + box["height"] * y / 100)
        if found := re.match(r"Feature (\d+)", page.text_content("#under")):
            break
    else:
        raise AssertionError("nothing on the map")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector("h1 .id")
    assert page.text_content("h1 .id") == found[1]


def test_comparing_a_dictionary_with_itself(page: Any, dictionary: FeatureDictionary) -> None:
    page.show("#/0/compare")
    live = sum(r.n_fired > 0 for r in dictionary.records(range(D_SAE)))
    assert f"{live} shared" in page.text_content(".kinds")
    rows = page.locator("#matches tbody tr")
    assert rows.count() == live
    ours, theirs, cosine, *_ = rows.first.locator("td").all_text_contents()
    assert ours == theirs and float(cosine) == pytest.approx(1)
    page.show("#/0/compare/2")
    assert "They have read different text" in page.text_content("main")


def test_a_text_is_read_and_steered(page: Any) -> None:
    page.show("#/2/text?t=the+cat+sat")
    if page.mode != "served":
        assert page.text_content("#command").startswith("sae browse ")
        return
    page.wait_for_selector("#tokens .token")
    shown = page.locator("#tokens .token").all_text_contents()
    assert "".join(shown) == "the cat sat"
    page.click("#tokens .token >> nth=1")
    page.click("#token-features button:has-text('ablate') >> nth=0")
    page.fill("#length", "5")
    page.click("#steer")
    page.wait_for_selector("#side-changed")
    assert page.locator("#side-plain li").count() == page.locator("#side-changed li").count() == 10
    assert "t=the" in page.url and "c=" in page.url
    page.fill("#text", "the cat " * 50)
    page.click("#read")
    until(lambda: "the model reads 1 to 32" in page.text_content("#state"))


# --------------------------------------------------------------------------------- hostile text


def poison(source: Planted, run: Path) -> Pages:
    """The planted run with STRINGS as tokens, text, labels, and names of everything."""
    shutil.copytree(source.folder.parents[1], run)
    folder = run / "saes" / source.folder.name / "features"
    endless = itertools.cycle(s.encode(errors="replace").decode() for s in STRINGS)

    def pieces(row: dict[str, Any]) -> dict[str, Any]:
        for column in ("top_tokens", "writes", "suppresses", "reads"):
            row[column] = row[column] and [t | {"piece": next(endless)} for t in row[column]]
        return row | {"label": next(endless)}

    features = [pieces(row) for row in pq.read_table(folder / "features.parquet").to_pylist()]
    pq.write_table(pa.Table.from_pylist(features, FEATURES_SCHEMA), folder / "features.parquet")
    examples = [
        row | {name: next(endless) for name in ("before", "token", "after")}
        for row in pq.read_table(folder / "examples.parquet").to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(examples, EXAMPLES_SCHEMA), folder / "examples.parquet")
    tokens = load_file(folder / "tokens.safetensors")
    text = [next(endless).encode() for _ in range(tokens["tokens"].size)]
    tokens["piece_bytes"] = np.frombuffer(b"".join(text), np.uint8)
    tokens["piece_offsets"] = np.cumsum([0, *map(len, text)])
    save_file(tokens, folder / "tokens.safetensors")
    manifest = read_manifest(folder)
    names = ("model", "revision", "data", "data_fingerprint", "hookpoint")
    facts = {k: v for k, v in manifest.items() if k not in OWN_KEYS}
    write_manifest(folder, facts | {name: f"{name} {next(endless)}" for name in names})
    for feature in range(D_SAE):
        given = next(s for s in endless if 0 < len(s.strip()) <= labels.LONGEST)
        labels.write(run, manifest["sae_sha256"], feature, Label(given, next(endless)))
    return Pages(folder)


@pytest.fixture(scope="module")
def poisoned(made: Planted, tmp_path_factory: pytest.TempPathFactory) -> Pages:
    return poison(made, tmp_path_factory.mktemp("hostile") / "<img src=x onerror=alert(1)>")


WALK = """async places => {
  const wrong = [];
  for (const place of places) {
    const end = performance.now() + 60000;
    SAE.drawn = null;
    history.replaceState(null, "", place);
    dispatchEvent(new Event("hashchange"));
    while (SAE.drawn === null && performance.now() < end)
      await new Promise(go => setTimeout(go, 4));
    if (SAE.drawn === null || window.__xss !== undefined || document.title.includes("owned"))
      wrong.push(place);
  }
  return wrong;
}"""
"""Opens one place after the other; those that never came, or where a planted script ran."""


def visible_text(text: str) -> bool:
    """Whether the pages show it as it is: short, and nothing that needs a sign."""
    return 0 < len(text) <= 60 and text.isprintable() and text == text.strip()


@pytest.mark.parametrize("way", ["served", "file"])
def test_hostile_text_stays_text(browser: Any, poisoned: Pages, tmp_path: Path, way: str) -> None:
    static.write([poisoned, poisoned], tmp_path / "html")
    with served(lambda port: server.app([poisoned, poisoned], port, TOKEN)) as address:
        base = f"{address}/" if way == "served" else (tmp_path / "html" / "index.html").as_uri()
        inside = address if way == "served" else (tmp_path / "html").as_uri()
        tab, wrong = browser.new_page(), []
        tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda r: None if r.url.startswith(inside) else wrong.append(r.url))
        tab.on("console", lambda m: wrong.append(m.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))

        def show(*places: str) -> None:
            assert tab.evaluate(WALK, places) == []

        tab.goto(base)
        tab.wait_for_selector("main:not([aria-busy])")
        records = poisoned.dictionary.records(range(D_SAE))
        for feature in range(0, D_SAE, 6):
            show(f"#/0/feature/{feature}?width=full&lines=1")
            assert tab.text_content("#label") == records[feature].label
            chips = tab.locator(".token-list .chip").all_text_contents()
            known = {t.piece for t in records[feature].writes or [] if visible_text(t.piece)}
            assert known <= set(chips)
        show("#/0/features?show=all")
        shown = tab.locator("#rows .label-text").all_text_contents()
        assert shown and set(shown) <= {r.label for r in records}
        places = ["#/0/map", "#/0/run", "#/0/compare/1", "#/0/text"]
        chosen = STRINGS if way == "file" else STRINGS[::12]
        quoted = [urllib.parse.quote(s[:500], errors="replace") for s in chosen]
        searches = (f"#/0/features?q={s}" for s in quoted[:6])
        show(*places, *searches, *(f"#/0/{s}" for s in quoted))
        tab.close()
        assert wrong == []


@pytest.mark.parametrize("way", ["static", "file"])
def test_what_is_planted_in_a_page_is_blocked(
    browser: Any, folder: Path, tmp_path: Path, way: str
) -> None:
    shutil.copytree(folder, tmp_path / "html")
    index = tmp_path / "html" / "index.html"
    planted = "<script>window.__xss=1</script><img src='http://127.0.0.1:9/x.png'>"
    index.write_text(index.read_text().replace("<noscript>", f"{planted}<noscript>"))
    with http_server(tmp_path / "html") as address:
        tab, said, asked = browser.new_page(), [], []
        tab.on("console", lambda m: said.append(m.text))
        tab.on("requestfinished", lambda r: asked.append(r.url))
        tab.goto(index.as_uri() if way == "file" else f"{address}/index.html")
        tab.wait_for_selector("main:not([aria-busy])")
        assert tab.evaluate("window.__xss") is None
        assert sum("Content Security Policy" in text for text in said) >= 2
        assert not [url for url in asked if ":9/" in url]
        tab.close()


STRANGE = """async (base) => {
  const seen = [];
  const body = JSON.stringify({dictionary: 0, feature: 1, text: "owned"});
  const types = ["text/plain", "application/json", "application/x-www-form-urlencoded"];
  for (const what of ["label", "search", "read", "steer", "export"])
    for (const type of types)
      for (const mode of ["cors", "no-cors"]) {
        const headers = mode === "cors" ? {"Content-Type": type, "X-SAE-Token": "guess"} : {};
        try {
          const r = await fetch(`${base}/api/${what}`, {method: "POST", mode, headers, body});
          if (r.ok) seen.push(`${what} ${type} ${mode}`);
        } catch { /* refused */ }
      }
  for (const key of ["index", "0/columns", "0/labels"])
    await new Promise((done) => {
      window.SAE = {put: (k) => seen.push(k)};
      const s = document.createElement("script");
      s.src = `${base}/data/${key}.js`; s.onload = s.onerror = done;
      document.head.append(s);
    });
  try { seen.push(await (await fetch(`${base}/`)).text()); } catch { /* no CORS */ }
  return seen;
}"""


def test_a_page_of_another_origin_gets_nothing(
    browser: Any, site: str, made: Planted, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><title>evil</title>")
    with http_server(tmp_path) as evil:
        tab = browser.new_page()
        tab.goto(f"{evil}/index.html")
        assert tab.evaluate(STRANGE, site) == []
        tab.close()
    assert FeatureDictionary(made.folder / "features").labels() == {}


# -------------------------------------------------------------------------------- accessibility

AXE = """async rules => (await axe.run(
  document, {resultTypes: ["violations"], ...(rules ? {runOnly: rules} : {})}
)).violations"""
SCHEMES = {"light": None, "dark": ["color-contrast"]}
"""What is looked for: everything, or only what colours can break."""
PLACES_OF_ALL = ("features", "feature/30", "map", "run", "compare", "text")


def test_axe_finds_nothing_serious(browser: Any, site: str) -> None:
    module = wanted("axe_playwright_python")
    tab = browser.new_context(bypass_csp=True).new_page()
    tab.goto(f"{site}/#/0/features")
    tab.wait_for_selector("main:not([aria-busy])")
    tab.evaluate((Path(module.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = []
    for place in PLACES_OF_ALL:
        assert tab.evaluate(WALK, [f"#/0/{place}"]) == []
        for scheme, rules in SCHEMES.items():
            tab.emulate_media(color_scheme=scheme)
            for wrong in tab.evaluate(AXE, rules):
                if wrong["impact"] in ("serious", "critical"):
                    nodes = [node["html"][:120] for node in wrong["nodes"][:3]]
                    found += [(place, scheme, wrong["id"], node) for node in nodes]
    tab.context.close()
    assert found == []


def test_keyboard_and_print_and_phone(browser: Any, site: str) -> None:
    context = browser.new_context(viewport={"width": 380, "height": 740})
    tab = context.new_page()
    for place in PLACES_OF_ALL:
        tab.goto("about:blank")
        tab.goto(f"{site}/#/0/{place}")
        tab.wait_for_selector("main:not([aria-busy])")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 380, place
    tab.goto(f"{site}/#/0/features")
    tab.wait_for_selector("#rows .row")
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "search"
    tab.focus("#rows")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("h1 .id")
    tab.keyboard.press("?")
    tab.wait_for_selector("dialog[open]")
    tab.keyboard.press("Escape")
    tab.emulate_media(media="print")
    assert not tab.is_visible("#top") and tab.is_visible(".example")
    context.close()
