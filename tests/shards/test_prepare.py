"""From class folders to shards: content, determinism, interruption."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shards.catalog import build_catalog, shuffled
from shards.files import exclusive
from shards.idx import format_index
from shards.images import image_extension
from shards.index import load_split
from shards.prepare import prepare
from shards.sources.base import Entry, Source
from shards.sources.demo import Demo
from shards.table import read_shard
from shards.writer import ShardWriter, _header


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def images_by_class(root: Path) -> Counter:
    return Counter((path.parent.name, path.read_bytes()) for path in root.glob("*/*"))


def test_every_image_verbatim_under_its_label(prepared, two_splits):
    for name in ("train", "val"):
        split = load_split(prepared, name)
        found = Counter()
        for sample in split.samples:
            with split.shards[sample["shard"]].path.open("rb") as file:
                data = os.pread(file.fileno(), int(sample["size"]), int(sample["offset"]))
            found[split.classes[sample["label"]], data] += 1
        assert found == images_by_class(two_splits / name)


def test_extension_says_what_the_content_is(prepared):
    kinds = Counter()
    for tar_path in prepared.glob("*.tar"):
        with tarfile.open(tar_path) as tar:
            for member in tar:
                extension = member.name.rpartition(".")[2]
                kinds[extension] += 1
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert member.mode == 0o444
                if extension != "cls":
                    assert image_extension(tar.extractfile(member).read()) == extension
    assert kinds["png"] > 5 and kinds["jpg"] > 50 and kinds["cls"] == 81


def test_samples_are_shuffled_over_the_whole_split_and_cut_evenly(prepared, two_splits, run, tmp_path):
    split = load_split(prepared, "train")
    sizes = [shard.samples for shard in split.shards]
    assert len(sizes) == 8 and max(sizes) - min(sizes) <= 1 and sum(sizes) == 60
    changes = np.count_nonzero(np.diff(split.samples["label"]))
    assert 25 < changes < 55, "class-sorted shards would have 2 changes of label"
    assert run("prepare", "imagefolder", two_splits, tmp_path / "out", "--seed", 1, "--shards", 3)[0] == 0
    other = load_split(tmp_path / "out", "train")
    assert [shard.samples for shard in other.shards] == [20, 20, 20]
    assert len(load_split(tmp_path / "out", "val").shards) == 2
    assert sorted(map(other.key, range(60))) == sorted(map(split.key, range(60)))
    assert list(map(other.key, range(60))) != list(map(split.key, range(60)))


def test_shuffle_is_a_fixed_permutation():
    order = shuffled(1000, "onehour shards 0 train")
    assert sorted(order) == list(range(1000))
    # a golden value: a change here would change the bytes of everybody's shards
    assert order[:6].tolist() == [654, 116, 414, 38, 12, 589]
    assert order.tolist() != shuffled(1000, "onehour shards 1 train").tolist()


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(prepared, two_splits, tmp_path, tree, run, workers):
    assert run("prepare", "imagefolder", two_splits, tmp_path / "out", "--workers", workers)[0] == 0
    assert tree(tmp_path / "out") == tree(prepared)


def test_bytes_do_not_depend_on_where_the_source_lies(prepared, two_splits, tmp_path, tree, run):
    shutil.copytree(two_splits, tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
    assert run("prepare", "imagefolder", tmp_path / "elsewhere", tmp_path / "out", "--workers", 1)[0] == 0
    assert tree(tmp_path / "out") == tree(prepared)


def test_finished_data_set_is_left_alone_and_a_lost_shard_is_made_again(prepared, two_splits, tmp_path, tree, run):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.*")}
    code, said, _ = run("prepare", "imagefolder", two_splits, out)
    assert code == 0 and "nothing to do" in said
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.*")} == before
    (out / "train-00003.tar").unlink()
    with (out / "val-00001.tar").open("ab") as file:
        file.write(b"x")
    code, said, _ = run("prepare", "imagefolder", two_splits, out, "--workers", 1)
    assert code == 0 and "found     9 of 11" in said
    assert tree(out) == tree(prepared)


def test_other_seed_data_or_options_are_refused_unless_overwritten(prepared, two_splits, tmp_path, tree, run, refuse):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    for options, difference in ((["--seed", 5], "seed: 0 there, 5 asked for"), (["--shards", 2], "shards: 8 there")):
        message = refuse("prepare", "imagefolder", two_splits, out, *options)
        assert str(out) in message and difference in message and "--overwrite" in message
    assert "source: imagefolder there, demo asked for" in refuse("prepare", "demo", out)
    assert tree(out) == tree(prepared)
    assert run("prepare", "imagefolder", two_splits, out, "--seed", 5, "--shards", 2, "--overwrite")[0] == 0
    assert len(list(out.glob("*.tar"))) == 3
    assert run("verify", out, "--digests")[0] == 0


@pytest.mark.parametrize("name", ["train-0.tar", "train-00000.tar"])
def test_shards_of_another_tool_are_not_overwritten(two_splits, tmp_path, refuse, write_tar, make_image, tree, name):
    write_tar(tmp_path / name, [("a.jpg", make_image(1)), ("a.cls", b"0")])
    before = tree(tmp_path)
    assert name in refuse("prepare", "imagefolder", two_splits, tmp_path)
    message = refuse("prepare", "imagefolder", two_splits, tmp_path, "--overwrite")
    assert name in message and "--overwrite does not remove it" in message
    assert before.items() <= tree(tmp_path).items()


def test_overwriting_leaves_no_shard_of_the_old_data_set(prepared, two_splits, tmp_path, tree, run, refuse, write_tar):
    out = tmp_path / "out"
    shutil.copytree(two_splits, tmp_path / "three")
    shutil.copytree(two_splits / "val", tmp_path / "three" / "test")
    assert run("prepare", "imagefolder", tmp_path / "three", out)[0] == 0
    assert (out / "test-00000.tar").exists()
    stray = write_tar(out / "train-00099.tar", [("a.jpg", b""), ("a.cls", b"0")])
    before = tree(out)
    assert str(stray) in refuse("prepare", "imagefolder", two_splits, out, "--overwrite")
    assert tree(out) == before, "refused before anything is removed"
    stray.unlink()
    assert run("prepare", "imagefolder", two_splits, out, "--overwrite")[0] == 0
    assert tree(out) == tree(prepared)


def test_overwriting_a_data_set_of_another_tool(prepared, two_splits, tmp_path, tree, run, write_tar, make_image):
    write_tar(tmp_path / "out" / "train-0.tar", [("a.jpg", make_image(1)), ("a.cls", b"0")])
    assert run("index", tmp_path / "out")[0] == 0
    assert run("prepare", "imagefolder", two_splits, tmp_path / "out", "--overwrite")[0] == 0
    assert tree(tmp_path / "out") == tree(prepared)


def test_killed_while_it_removed_the_old_data_set(prepared, two_splits, tmp_path, tree, run, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    unlink = Path.unlink

    def stop_at_a_shard(path: Path, missing_ok: bool = False) -> None:
        if path.name == "train-00004.tar":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as context:
        context.setattr(Path, "unlink", stop_at_a_shard)
        assert run("prepare", "imagefolder", two_splits, out, "--overwrite", "--seed", 3)[0] == 130
    assert not (out / "index.json").exists() and (out / "train-00004.tar").exists()
    assert run("prepare", "imagefolder", two_splits, out, "--overwrite")[0] == 0
    assert tree(out) == tree(prepared)


@pytest.mark.parametrize(("name", "content"), [("classes.json", None), ("classes.json", "[]"), ("_info.json", "{}")])
def test_lost_lists_of_a_complete_data_set_are_written_again(prepared, two_splits, tmp_path, tree, run, name, content):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    (out / name).unlink()
    if content is not None:
        (out / name).write_text(content)
    code, said, _ = run("prepare", "imagefolder", two_splits, out)
    assert code == 0 and f"wrote {name} again" in said and "nothing to do" not in said
    assert tree(out) == tree(prepared)


def test_what_is_complete_is_not_decoded_again_and_says_so(prepared, two_splits, tmp_path, run):
    shutil.copytree(prepared, tmp_path / "out")
    said = run("prepare", "imagefolder", two_splits, tmp_path / "out", "--check-decode")[1]
    assert f"not decoded again: shards verify {tmp_path / 'out'} --decode" in said


def test_temporary_files_of_killed_runs_are_removed(tmp_path, write_class_folders, refuse):
    ended = subprocess.Popen(["true"])
    ended.wait()
    state = tmp_path / "out" / ".prepare"
    state.mkdir(parents=True)
    running = subprocess.Popen(["sleep", "60"])
    orphan, other = (state / f".train-00000.tar.{process.pid}.tmp" for process in (ended, running))
    for path in (orphan, other):
        path.write_bytes(b"half a shard")
    root = write_class_folders(tmp_path / "in")
    (root / "class_0" / "empty.jpg").touch()
    message = refuse("prepare", "imagefolder", root, tmp_path / "out")
    running.kill()
    running.wait()
    assert "empty.jpg" in message
    assert not orphan.exists() and other.exists(), "a process that runs may still write its own"


class _ValidationFirst(Demo):
    splits = ("val", "train")


def test_limits_and_numbers_are_about_training_whatever_the_order_of_the_splits(tmp_path):
    manifest = prepare(_ValidationFirst(), tmp_path / "out", shards=5, limit_per_class=2, workers=1)
    assert list(manifest.splits) == ["train", "val"]
    assert len(manifest.splits["train"]) == 5
    counts = {name: sum(shard.samples for shard in shards) for name, shards in manifest.splits.items()}
    assert counts == {"train": 20, "val": 360}


def test_output_is_locked(two_splits, tmp_path, refuse):
    with exclusive(tmp_path):
        started = time.monotonic()
        assert "another shards process" in refuse("prepare", "imagefolder", two_splits, tmp_path)
        assert time.monotonic() - started < 10, "refused, not waited for"
    assert not list(tmp_path.glob("*.tar"))


def test_output_inside_the_source_is_refused(two_splits, refuse):
    assert "inside the folder" in refuse("prepare", "imagefolder", two_splits, two_splits / "train" / "out")
    assert not (two_splits / "train" / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", 0], "--shards 0"),
        (["--shards", 61], "--shards 61: more than the 60 images"),
        (["--workers", 0], "--workers 0"),
        (["--samples-per-shard", -1], "--samples-per-shard -1"),
    ],
)
def test_impossible_numbers(two_splits, tmp_path, refuse, options, message):
    assert message in refuse("prepare", "imagefolder", two_splits, tmp_path / "out", *options)


# ---- interruption: a set large enough that killing meets every phase

SHARDS = 30


@pytest.fixture(scope="module")
def many_images(tmp_path_factory, make_image) -> Path:
    root = tmp_path_factory.mktemp("many")
    kinds = [make_image(number) for number in range(50)]
    for c in range(4):
        (root / f"c{c}").mkdir()
        for i in range(300):
            (root / f"c{c}" / f"{i:04d}.jpg").write_bytes(kinds[(i + c) % 50])
    return root


@pytest.fixture(scope="module")
def uninterrupted(many_images, tmp_path_factory, start, tree) -> dict[str, str]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    process = start("prepare", "imagefolder", many_images, out, "--shards", SHARDS, "--workers", 1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return tree(out)


def finish(start, source: Path, out: Path, workers: int) -> str:
    process = start("prepare", "imagefolder", source, out, "--shards", SHARDS, "--workers", workers)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize(("moment", "before", "after"), [(0, 2, 1), (1, 1, 2), (2, 2, 3), (3, 3, 2)])
def test_killed_and_run_again_gives_the_same_bytes(
    many_images, uninterrupted, tmp_path, start, tree, moment, before, after
):
    out = tmp_path / "out"
    process = start("prepare", "imagefolder", many_images, out, "--shards", SHARDS, "--workers", before)
    finished = random.Random(moment).randint(1, SHARDS // 2)
    wait_for(lambda: len(list((out / ".prepare").glob("train-*.json"))) >= finished)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "index.json").exists(), "killed too late to show anything"
    assert (out / ".prepare" / "plan.json").exists()
    said = finish(start, many_images, out, after)
    assert f" of {SHARDS} shards from an earlier run" in said
    assert tree(out) == uninterrupted


@pytest.mark.parametrize("to_group", [True, False], ids=["Ctrl-C", "SIGINT to the parent"])
def test_interrupted_by_hand(many_images, uninterrupted, tmp_path, start, tree, to_group):
    out = tmp_path / "out"
    process = start("prepare", "imagefolder", many_images, out, "--shards", SHARDS, "--workers", 2)
    wait_for(lambda: any((out / ".prepare").glob("train-*.json")))
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "run the same command again" in said and "Traceback" not in said
    assert not (out / "index.json").exists()
    finish(start, many_images, out, 1)
    assert tree(out) == uninterrupted


def test_an_interruption_promises_to_go_on_only_where_that_is_so(prepared, two_splits, tmp_path, run, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("shards.prepare.prepare", interrupted)
    monkeypatch.setattr("shards.verify.verify", interrupted)
    assert "run the same command again" in run("prepare", "imagefolder", two_splits, tmp_path / "out")[2]
    assert run("verify", prepared) == (130, "", "shards: interrupted\n")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_reader_that_has_gone_is_no_error(prepared, options):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "shards.cli", "verify", str(prepared), "--workers", "1", *options]
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2], check=False)
    os.close(write)
    assert (process.returncode, process.stderr) == (141, b"")


def kill(process: subprocess.Popen, whole_group: bool) -> None:
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_many_times_at_any_moment(many_images, uninterrupted, tmp_path, start, tree):
    out = tmp_path / "out"
    moments = random.Random(7)
    phases = []
    for number in range(3):
        process = start("prepare", "imagefolder", many_images, out, "--shards", SHARDS, "--workers", 1 + number % 3)
        if number:
            time.sleep(moments.uniform(0.3, 0.9))
        else:
            wait_for((out / ".prepare" / "plan.json").exists)
            time.sleep(moments.uniform(0, 0.1))
        kill(process, whole_group=number != 1)
        phases.append(phase(out))
    assert "writing" in phases, phases
    finish(start, many_images, out, 2)
    assert tree(out) == uninterrupted


@pytest.fixture(scope="module")
def duration(many_images, tmp_path_factory, start) -> float:
    """Seconds that a run with two workers takes here and now."""
    started = time.monotonic()
    finish(start, many_images, tmp_path_factory.mktemp("duration") / "out", 2)
    return time.monotonic() - started


def phase(out: Path) -> str:
    """How far a run has come, from what it has left."""
    state = out / ".prepare"
    if (out / "index.json").exists():
        return "complete"
    if len(list(state.glob("train-*.json"))) == SHARDS:
        return "finishing"
    if (state / "plan.json").exists():
        return "writing"
    return "listing" if (state / "listing").exists() else "starting"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("whole_group", [True, False], ids=["whole group", "parent alone"])
def test_killed_at_random_moments(many_images, uninterrupted, tmp_path, start, tree, duration, whole_group):
    moments = random.Random(f"moments {whole_group}")
    phases = Counter()
    number = 0
    while phases.total() - phases["complete"] < 20:
        out = tmp_path / "out"
        workers = 1 + number % 3
        process = start("prepare", "imagefolder", many_images, out, "--shards", SHARDS, "--workers", workers)
        time.sleep(duration * (number % 20 + moments.random()) / 20)  # each twentieth of the duration in turn
        kill(process, whole_group)
        seen = phase(out)
        phases[seen] += 1
        duration *= 0.9 if seen == "complete" else 1  # too late: the machine is less busy than it was
        finish(start, many_images, out, 1 + (number + 1) % 3)
        assert tree(out) == uninterrupted, f"killed while {seen}"
        shutil.rmtree(out)
        number += 1
    print(f"killed while: {dict(phases)}")
    assert phases["writing"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["whole group", "parent alone"])
@pytest.mark.parametrize(
    "pattern",
    [
        ".prepare/listing",
        ".prepare/listing/*.entries",
        ".prepare/plan.json",
        ".prepare/.train-*.tmp",
        f"train-{SHARDS - 1:05d}.idx",
        f".prepare/train-{SHARDS - 1:05d}.json",
        ".cache/*.npy",
        "classes.json",
        "_info.json",
        "index.json",
    ],
)
def test_killed_in_every_phase(many_images, uninterrupted, tmp_path, start, tree, pattern, whole_group):
    out = tmp_path / "out"
    process = start("prepare", "imagefolder", many_images, out, "--shards", SHARDS, "--workers", 2)
    end = time.monotonic() + 60
    while not any(out.glob(pattern)):
        assert time.monotonic() < end and process.poll() is None, "never seen"
    kill(process, whole_group)
    finish(start, many_images, out, 3)
    assert tree(out) == uninterrupted


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")
def test_workers_end_with_their_parent_and_do_not_disturb_its_successor(
    many_images, uninterrupted, tmp_path, start, tree
):
    out = tmp_path / "out"
    process = start("prepare", "imagefolder", many_images, out, "--shards", SHARDS, "--workers", 2)
    wait_for(lambda: any((out / ".prepare").glob("train-*.json")))
    workers = children_of(process.pid)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)  # the parent alone
    process.wait()
    successor = start("prepare", "imagefolder", many_images, out, "--shards", SHARDS, "--workers", 3)
    wait_for(lambda: not any(map(is_running, workers)), seconds=5)
    said, _ = successor.communicate(timeout=60)
    assert successor.returncode == 0, said
    assert tree(out) == uninterrupted


@pytest.mark.parametrize(("limit", "named"), [(80_000, "train-000"), (20_000, "listing")])
def test_full_disk_is_a_clear_error_and_loses_nothing(many_images, uninterrupted, tmp_path, start, tree, limit, named):
    def no_large_files() -> None:  # a limit on file size fails writes as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "out"
    options = ("prepare", "imagefolder", many_images, out, "--shards", SHARDS, "--workers", 2)
    process = start(*options, preexec_fn=no_large_files)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "cannot be written: File too large" in said and named in said and "Traceback" not in said
    assert not list(out.glob("*.tar"))
    if named != "listing":
        finish(start, many_images, out, 2)
        assert tree(out) == uninterrupted


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_really_full_disk_and_on_after_space_was_freed(many_images, uninterrupted, tmp_path, tree):
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    needed = sum(path.stat().st_size for path in many_images.rglob("*.jpg"))
    prepare = f"{sys.executable} -m shards.cli prepare imagefolder {many_images} {disk}/out --shards {SHARDS}"
    script = f"""
        mount -t tmpfs -o size=16m none {disk} || exit 77
        head -c $((16777216 - {needed} - 800000)) /dev/zero > {disk}/filler
        {prepare} --workers 2 && exit 78
        ls {disk}/out/*.tar | wc -l
        test -e {disk}/out/index.json && exit 79
        rm {disk}/filler
        {prepare} --workers 1 || exit 80
        cp -r {disk}/out {copy}
    """
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    if result.returncode in (1, 77) and "mount" in result.stderr + result.stdout:
        pytest.skip("may not mount here")
    assert result.returncode == 0, result
    assert "cannot be written: No space left on device" in result.stderr
    assert f" of {SHARDS} shards from an earlier run" in result.stdout
    assert tree(copy) == uninterrupted


def test_killed_worker_is_reported(many_images, tmp_path, start):
    out = tmp_path / "out"
    process = start("prepare", "imagefolder", many_images, out, "--shards", SHARDS, "--workers", 2)
    wait_for(lambda: any((out / ".prepare").glob("train-*.json")))

    # the resource tracker of multiprocessing is a child as well; workers hold the larger memory
    def memory(pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])

    os.kill(max(children_of(process.pid), key=memory), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "a worker process was killed" in said


# ---- sources


def test_demo_is_split_by_class_and_small(tmp_path, run):
    code, said, _ = run("prepare", "demo", tmp_path / "out")
    assert code == 0
    assert "1,437 train / 360 val images · 10 classes" in said
    train, val = load_split(tmp_path / "out", "train"), load_split(tmp_path / "out", "val")
    assert len(train.shards) == 8
    assert np.bincount(val.samples["label"]).min() >= 34
    assert not {train.key(i) for i in range(len(train))} & {val.key(i) for i in range(len(val))}


def test_demo_pixels_are_those_of_scikit_learn(tmp_path):
    import io

    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    source = Demo()
    for split in source.splits:
        for entry in list(source.entries(split))[::50]:
            number = int(entry.key.removeprefix("digit_"))
            image = Image.open(io.BytesIO(source.read(entry.locator)))
            assert entry.label == digits.target[number]
            assert image.mode == "L"
            assert np.abs(np.asarray(image) - np.round(digits.images[number] * 255 / 16)).max() <= 1


class _Many(Source):
    """Entries without images, for the cost of listing alone."""

    name = "many"
    classes = ("a",)
    splits = ("train",)

    @classmethod
    def from_arguments(cls, arguments):
        return cls()

    def entries(self, split):
        return (Entry(f"a_{i:09d}", 0, f"train/some/folder/of/a/class/image_{i:09d}.jpg") for i in range(30_000))

    def read(self, locator):
        raise NotImplementedError


def test_listing_keeps_next_to_nothing_per_sample(tmp_path):
    tracemalloc.start()
    catalog = build_catalog(_Many(), "train", 0, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert catalog.count == 30_000
    assert peak < 4e6, "as Python objects, 30,000 entries need more than 10 MB"
    entries = list(catalog.read(29_000, 30_000))
    assert len({entry.key for entry in entries}) == 1000
    assert all(entry.locator.endswith(f"{entry.key[2:]}.jpg") for entry in entries)


MEASURE_LISTING = """
import re, sys
from pathlib import Path
from shards.catalog import build_catalog
from shards.select import select
from shards.sources.base import Entry, Source

class Generated(Source):
    name, classes, splits = "generated", tuple(map(str, range(1000))), ("train",)
    from_arguments = read = None

    def entries(self, split):
        for i in range(int(sys.argv[2])):
            yield Entry(f"n01440764_{i:09d}", i % 1000, f"train/n01440764/n01440764_{i:09d}.JPEG", 110_000)

Generated.__abstractmethods__ = frozenset()
def peak():  # ru_maxrss would begin with the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
catalog = build_catalog(Generated(), "train", 0, Path(sys.argv[1]), select(Generated.classes, None, "900", None))
assert catalog.count == int(sys.argv[2]) * 9 // 10
assert sum(1 for _ in catalog.read(catalog.count - 500, catalog.count)) == 500
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_of_listing_a_million_images(tmp_path):
    grown = {}
    for count in (1_000, 1_000_000):
        result = subprocess.run(
            [sys.executable, "-c", MEASURE_LISTING, str(tmp_path), str(count)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert result.returncode == 0, result.stderr
        grown[count] = int(result.stdout)
    per_sample = (grown[1_000_000] - grown[1_000]) / 1_000_000
    print(f"listing: {per_sample:.0f} bytes of memory per sample, {grown[1_000_000] / 1e6:.0f} MB in all")
    assert per_sample < 64, "as Python objects, a sample needs some 400"


@pytest.mark.parametrize("name", ["a.jpg", "x" * 100, "x" * 101, "x" * 300 + ".png", "größe.jpg", "\udcff.jpg"])
@pytest.mark.parametrize("size", [0, 1, 511, 110_000, 2**33 - 1, 2**33])
def test_headers_are_those_of_tarfile(name, size):
    expected = tarfile.TarInfo(name)
    expected.size, expected.mode = size, 0o444
    assert _header(name, size) == expected.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def test_table_of_a_written_shard_is_what_its_reader_finds(tmp_path, make_image):
    with (tmp_path / "a.tar").open("wb") as file:
        writer = ShardWriter(file)
        for i in range(7):
            writer.add("k" * (90 + i) + str(i), 10**i, make_image(i), "jpg")  # names around the limit of 100 bytes
        writer.close()
    (tmp_path / "a.idx").write_bytes(format_index(writer.samples))
    read, written = read_shard(tmp_path / "a.tar"), writer.table()
    np.testing.assert_array_equal(written.samples, read.samples)
    np.testing.assert_array_equal(written.key_hashes, read.key_hashes)


def test_record_names_source_seed_and_counts(prepared):
    record = json.loads((prepared / "index.json").read_bytes())["onehour"]
    assert record["source"] == "imagefolder" and record["seed"] == 0 and record["classes"] == 3
    assert record["splits"]["train"]["samples"] == 60
    assert len(record["splits"]["val"]["listing_sha256"]) == 64
