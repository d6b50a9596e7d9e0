"""Runs read back and compared: tables, charts, the command, and what is said of broken folders."""

from __future__ import annotations

import json
import runpy
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config, tiny_pretrain_config

from detmix.evaluation import plot_runs, run_plots
from detmix.evaluation.metrics import read_metrics
from detmix.training.console import run_tool
from detmix.training.run_comparison import compare_runs
from detmix.training.run_folder import RunFolder
from detmix.training.runs import read_run, read_runs

TOOL = Path(__file__).parents[1] / "tools" / "compare.py"


@cache
def plain_config(config, *overrides):
    return config("data", "run", *overrides).as_dict()


def make_run(folder, *overrides, losses=(2.0, 1.0), scores=(), config=tiny_config, steps=10):
    """Write a run with the trainer's own writer: a loss each epoch, then its evaluation."""
    run = RunFolder(folder, {**plain_config(config, *overrides), "run_dir": str(folder)})
    for index, loss in enumerate(losses):
        epoch = index + 1
        run.log("train", steps * epoch, epoch, {"loss": loss, "lr": 0.1 / epoch})
        if index < len(scores):
            run.log("eval", steps * epoch, epoch, {**scores[index], "seconds": 1.5})
    run.close()
    return folder


def voc(score):
    eleven = None if score is None else score / 2
    return {"mean_ap": score, "mean_ap_11point": eleven}


def coco(score):
    return {"mean_ap": score, "ap50": score + 0.1, "ap_large": None, "mask_ap": score / 2}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look at their contents."""
    figures = []
    save = run_plots.save_figure
    monkeypatch.setattr(
        run_plots, "save_figure", lambda fig, path: figures.append(fig) or save(fig, path)
    )
    return figures


class TestTable:
    def test_how_runs_came_out(self, tmp_path):
        losses = [5.0] * 18 + [1.0, 2.0]
        a = make_run(tmp_path / "a", "epochs=20", losses=losses, scores=[*map(voc, (0.2, 0.6))])
        b = make_run(tmp_path / "b", "epochs=4", losses=(3.0, 2.0), scores=[voc(0.4), voc(None)])
        c = make_run(tmp_path / "c", losses=(3.0,))
        runs = compare_runs(read_runs([a, b, c])).as_dict()["runs"]
        assert runs["a"] == {
            "steps": 200,
            "epochs": 20.0,
            "planned_epochs": 20,
            "loss": 1.5,  # a tenth of twenty
            "best": {"mean_ap": 0.6, "mean_ap_11point": 0.3},
            "best_epoch": 2.0,
            "last": {"mean_ap": 0.6, "mean_ap_11point": 0.3},
            "score": "mAP",
        }
        assert runs["b"]["best"] == {"mean_ap": 0.4, "mean_ap_11point": 0.2}
        assert runs["b"]["best_epoch"] == 1
        assert runs["b"]["last"] == {"mean_ap": None, "mean_ap_11point": None}
        assert (runs["b"]["epochs"], runs["b"]["planned_epochs"]) == (2, 4)
        assert (runs["c"]["best"], runs["c"]["best_epoch"], runs["c"]["score"]) == ({}, None, None)

    def test_of_equal_scores_the_first_is_best_as_in_best_pt(self, tmp_path):
        run = make_run(tmp_path / "a", losses=[1] * 3, scores=[voc(0.1), voc(0.3), voc(0.3)])
        assert compare_runs([read_run(run)]).runs["a"].best_epoch == 2

    def test_only_options_that_differ_are_named(self, tmp_path):
        a = make_run(tmp_path / "a", "optim.lr=0.01", "mixing.alpha=2", "loss=null")
        b = make_run(tmp_path / "b", "optim.lr=0.02", "mixing.alpha=2.0", "resume=auto")
        c = make_run(tmp_path / "c", "optim.lr=0.02", "mixing.alpha=2.0")
        options = compare_runs(read_runs([a, b, c])).options
        assert options == {
            "optim.lr": {"a": 0.01, "b": 0.02, "c": 0.02},
            "loss": {"a": None},
            "loss.background_weight": {"b": 1.0, "c": 1.0},
            "loss.normalizer": {"b": "samples", "c": "samples"},
        }

    def test_versions_that_differ_are_named(self, tmp_path):
        a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
        assert compare_runs(read_runs([a, b])).versions == {}
        found = json.loads((b / "versions.json").read_text())
        older = {**found, "torch": "1.0"}
        del older["accelerate"]
        (b / "versions.json").write_text(json.dumps(older))
        assert compare_runs(read_runs([a, b])).versions == {
            "torch": {"a": found["torch"], "b": "1.0"},
            "accelerate": {"a": found["accelerate"]},
        }

    def test_text(self, tmp_path):
        more = ("epochs=3", "data.classes=[bird,car]")
        a = make_run(tmp_path / "a", *more, scores=[voc(0.1), voc(0.3)], steps=1234)
        b = make_run(tmp_path / "b", "data.classes=[cat,dog]", scores=[coco(0.5), coco(0.4)])
        rows = [line.split("  ") for line in str(compare_runs(read_runs([a, b]))).splitlines()]
        cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
        for row in (
            ["run", "a", "b"],
            ["steps", "2,468", "20"],
            ["epochs", "2 of 3", "2"],
            ["final loss", "1.0000", "1.0000"],
            ["best mAP", "0.3000", "–"],
            ["best AP", "–", "0.5000"],
            ["mask AP", "–", "0.2500"],
            ["at epoch", "2", "1"],
            ["last AP", "–", "0.4000"],
            ["AP50", "–", "0.5000"],
            ["data.classes", "[bird, car]", "[cat, dog]"],
            ["no version differs"],
        ):
            assert row in cells

    def test_long_values_are_shortened_but_told_apart(self, tmp_path):
        one, two = "x" * 30 + "1" + "x" * 30, "x" * 30 + "2" + "x" * 30
        a = make_run(tmp_path / "a", f"data.root={one}", f"backbone.weights={'y' * 60}")
        b = make_run(tmp_path / "b", f"data.root={two}")
        text = str(compare_runs(read_runs([a, b])))
        for number in "12":
            assert f"…xxxxxx{number}xxxx…{'x' * 12}" in text
        assert "y" * 12 + "…" + "y" * 12 in text
        assert "y" * 13 not in text

    def test_values_that_shortening_would_make_equal_stay_whole(self, tmp_path):
        values = [f"{'x' * 30}{a}{'x' * 30}{b}{'x' * 30}" for a, b in ("12", "13", "23")]
        folders = [
            make_run(tmp_path / str(index), f"data.root={value}")
            for index, value in enumerate(values)
        ]
        text = str(compare_runs(read_runs(folders)))
        assert all(value in text for value in values)

    @pytest.mark.parametrize("number", [6, 14])
    def test_lines_of_many_runs_are_short(self, tmp_path, number):
        """Long values are cut, and where that is not enough runs come below one another."""
        folders = [
            make_run(
                tmp_path / f"run_{index}",
                f"seed={index}",
                f"data.root={'some/folders/' * 5}{index:02}{'/and/others' * 5}",
                f"backbone.weights={index:02}{'w' * 60}.pt",
            )
            for index in range(number)
        ]
        text = str(compare_runs(read_runs(folders)))
        assert max(map(len, text.splitlines())) <= 120
        _, *blocks = text.split("\n\n")
        assert (len(blocks) == 1) == (number == 6)
        rows = [[line.split() for line in block.splitlines()] for block in blocks]
        for row, first in enumerate(rows[0]):
            if len(first) > 1 and first[0] in ("run", "seed", "data.root", "backbone.weights"):
                cells = [cell for block in rows for cell in block[row][1:]]
                assert len(set(cells)) == number

    def test_many_runs_are_numbered(self, tmp_path):
        folders = [make_run(tmp_path / f"{'long' * 8}_{index}") for index in range(10)]
        lines = str(compare_runs(read_runs(folders))).splitlines()
        assert lines[:10] == [f"({i + 1}) {'long' * 8}_{i}" for i in range(10)]
        assert max(map(len, lines)) <= 120

    def test_one_run(self, tmp_path):
        text = str(compare_runs([read_run(make_run(tmp_path / "a"))]))
        assert "differ" not in text


class TestReading:
    def test_names_are_as_much_of_the_paths_as_it_takes(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        paths = ["x/one/run", "y/one/run", "y/two/run", "run", "other"]
        for path in paths:
            make_run(tmp_path / path)
        names = [run.name for run in read_runs([*paths[:4], tmp_path / "y" / ".." / "other"])]
        assert names == ["x/one/run", "y/one/run", "two/run", f"{tmp_path.name}/run", "other"]

    def test_names_of_a_run_on_its_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(make_run(tmp_path / "run"))
        assert read_run(".").name == "run"

    def test_a_run_given_twice(self, tmp_path):
        run = make_run(tmp_path / "a")
        with pytest.raises(ValueError, match=f"{run}/ is given twice"):
            read_runs([run, f"{run}/"])

    def test_one_name_for_two_runs(self, tmp_path):
        run = read_run(make_run(tmp_path / "a"))
        with pytest.raises(ValueError, match="2 runs have the names a only"):
            compare_runs([run, run])

    @pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "versions.json"])
    def test_a_file_is_missing(self, tmp_path, name):
        run = make_run(tmp_path / "a")
        (run / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{run} has no {name}"):
            read_run(run)

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere: no such run folder"):
            read_run(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"config\.yaml: no such run folder"):
            read_run(make_run(tmp_path / "a") / "config.yaml")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("metrics.jsonl", "", "nothing is recorded yet"),
            ("metrics.jsonl", '{"event": "other"}\n', "nothing is recorded yet"),
            ("metrics.jsonl", '\n{"event": "tr', "line 2: .* is not JSON"),
            ("metrics.jsonl", b"\xff\xfe\n", "line 1: .* is not JSON"),
            ("config.yaml", "a: [1\n", "is broken: .*line"),
            ("config.yaml", "just text", "holds str, expected a mapping"),
            ("config.yaml", "", "holds NoneType, expected a mapping"),
            ("versions.json", "{", "is broken: .*line 1"),
            ("versions.json", "[]", "holds list, expected a mapping"),
        ],
    )
    def test_a_file_is_broken(self, tmp_path, name, content, message):
        path = make_run(tmp_path / "a") / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(ValueError, match=f"(?s)^{path}.*{message}"):
            read_run(path.parent)


class TestChart:
    def test_panels_and_lines(self, tmp_path, drawn):
        runs = {
            name: read_metrics(make_run(tmp_path / name, **kwargs) / "metrics.jsonl")
            for name, kwargs in {
                "voc": {"losses": [3.0] * 7, "scores": [voc(0.25), voc(0.5), voc(None)]},
                "coco": {"scores": [coco(0.75), coco(0.5)]},
                "young": {"losses": [4.0, 2.0, 3.0]},
            }.items()
        }
        path = plot_runs(runs, tmp_path / "new" / "runs.png")
        assert Image.open(path).format == "PNG"
        panels = {axes.get_ylabel(): axes for axes in drawn[0].axes}
        assert list(panels) == ["training loss", "learning rate", "mAP", "AP", "mask AP"]
        lines = {name: [line.get_xydata() for line in panels[name].lines] for name in panels}
        np.testing.assert_allclose(lines["mAP"][0][:2], [[1, 0.25], [2, 0.5]])
        assert lines["AP"][0].tolist() == [[1, 0.75], [2, 0.5]]
        assert lines["mask AP"][0].tolist() == [[1, 0.375], [2, 0.25]]
        assert [len(line) for line in lines["training loss"]] == [7, 2, 3]
        assert len(lines["mAP"]) == len(lines["AP"]) == 1
        texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
        assert texts == [
            "voc  best mAP 0.500 (epoch 2)",
            "coco  best AP 0.750 (epoch 1)",
            "young  not evaluated",
        ]

    def test_the_loss_is_smoothed(self, tmp_path, drawn):
        losses = np.random.default_rng(0).normal(3, 1, 100)
        run = read_metrics(make_run(tmp_path / "a", losses=losses.tolist()) / "metrics.jsonl")
        plot_runs({"a": run}, tmp_path / "runs.png")
        expected = [losses[max(0, i - 5) : i + 6].mean() for i in range(100)]
        np.testing.assert_allclose(drawn[0].axes[0].lines[0].get_ydata(), expected)

    @pytest.mark.parametrize("narrow", [False, True])
    def test_ten_runs_are_told_apart(self, tmp_path, drawn, narrow):
        runs = {}
        for index in range(10):
            name = f"{'a_rather_long_name_' * (1 + 2 * (index == 9))}{index}"
            folder = make_run(tmp_path / name, losses=[2] * (index + 1), scores=[voc(0.1)])
            runs[name] = read_metrics(folder / "metrics.jsonl")
        plot_runs(runs, tmp_path / "runs.png", narrow=narrow)
        figure = drawn[0]
        for axes in figure.axes:
            looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
            assert len(looks) == 10
        assert len({line.get_marker() for line in figure.axes[2].lines}) == 10
        texts = [text.get_text().replace("\n", "") for text in figure.legends[0].get_texts()]
        assert all(text.startswith(name) for text, name in zip(texts, runs, strict=True))
        legend = figure.legends[0].get_window_extent()
        assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1
        assert legend.y0 >= 0
        boxes = [*(axes.get_tightbbox() for axes in figure.axes), legend]
        assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))

    @pytest.mark.parametrize(("ends", "scale"), [((1.0, 9.0), "linear"), ((1.0, 11.0), "log")])
    def test_losses_far_apart(self, tmp_path, drawn, ends, scale):
        runs = {
            str(end): read_metrics(make_run(tmp_path / str(end), losses=[end]) / "metrics.jsonl")
            for end in ends
        }
        plot_runs(runs, tmp_path / "runs.png")
        assert drawn[0].axes[0].get_yscale() == scale

    def test_nothing_to_draw(self, tmp_path):
        (tmp_path / "metrics.jsonl").touch()
        empty = {"a": read_metrics(tmp_path / "metrics.jsonl")}
        for runs in ({}, empty):
            with pytest.raises(ValueError, match=f"nothing to draw: {len(runs)} runs"):
                plot_runs(runs, tmp_path / "runs.png")

    def test_undefined_scores_only(self, tmp_path, drawn):
        run = make_run(tmp_path / "a", scores=[voc(None), voc(None)])
        plot_runs({"a": read_metrics(run / "metrics.jsonl")}, tmp_path / "runs.png")
        assert drawn[0].legends[0].get_texts()[0].get_text() == "a  mAP n/a"

    def test_one_record_is_marked_and_zero_seen_whole(self, tmp_path, drawn):
        runs = {
            "one": make_run(tmp_path / "one", losses=[2.0], scores=[voc(0.0)]),
            "two": make_run(tmp_path / "two", scores=[voc(0.0), voc(0.1)]),
        }
        runs = {name: read_metrics(run / "metrics.jsonl") for name, run in runs.items()}
        plot_runs(runs, tmp_path / "runs.png")
        loss, rate, score = drawn[0].axes
        for axes in (loss, rate):
            assert [line.get_marker() == "None" for line in axes.lines] == [False, True]
        pixels = np.asarray(drawn[0].canvas.buffer_rgba())
        for line in score.lines:
            column, height = score.transData.transform(line.get_xydata()[0])
            below = pixels[len(pixels) - round(height) + 3, round(column), :3]
            assert np.ptp(below.astype(int)) > 50  # colored, not the page or the axis


@pytest.fixture
def compare(capsys):
    def run(*args):
        main = runpy.run_path(str(TOOL))["main"]
        code = run_tool(main, [str(arg) for arg in args])
        return code, *capsys.readouterr()

    return run


class TestCommand:
    def test_table_chart_and_json(self, tmp_path, compare):
        folders = [
            make_run(tmp_path / part / "run", f"seed={seed}", scores=[voc(0.1 * seed)])
            for seed, part in enumerate(("first", "second"), start=1)
        ]
        chart, numbers = tmp_path / "out" / "chart.png", tmp_path / "out" / "numbers.json"
        code, out, err = compare(*folders, "--out", chart, "--json", numbers)
        assert (code, err) == (0, "")
        assert out.splitlines()[0].split() == ["run", "first/run", "second/run"]
        assert f"wrote {chart}" in out
        assert f"wrote {numbers}" in out
        assert min(Image.open(chart).size) > 300
        written = json.loads(numbers.read_text())
        assert written == compare_runs(read_runs(folders)).as_dict()
        assert written["options"] == {"seed": {"first/run": 1, "second/run": 2}}

    def test_classifiers(self, tmp_path, compare):
        scores = [{"top1": 0.25, "top5": 0.5}, {"top1": 0.2, "top5": 0.75}]
        folder = make_run(tmp_path / "a", config=tiny_pretrain_config, scores=scores)
        code, out, _ = compare(folder, "--out", tmp_path / "chart.png")
        assert code == 0
        rows = [line.split() for line in out.splitlines()]
        assert ["best", "top-1", "accuracy", "0.2500"] in rows
        assert ["last", "top-1", "accuracy", "0.2000"] in rows

    def test_a_classifier_and_a_detector(self, tmp_path, compare, drawn):
        detector = make_run(tmp_path / "detector", scores=[voc(0.1)])
        classifier = make_run(
            tmp_path / "classifier", config=tiny_pretrain_config, scores=[{"top1": 0.25}]
        )
        chart = tmp_path / "chart.png"
        code, out, err = compare(detector, classifier, "--out", chart)
        assert (code, out) == (2, "")
        assert err.startswith("error: classifier is a run of a classifier, detector one of a")
        assert not chart.exists()
        runs = {path.name: read_metrics(path / "metrics.jsonl") for path in (detector, classifier)}
        with pytest.raises(ValueError, match="cannot be compared"):
            plot_runs(runs, chart)

    def test_a_folder_that_is_no_run(self, tmp_path, compare):
        code, out, err = compare(tmp_path)
        assert (code, out) == (2, "")
        assert err == f"error: {tmp_path} has no metrics.jsonl: expected the folder of a run\n"
