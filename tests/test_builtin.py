"""The built-in text is what it claims: the standard library without what is no text of its own, a
small share of codec tables, one split by the path; and facts whose latent variables cover every
character, with nothing held out ever written on the training side."""

import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sae import builtin
from sae.builtin import facts, stdlib
from sae.builtin.document import Document, hash_unit
from sae.errors import DataError, ModelError

UNWANTED = {"test", "tests", "idlelib", "lib2to3", "distutils", "site-packages", "__pycache__"}


@pytest.fixture(scope="module")
def library() -> list[Document]:
    return list(builtin.documents("builtin:stdlib"))


@pytest.fixture(scope="module")
def sentences() -> list[Document]:
    return list(builtin.documents("builtin:facts"))


# builtin:stdlib


def test_the_library_is_the_one_that_runs_this(library: list[Document]) -> None:
    by_key = {document.key: document for document in library}
    assert len(by_key) == len(library) > 300
    for name in ("json/decoder.py", "argparse.py", "email/message.py"):
        file = Path(sysconfig.get_paths()["stdlib"]) / name
        assert by_key[f"stdlib/{name}"].text == file.read_text(encoding="utf-8")
    prose = by_key["stdlib/pydoc_data/topics/while.txt"].text
    assert isinstance(prose, str) and prose.startswith('The "while" statement')
    assert "stdlib/pydoc_data/topics.py" not in by_key


def test_what_is_no_text_of_the_library_is_left_out(library: list[Document]) -> None:
    for document in library:
        folders = document.key.split("/")[1:-1]
        assert not UNWANTED & set(folders)
        assert document.key.endswith((".py", ".txt"))


def test_the_split_is_that_of_the_relative_path(library: list[Document]) -> None:
    for document in library:
        assert document.heldout == (hash_unit(document.key.removeprefix("stdlib/")) < 0.08)
    characters = Counter[bool | None]()
    for document in library:
        characters[document.heldout] += len(document.text)
    assert 0.02 < characters[True] / characters.total() < 0.2


def test_hashes_are_the_same_on_every_machine() -> None:
    assert hash_unit("argparse.py") == pytest.approx(0.7861274, abs=1e-7)
    assert all(0 <= hash_unit(str(i)) < 1 for i in range(100))


def test_codec_tables_are_few_tokens(library: list[Document], tokenizer: Any) -> None:
    """All of the tables against every tenth of the other documents."""

    def count(documents: list[Document]) -> tuple[int, int]:
        texts = [str(document.text) for document in documents]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return sum(map(len, ids)), sum(map(len, texts))

    tables = [d for d in library if "/encodings/" in d.key and "_table" in d.text]
    others = [d for d in library if d not in tables]
    assert tables
    tokens, characters = count(others[::10])
    total = tokens / characters * sum(len(d.text) for d in others)
    assert count(tables)[0] < 0.02 * total


def test_a_made_up_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "decoding_table = (\n" + "    '\\x00'\n" * 100
    files = {
        "a.py": "print(1)\n" * 1000,
        "pkg/b.py": "print(2)\n" * 1000,
        "LICENSE.txt": "A licence.\n",
        "encodings/huge.py": table * 50,
        "pydoc_data/topics.py": "# made\ntopics = {'if': 'The \"if\" statement\\n'}\n",
    }
    left_out = (
        "test/a.py",
        "pkg/tests/a.py",
        "pkg/self_test/a.py",
        "idlelib/a.py",
        "lib2to3/a.py",
        "distutils/a.py",
        "site-packages/a/b.py",
        "config-3.11-x/a.py",
        "_sysconfigdata_x.py",
        "pkg/data.txt",
        "pkg/lib.so",
    )
    for name, text in files.items() | dict.fromkeys(left_out, "no").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "pkg" / "loop").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    wanted = {"a.py", "pkg/b.py", "LICENSE.txt", "pydoc_data/topics/if.txt"}
    found = {document.key: document.text for document in stdlib.documents()}
    assert found.keys() == {f"stdlib/{key}" for key in wanted}
    assert found["stdlib/pydoc_data/topics/if.txt"] == 'The "if" statement\n'
    (tmp_path / "encodings/huge.py").write_text("decoding_table = ()\n")
    assert "stdlib/encodings/huge.py" in {document.key for document in stdlib.documents()}


# builtin:facts


def test_templates_are_well_formed() -> None:
    """One subject, then one answer behind a single space: what prompts and labels count on."""
    for template in facts.load().templates:
        text = template.text
        assert text.count("{") == text.count("}") == 2
        assert 0 <= text.index("{subject}") < text.index(" {answer}")
        assert "  " not in text and text == text.strip()
        assert not text.endswith("}")  # a character ends the answer
    numbers = [template.number for template in facts.load().templates]
    assert numbers == list(range(len(numbers)))


def test_every_fact_can_be_asked() -> None:
    table = facts.load()
    assert len(table.facts) > 300 and len(table.relations) >= 8
    for relation in table.relations:
        own = [t for t in table.templates if t.relation == relation]
        assert any(t.unseen for t in own) and sum(not t.unseen for t in own) >= 5
        answers = table.answers_of(relation)
        assert answers == sorted(set(answers)) and len(answers) > 1
    for sentence in facts.sentences(heldout=True)[::50]:
        assert sentence.text.startswith(sentence.prompt + sentence.completion)
        end = sentence.completion.removeprefix(f" {sentence.fact.answer}")
        assert end != sentence.completion and not end[:1].isalnum()


def test_the_sides_share_no_pair_and_no_unseen_template(sentences: list[Document]) -> None:
    train, heldout = (
        {sentence.text for sentence in facts.sentences(heldout=side)} for side in (False, True)
    )
    unseen = {sentence.text for sentence in facts.unseen_template_sentences()}
    assert not train & heldout and not unseen & (train | heldout)
    assert 0.1 < len(heldout) / len(train | heldout) < 0.2
    written = {False: Counter[str](), True: Counter[str]()}
    for document in sentences:
        assert document.heldout is not None
        written[document.heldout].update(said(document))
    assert written[False] == Counter(dict.fromkeys(train, facts.PASSES))
    assert written[True] == Counter(dict.fromkeys(heldout, 1))
    everywhere = {
        (s.fact, s.template) for s in facts.sentences(heldout=False) + facts.sentences(heldout=True)
    }
    assert len(everywhere) == len(train | heldout)


def said(document: Document) -> list[str]:
    """The sentences of a document, found by its labels."""
    edges = sorted(
        {(s.start, s.end) for s in document.spans if facts.LATENTS[s.latent] == "template"}
    )
    return [str(document.text)[start:end].strip() for start, end in edges]


def test_every_character_has_all_latents_once(sentences: list[Document]) -> None:
    table = facts.load()
    subject, answer, part = map(facts.LATENTS.index, ("subject", "answer", "part"))
    for document in sentences[:: len(sentences) // 40]:
        text = str(document.text)
        latents: list[dict[int, int]] = [{} for _ in text]
        for span in document.spans:
            for values in latents[span.start : span.end]:
                assert span.latent not in values
                values[span.latent] = span.value
        assert all(len(values) == len(facts.LATENTS) for values in latents)
        for span in document.spans:
            if span.latent != part:
                continue
            here, values = text[span.start : span.end], latents[span.start]
            if facts.PARTS[span.value] == "subject":
                assert here == table.subjects[values[subject]]
            if facts.PARTS[span.value] == "answer":
                assert here == " " + table.answers[values[answer]]


def test_the_text_is_the_same_every_time(sentences: list[Document]) -> None:
    assert list(facts.documents()) == sentences
    assert len({document.key for document in sentences}) == len(sentences)


# Names


def test_both_texts_follow_each_other(library: list[Document], sentences: list[Document]) -> None:
    keys = [document.key for document in builtin.documents("builtin:")]
    assert keys == [document.key for document in [*library, *sentences]]


def test_wrong_names() -> None:
    with pytest.raises(DataError, match=r"no built-in text .*; did you mean 'builtin:stdlib'\?"):
        next(builtin.documents("builtin:stdlb"))
    with pytest.raises(ModelError, match="no built-in model 'builtin:big'"):
        builtin.model_path("builtin:big")


def test_the_bundled_model_is_there() -> None:
    files = {file.name for file in builtin.model_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
