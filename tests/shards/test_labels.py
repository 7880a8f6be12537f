"""Where labels stand and what they mean: the rules of `--label`."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.idx import list_samples
from shards.labels import Labels, read_sample


@pytest.fixture
def label_of(tmp_path, write_tar, make_image):
    """The label of a sample with these components beside its image."""

    def read(components: dict[str, bytes], rule: str = "cls", classes: tuple[str, ...] | None = None) -> int:
        members = [("a.jpg", make_image(1)), *((f"a.{name}", data) for name, data in components.items())]
        tar = write_tar(tmp_path / "a.tar", members)
        descriptor = os.open(tar, os.O_RDONLY)
        try:
            return read_sample(
                tar, descriptor, list_samples(tar)[0], pickle.loads(pickle.dumps(Labels(rule, classes)))
            )[2]
        finally:
            os.close(descriptor)

    return read


def as_json(document: object) -> dict[str, bytes]:
    return {"json": json.dumps(document).encode()}


ANIMALS = ("ant", "bee", "a long name")


@pytest.mark.parametrize(
    ("components", "rule", "label"),
    [
        ({"cls": b"2"}, "cls", 2),
        ({"CLS": b" 2\r\n"}, ".cls", 2),
        ({"cls": b"bee"}, "cls", 1),
        ({"txt": b"a long name\n"}, "txt", 2),
        ({"cls.txt": b"1", "txt": b"0"}, "cls.txt", 1),
        ({"index": b"002"}, "index", 2),
        (as_json({"label": 2}), "json:label", 2),
        (as_json({"label": 2.0}), "json:label", 2),
        (as_json({"label": "1"}), "json:label", 1),
        (as_json({"a": {"b": {"name": "bee"}}}), "json:a.b.name", 1),
        ({"meta.json": b'{"x": 0}'}, "meta.json:x", 0),
    ],
)
def test_rules(label_of, components, rule, label):
    assert label_of(components, rule, ANIMALS) == label


@pytest.mark.parametrize(
    ("components", "rule", "message"),
    [
        (as_json({"label": True}), "json:label", "neither a whole number nor a text: True"),
        (as_json({"label": None}), "json:label", "neither a whole number nor a text: None"),
        (as_json({"label": [1]}), "json:label", "neither a whole number"),
        (as_json({"label": 1.5}), "json:label", "neither a whole number"),
        (as_json({"label": float("nan")}), "json:label", "neither a whole number"),
        (as_json({"label": -1}), "json:label", "'-1' (field label of .json) is no class number"),
        (as_json({"label": 2**31}), "json:label", "is no class number"),
        (as_json({"class": 1, "name": "bee"}), "json:label", 'There: class (1), name ("bee").'),
        (as_json([1]), "json:label", "has no field 'label'"),
        ({"json": b"{"}, "json:label", "no valid JSON"),
        ({"json": b"[" * 100_000}, "json:label", "no valid JSON"),
        ({"json": b'{"label": ' + b"9" * 5000 + b"}"}, "json:label", "no valid JSON"),
        ({"json": b" " * (1 << 20) + b"{}"}, "json:label", "at most 1,048,576 are read"),
        ({"txt": b"x" * 2000}, "txt", "at most 1,024 are read"),
        ({"txt": b"\xff\xfe"}, "txt", "is no text"),
        ({"txt": b"cow"}, "txt", "Nor is it one of the 3 classes (ant, bee, a long name, …)"),
    ],
)
def test_labels_that_cannot_be_read(label_of, components, rule, message):
    with pytest.raises(UserError) as error:
        label_of(components, rule, ANIMALS)
    assert "a.tar: key a" in error.value.headline and message in str(error.value)


def test_names_that_mean_two_classes(label_of):
    with pytest.raises(UserError, match="is the name of several classes"):
        label_of({"cls": b"crane"}, "cls", ("crane", "maillot", "crane"))
    with pytest.raises(UserError, match="is a class number, and also the name of class 0"):
        label_of({"cls": b"1"}, "cls", ("1", "0"))
    assert label_of({"cls": b"1"}, "cls", ("0", "1")) == 1


@pytest.mark.parametrize(
    "rule", ["pyd", "pickle", "npy", "cls.pkl", "jpg", "", ":x", "json", "json:", "json:.", "txt:field"]
)
def test_rules_that_are_refused(rule):
    with pytest.raises(UserError, match="--label"):
        Labels(rule)


def test_pickle_is_never_loaded(tmp_path, write_tar, make_image, refuse):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").write_text, ("x",))

    bomb = pickle.dumps(Bomb())
    write_tar(tmp_path / "in" / "a.tar", [("a.jpg", make_image(1)), ("a.pyd", bomb), ("a.cls.pickle", bomb)])
    for rule in ("pyd", "cls.pickle"):
        assert "not loaded" in refuse("index", tmp_path / "in", "--label", rule)
    assert "has no label" in refuse("index", tmp_path / "in")
    assert not (tmp_path / "exploded").exists()


def test_a_missing_label_names_what_would_do(label_of):
    about = {"url": "x" * 50, "id": 7, "meta": {"synset": "n01"}, "width": 12}
    components = as_json(about) | {"txt": b"a photo", "npy": b"\x93NUMPY"}
    with pytest.raises(UserError) as error:
        label_of(components)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("key a: has no label (.cls); it consists of a.jpg and a.json and a.txt and a.npy")
    assert [line.strip() for line in lines[2:-1]] == [
        '--label json:meta.synset   ("n01")',
        "--label json:id   (7)",
        "--label json:width   (12)",
        "--label txt   ('a photo')",
    ]
