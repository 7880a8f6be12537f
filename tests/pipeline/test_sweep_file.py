"""A sweep file: what it may say, what its runs are, and every mistake in it as one message with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config, sweep_file
from shards.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
GOOD = f"""
title: A sweep
base: {CONFIGS}/demo.json
seeds: [0, 7]
set: {{recipe.epochs: 3, optimizer.params.weight_decay: 5e-4}}
arms:
  - name: small
    paper: {{error: 23.60, std: 0.12}}
  - name: large
    set: {{train_batch_size: 256, recipe.epochs: 4, recipe.model.args: {{layers: [1, 1, 1, 1]}}}}
"""


def write(folder: Path, text: str, name: str = "table.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, old: str = "", new: str = "") -> sweep_file.Sweep:
    assert old in GOOD
    return sweep_file.load(write(folder, GOOD.replace(old, new, 1)))


def test_every_arm_has_a_run_for_each_seed_with_the_values_of_its_sections(tmp_path):
    sweep = load(tmp_path)
    runs = sweep.runs(Path("out"))
    assert [(run.name, str(run.folder), run.seed) for run in runs] == [
        ("small/seed-0", "out/small/seed-0", 0),
        ("small/seed-7", "out/small/seed-7", 7),
        ("large/seed-0", "out/large/seed-0", 0),
        ("large/seed-7", "out/large/seed-7", 7),
    ]
    assert runs[0].log == Path("out/small/seed-0.log")
    small, large = (config.load(run.config, run.overrides) for run in runs[1:3])
    assert (small.recipe.epochs, small.recipe.seed, small.run_folder) == (3, 7, Path("out/small/seed-7"))
    assert (large.recipe.epochs, large.recipe.seed, large.blocks.train_batch_size) == (4, 0, 256), "the arm wins"
    assert large.recipe.model.args == {"layers": [1, 1, 1, 1]}
    assert small.blocks.optimizer.params["weight_decay"] == 5e-4, "a number, though YAML 1.1 takes it for text"


def test_the_command_line_wins_over_the_file(tmp_path):
    run = load(tmp_path).runs(Path("out"), ["recipe.epochs=9", 'recipe.data="1"'], ["large"])[0]
    loaded = config.load(run.config, run.overrides)
    assert (loaded.recipe.epochs, loaded.recipe.data, run.arm.name) == (9, "1", "large")


def test_an_arm_may_have_its_own_configuration_beside_the_file(tmp_path):
    write(tmp_path, (CONFIGS / "demo.json").read_text(), "own.json")
    (tmp_path / "sweeps").mkdir()
    text = GOOD.replace("- name: large", "- name: large\n    config: ../own.json")
    sweep = sweep_file.load(write(tmp_path / "sweeps", text))
    assert [run.config for run in sweep.runs(Path("x"))[1:3]] == [CONFIGS / "demo.json", tmp_path / "own.json"]


def test_a_sweep_through_a_link_names_its_files_as_the_system_does(tmp_path):
    """`..` of a linked folder is not the folder that the link is in."""
    write(tmp_path / "real", (CONFIGS / "demo.json").read_text(), "own.json")
    write(tmp_path / "real" / "sweeps", GOOD.replace(f"{CONFIGS}/demo.json", "../own.json"))
    (tmp_path / "link").symlink_to(tmp_path / "real" / "sweeps")
    run = sweep_file.load(tmp_path / "link" / "table.yaml").runs(Path("x"))[0]
    assert run.config.samefile(tmp_path / "real" / "own.json")


def test_figures_are_completed_and_there_is_one_by_default(tmp_path):
    (figure,) = load(tmp_path).figures()
    assert (figure.kind, figure.baseline, figure.arms, figure.validation) == ("curves", "small", ["large"], False)
    given = "[{kind: minibatch}, {kind: curves, validation: true}, {kind: curves, arms: [large]}]"
    text = f"title: A sweep\nbaseline: large\nfigures: {given}"
    minibatch, first, second = load(tmp_path, "title: A sweep", text).figures()
    assert (minibatch.kind, minibatch.arms) == ("minibatch", ["small", "large"])
    assert (first.baseline, first.arms, first.validation) == ("large", ["small"], True)
    assert second.arms == ["large"]
    (alone,) = sweep_file.load(write(tmp_path, GOOD[: GOOD.index("  - name: large")])).figures()
    assert (alone.baseline, alone.arms) == ("small", ["small"])


MISTAKES = [
    ("title: A sweep\n", "", ["title is missing"]),
    ("title: A sweep", "titel: A sweep", ['unknown key "titel"; did you mean "title"?', "title is missing"]),
    ("title: A sweep", "title: 3", ["title: input should be a valid string, not 3"]),
    ("seeds: [0, 7]", "seeds: []", ["seeds: list should have at least 1 item"]),
    ("seeds: [0, 7]", "seeds: [0, 0]", ["seeds: every seed is given once"]),
    ("seeds: [0, 7]", "seeds: [-1]", ["seeds: seeds are not negative"]),
    ("seeds: [0, 7]", 'seeds: ["0"]', ['seeds.0: input should be a valid integer, not "0"']),
    ("- name: small", "- name: no", ["arms.0.name: input should be a valid string, not false"]),
    ("- name: small", "- name: ../up", ["arms.0.name: an arm's runs are in a folder of its name", '"../up"']),
    ("- name: small", "- name: .", ["arms.0.name: an arm's runs are in a folder of its name"]),
    ("- name: small", "- name: ''", ["arms.0.name: an arm's runs are in a folder of its name"]),
    ("- name: small", "- name: large", ["arms.1.name: there is an arm large before"]),
    ("  - name: large\n    set:", "  - name: large\n    sett:", ['arms.1: unknown key "sett"; did you mean "set"?']),
    ("error: 23.60", "error: 236.0", ["arms.0.paper.error: input should be less than or equal to 100, not 236"]),
    ("error: 23.60, ", "", ["arms.0.paper.error is missing"]),
    (f"base: {CONFIGS}/demo.json\n", "", ["arms.0: it has no config, and the sweep no base"]),
    ("recipe.epochs: 3", "recipe..epochs: 3", ['set: "recipe..epochs" is not the path of a value']),
    ("recipe.epochs: 3", "a=b: 3", ['set: "a=b" is not the path of a value']),
    ("recipe.epochs: 3", "recipe.seed: 3", ["set.recipe.seed: cannot be set: the seeds of a sweep are its seeds"]),
    ("recipe.epochs: 4", "recipe.run: x", ["arms.1.set.recipe.run: cannot be set", "--out DIR"]),
    ("recipe.epochs: 4", "a: 2017-06-08", ["arms.1.set.a: datetime.date(2017, 6, 8) is nothing that JSON has"]),
    ("recipe.epochs: 4", "a: .nan", ["arms.1.set.a: nan is nothing that JSON has"]),
    ("recipe.epochs: 4", "recipe.x: 1, recipe.x: 2", [':10: not valid YAML: the key "recipe.x" appears twice']),
    ("seeds: [0, 7]", "seeds: [0, 7", [":5: not valid YAML"]),
    ("seeds: [0, 7]", "seeds: !!python/name:os.system", ["not valid YAML: could not determine a constructor"]),
    ("title: A sweep", "title: A\nbaseline: smal", ['baseline: there is no arm smal; did you mean "small"?']),
    ("title: A sweep", "title: A\nfigures: [{kind: bars}]", ["figures.0.kind: input should be 'curves'"]),
    ("title: A sweep", "title: A\nfigures: [{kind: curves, arms: [x]}]", ["figures.0.arms.0: there is no arm x"]),
    ("title: A sweep", "title: A\nfigures: [{kind: minibatch, baseline: small}]", ["figures.0: baseline and"]),
]


@pytest.mark.parametrize(("old", "new", "expected"), MISTAKES)
def test_a_mistake_is_named_with_its_file_and_place(tmp_path, old, new, expected):
    with pytest.raises(UserError) as told:
        load(tmp_path, old, new)
    message = str(told.value)
    assert message.startswith(str(tmp_path / "table.yaml")), message
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize("text", ["", "- a\n", "3\n"])
def test_what_is_no_mapping_is_no_sweep(tmp_path, text):
    with pytest.raises(UserError, match="a sweep is a mapping with title, base, seeds and arms"):
        sweep_file.load(write(tmp_path, text))


def test_a_file_that_is_not_there_and_one_that_cannot_be_read(tmp_path):
    write(tmp_path, GOOD, "table1.yaml")
    with pytest.raises(UserError, match=r"tabel1\.yaml: there is no such sweep file; did you mean .*table1\.yaml"):
        sweep_file.load(tmp_path / "tabel1.yaml")
    with pytest.raises(UserError, match="cannot be read as a sweep file"):
        sweep_file.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"title: \xe9")
    with pytest.raises(UserError, match="cannot be read as a sweep file"):
        sweep_file.load(tmp_path / "latin.yaml")


def test_runs_that_there_are_not(tmp_path):
    sweep = load(tmp_path)
    with pytest.raises(UserError, match='there is no arm lage; did you mean "large"'):
        sweep.runs(Path("x"), only=["lage"])
    for path in ("recipe.seed=3", "recipe.run=here"):
        with pytest.raises(UserError, match=f"--set {path}: "):
            sweep.runs(Path("x"), [path])


def test_anchors_may_be_merged_and_overridden(tmp_path):
    text = GOOD.replace("set: {recipe.epochs: 3,", "set: &all {recipe.epochs: 3,").replace(
        "set: {train_batch_size: 256,", "set: {<<: *all, train_batch_size: 256,"
    )
    values = sweep_file.load(write(tmp_path, text)).arms[1].set
    assert values["optimizer.params.weight_decay"] == 5e-4 and values["recipe.epochs"] == 4
