"""The page: what it says, and what a browser would fetch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import report
from tests.pipeline.report.conftest import Page, Run, rows_of, text_of, whole


@pytest.mark.usefixtures("no_pictures")
def test_unfinished_runs_are_marked_and_left_out_beside_finished_seeds(tmp_path: Path) -> None:
    done = whole(tmp_path / "a0")
    cut = Run(tmp_path / "a1", seed=1).begin().train_to(6)
    cut_large = Run(tmp_path / "b0", kn=2048).begin().train_to(3)
    folders = [done.save(), cut.save(broken=b'{"event": "train", "samp'), cut_large.save()]
    first, second = rows_of(folders)
    assert (first.finished, second.finished) == (True, False)
    assert first.error == pytest.approx(done.expected())
    assert second.difference is None
    page = text_of(report.write_report(folders, tmp_path / "out"))
    assert "a1 has not finished (epoch 6 of 20) and is left out of the figures." in page
    assert "b0 has not finished (epoch 3 of 20): its figures are those so far." in page
    assert "b0: 3 of 5 epoch evaluations exist (at epoch 1.001, 2.001, 3.002)." in page
    assert "b0: no answer yet, because b0 has not finished." in page
    assert "the record ends here" in page


@pytest.mark.usefixtures("no_pictures")
def test_images_that_are_not_the_whole_set_are_remarked_on(tmp_path: Path) -> None:
    run = Run(tmp_path / "a").begin().train_to(6, evaluated=4_992).finish()
    page = text_of(report.write_report([run.save()], tmp_path))
    assert "a was evaluated on 4,992 of 5,000 images: not the whole set." in page


def test_the_page_needs_nothing_but_itself(paper: dict[str, Any]) -> None:
    page = Page(paper["page"])
    assert page.open == []
    assert len(page.fetched) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"url\(|@import", page.styles)
    assert "@media print" in page.styles
    assert not re.search(r"https?://", paper["page"].read_text(encoding="utf-8"))


def test_the_question_comes_first_then_table_curves_plan_and_log(paper: dict[str, Any]) -> None:
    text = text_of(paper["page"]).split("Does the large minibatch match the baseline?", 2)[2]
    first, second = rows_of(paper["folders"])
    order = [
        f"imagenet_2048: error {second.error:.2f} ± {second.std:.2f} %",
        "top-1 error",
        f"{first.error:.2f} ± {first.std:.2f}",
        f"{second.error:.2f} ± {second.std:.2f}",
        f"{second.difference:+.2f}",
        "standard deviation (n − 1)",
        "Curves",
        "What happened, and when",
        "batch 256 = 32 micro-batch × 1 accumulation × 8 ranks",
    ]
    positions = []
    for part in order:
        positions.append(text.index(part, positions[-1] if positions else 0))
    assert positions == sorted(positions)
    assert "3 updates not applied, overflow: first at 1, last at 9 loss scale 32768 → 8192" in text
    assert "sample substituted" in text
    assert "shard train-0007.tar · key n0153/17" in text
    assert "the process ended without finishing" in text


def test_the_pictures_lie_beside_the_page_and_are_not_blank(paper: dict[str, Any]) -> None:
    from matplotlib.image import imread

    files = sorted(path.name for path in paper["out"].glob("*.png"))
    assert files == ["learning-rate.png", "throughput.png", "training-error.png", "validation-error.png"]
    for name in files:
        pixels = imread(paper["out"] / name)
        assert pixels.shape[1] == 1920
        assert 0.01 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.5


def test_hostile_names_and_texts_stay_text(tmp_path: Path) -> None:
    name = "_<img src=x onerror=alert(1)>$\\frac{&amp;"
    run = Run(tmp_path / name, config='"><script>alert(2)</script>', plan="</pre><script>alert(3)</script>").begin()
    run.log("warning", message="<b>bold</b> [red]rich[/red]", shard="<i>")
    run.train_to(6).finish()
    other = whole(tmp_path / "other", kn=2048)
    page = Page(report.write_report([run.save(), other.save()], tmp_path / "out"))
    assert not {"script", "b", "i"} & set(page.tags)
    assert page.tags.count("img") == len(page.fetched) == 4
    text = "".join(page.text)
    assert all(part in text for part in (name, "</pre><script>alert(3)</script>", "<b>bold</b> [red]rich[/red]", "<i>"))


@pytest.mark.usefixtures("no_pictures")
def test_one_run_asks_how_it_went(paper: dict[str, Any], tmp_path: Path) -> None:
    text = text_of(report.write_report(paper["folders"][:1], tmp_path))
    expected = paper["small"][0].expected()
    assert "How did it go?" in text
    assert f"{100 - expected:.2f} % top-1 accuracy (error {expected:.2f} %)" in text
    assert "median of the last 5 epoch evaluations, 5,000 images each" in text
    assert "difference" not in text
    assert "7:12" in text  # 431.5 s, as the run measured itself


def test_a_run_without_train_accuracy_shows_its_loss_and_a_diverged_one_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path / "a").begin().train_to(3)
    for event in run.events:
        if event["event"] in ("train", "epoch"):
            event.pop("top1", None)
            event["loss"] = None if event["epoch"] > 2 else event["loss"]
    page = report.write_report([run.save()], tmp_path)
    assert (tmp_path / "training-loss.png").stat().st_size > 5_000
    assert "the training loss is not a finite number from here on" in text_of(page)


def test_a_run_of_three_steps_still_makes_a_page(tmp_path: Path) -> None:
    run = Run(tmp_path / "a").begin()
    run.log("train", 1.0, step=3, samples=768, epoch=0.015, loss=6.9, lr=0.1, images_per_second=9.5, data_wait=0.1)
    text = text_of(report.write_report([run.save()], tmp_path))
    assert "There is no evaluation in the record of a" in text
    bare = Run(tmp_path / "bare").begin()
    bare.events = [{"event": "start", "time": "2026-11-01T00:00:00.000Z"}]
    assert "bare was never evaluated." in text_of(report.write_report([bare.save()], tmp_path / "bare"))
