"""The record of consumed samples: what ranks and sessions wrote comes back as one stream, and the audit counts it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.order import Order, micro_batch_positions
from pipeline.samples import SampleWriter, Update, audit, read_samples
from shards.errors import UserError

N, MICRO, WORKERS = 130, 8, 4
KN = MICRO * WORKERS
ORDER = Order(N, 5)


def rate(update: int) -> float:
    return 0.1 + 0.01 * update


def session(
    run: Path, updates: range, world_size: int, *, order: Order = ORDER, stop_rank: tuple[int, int] | None = None
) -> None:
    """What one process group records; with `stop_rank` (rank, updates) one rank is behind the others."""
    if (run / "samples").exists():
        time.sleep(0.02)  # later than the session before, by the clock of the file system too
    accumulation = WORKERS // world_size
    for rank in range(world_size):
        writer = SampleWriter(run, updates.start, rank, world_size)
        for done, update in enumerate(updates):
            if stop_rank == (rank, done):
                break
            slices = [
                micro_batch_positions(update, step, rank, micro=MICRO, accumulation=accumulation, world_size=world_size)
                for step in range(accumulation)
            ]
            writer.write(update, rate(update), [order.ids(*positions) for positions in slices])
        writer.close()


def files(run: Path) -> list[Path]:
    return sorted((run / "samples").iterdir())


def edit(run: Path, update: int, index: int, value: int) -> None:
    """Replace one recorded id of rank 0's first micro-step."""
    path = files(run)[0]
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        record = json.loads(line)
        if record["update"] == update:
            record["ids"][0][index] = value
            lines[number] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")


def assert_is_the_stream(updates: dict[int, Update], count: int) -> None:
    assert list(updates) == list(range(count))
    for number, update in updates.items():
        assert update.ids.dtype == np.int64
        assert np.array_equal(update.ids, ORDER.ids(number * KN, (number + 1) * KN)), number
        assert update.lr == rate(number)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ids_of_all_ranks_come_back_in_stream_order(tmp_path, world_size):
    session(tmp_path, range(0, 9), world_size)
    assert len(files(tmp_path)) == world_size
    assert_is_the_stream(read_samples(tmp_path), 9)


def test_a_rate_comes_back_to_the_last_bit(tmp_path):
    lr = float(np.nextafter(0.1, 1))
    writer = SampleWriter(tmp_path, 0, 0, 1)
    writer.write(0, lr, [np.arange(3)])
    writer.close()
    assert read_samples(tmp_path)[0].lr == lr


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = SampleWriter(tmp_path, 0, 0, 1)
    writer.write(0, 0.1, [np.arange(3)])
    assert read_samples(tmp_path)[0].ids.tolist() == [0, 1, 2]
    writer.close()


def test_resume_on_another_world_size_replaces_the_updates_it_does_again(tmp_path):
    other = Order(N, 99)  # the ids that a later process really used must win
    session(tmp_path, range(0, 7), 4, order=ORDER)
    session(tmp_path, range(4, 7), 4, order=other)
    session(tmp_path, range(4, 10), 2, order=ORDER)
    assert_is_the_stream(read_samples(tmp_path), 10)


@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (1, 4), (4, 1)])
def test_session_killed_before_its_first_save_is_superseded_by_the_next_on_any_world_size(tmp_path, first, second):
    # both start at update 4, because the checkpoint is the same; the second goes on where the first was killed
    session(tmp_path, range(0, 6), 2)
    session(tmp_path, range(4, 7), first)
    session(tmp_path, range(4, 10), second)
    assert_is_the_stream(read_samples(tmp_path), 10)


def test_killed_session_that_reached_further_than_its_successor_does_not_count_beyond_it(tmp_path):
    session(tmp_path, range(0, 9), 4)
    session(tmp_path, range(4, 6), 2)
    assert_is_the_stream(read_samples(tmp_path), 6)


def test_later_session_from_an_earlier_checkpoint_wins(tmp_path):
    # the newest save was damaged and removed, so the third process began before the second
    session(tmp_path, range(0, 6), 4)
    session(tmp_path, range(5, 9), 4, order=Order(N, 99))
    session(tmp_path, range(3, 12), 4)
    assert_is_the_stream(read_samples(tmp_path), 12)


@pytest.mark.parametrize("cut", [1, 2, 5, 20, 60])
def test_partial_last_line_of_a_killed_rank_drops_that_update_alone(tmp_path, cut):
    session(tmp_path, range(0, 5), 2)
    path = files(tmp_path)[1]
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    # without its newline alone the line is whole
    assert_is_the_stream(read_samples(tmp_path), 5 if cut == 1 else 4)


def test_update_that_one_rank_did_not_finish_is_not_done(tmp_path):
    session(tmp_path, range(0, 6), 4, stop_rank=(2, 3))
    assert_is_the_stream(read_samples(tmp_path), 3)


def test_killed_then_resumed_elsewhere_is_the_unbroken_stream(tmp_path):
    session(tmp_path, range(0, 8), 4, stop_rank=(1, 7))
    path = files(tmp_path)[3]
    path.write_bytes(path.read_bytes()[:-30])
    session(tmp_path, range(5, 13), 2)
    assert_is_the_stream(read_samples(tmp_path), 13)
    rows = audit(tmp_path, N)
    assert [row["used"] for row in rows] == [130, 130, 130, 13 * KN - 3 * 130]
    assert all(row["missing"] == row["repeated"] == 0 for row in rows)


def test_same_start_again_overwrites_the_killed_sessions_file(tmp_path):
    session(tmp_path, range(0, 7), 2, order=Order(N, 99))
    session(tmp_path, range(0, 4), 2)
    assert_is_the_stream(read_samples(tmp_path), 4)


def test_other_files_in_the_folder_are_ignored(tmp_path):
    session(tmp_path, range(0, 2), 1)
    (tmp_path / "samples" / "notes.jsonl").write_text("not a record\n")
    (tmp_path / "samples" / "from-0-rank-0-of-1.jsonl.bak").write_text("not a record\n")
    assert_is_the_stream(read_samples(tmp_path), 2)


@pytest.mark.parametrize("make", [False, True])
def test_run_without_a_record_says_how_to_make_one(tmp_path, make):
    if make:
        (tmp_path / "samples").mkdir()
    with pytest.raises(UserError) as caught:
        read_samples(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "recipe.logging.record_samples=true" in str(caught.value)


# ---------------------------------------------------------------- the audit


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_audit_of_exact_epochs(tmp_path, world_size):
    updates = -(-3 * N // KN)
    session(tmp_path, range(0, updates), world_size)
    assert audit(tmp_path, N) == [
        {"epoch": 1, "used": 130, "missing": 0, "repeated": 0},
        {"epoch": 2, "used": 130, "missing": 0, "repeated": 0},
        {"epoch": 3, "used": 130, "missing": 0, "repeated": 0},
        {"epoch": 4, "used": updates * KN - 390, "missing": 0, "repeated": 0},
    ]


def test_audit_finds_a_repeated_and_a_missing_image_in_its_epoch(tmp_path):
    session(tmp_path, range(0, 13), 2)
    ids = ORDER.ids(0, 3 * N)
    # update 5 begins at position 160, in epoch 2; its first image is replaced by another of the same epoch
    edit(tmp_path, 5, 0, int(ids[200]))
    rows = audit(tmp_path, N)
    assert [(row["missing"], row["repeated"]) for row in rows] == [(0, 0), (1, 1), (0, 0), (0, 0)]


def test_audit_finds_an_image_used_twice_in_an_unfinished_epoch(tmp_path):
    session(tmp_path, range(0, 2), 1)
    edit(tmp_path, 1, 3, int(ORDER.ids(0, 1)[0]))
    (row,) = audit(tmp_path, N)
    assert row["used"] == 64
    assert row["repeated"] == 1


def test_audit_finds_an_id_that_is_not_in_the_set(tmp_path):
    session(tmp_path, range(0, 5), 1)
    edit(tmp_path, 1, 3, N)
    assert audit(tmp_path, N)[0]["missing"] == 1


def test_audit_of_padded_epochs_is_not_clean(tmp_path):
    """What torch's DistributedSampler does: the epoch rounded up to full batches with the first images again."""
    writer = SampleWriter(tmp_path, 0, 0, 1)
    epoch = np.concatenate([ORDER.ids(0, N), ORDER.ids(0, 160 - N)])
    for update in range(10):
        writer.write(update, 0.1, [np.resize(epoch, 320)[update * KN : (update + 1) * KN]])
    writer.close()
    rows = audit(tmp_path, N)
    assert [row["repeated"] for row in rows] != [0] * len(rows)
    assert sum(row["missing"] for row in rows[:2]) > 0


def test_audit_refuses_a_record_with_a_hole(tmp_path):
    session(tmp_path, range(0, 3), 2)
    session(tmp_path, range(5, 8), 2)
    with pytest.raises(UserError) as caught:
        audit(tmp_path, N)
    assert "update 3 was not recorded" in str(caught.value)
