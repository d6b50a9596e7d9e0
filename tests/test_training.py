"""A training from its configuration to the files of its run."""

from __future__ import annotations

import json
import resource
import threading
from multiprocessing import get_context

import pytest
import torch
from runs import as_process, scalars
from tiny import STATEFUL, read_metrics, tiny_config

from detmix.files import temporary_path
from detmix.training import DetectorTrainer, TrainConfig, parse_args
from detmix.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class TestFiles:
    def test_metrics(self, whole_run):
        metrics = read_metrics(whole_run)
        assert [(m["event"], m["step"], m["epoch"]) for m in metrics] == [
            ("train", 2, 0.6667), ("eval", 3, 1), ("train", 4, 1.3333), ("train", 6, 2),
            ("eval", 6, 2),
        ]  # fmt: skip
        for train in (m for m in metrics if m["event"] == "train"):
            parts = [value for name, value in train.items() if name.startswith("loss_")]
            assert len(parts) == 4
            assert train["loss"] == pytest.approx(sum(parts), rel=1e-5)
            assert train["images_per_s"] > 0
        # Step 1 is half-way through the warm-up; the second epoch has a tenth of the rate.
        rates = [m["lr"] for m in metrics if m["event"] == "train"]
        assert rates == pytest.approx([0.002 * (1 + 0.001) / 2, 0.0002, 0.0002])

    def test_tensorboard_has_the_same_numbers(self, whole_run):
        lines, points = read_metrics(whole_run), scalars(whole_run)
        for event in ("train", "eval"):
            of_event = [line for line in lines if line["event"] == event]
            for name in of_event[0].keys() - {"event", "step", "epoch"}:
                steps, values = zip(*points[f"{event}/{name}"], strict=True)
                assert list(steps) == [line["step"] for line in of_event]
                assert values == pytest.approx([line[name] for line in of_event], rel=1e-5)

    def test_what_it_is_and_ran_with(self, shapes_root, whole_run):
        assert {path.name for path in whole_run.iterdir()} == {
            "config.yaml", "versions.json", "metrics.jsonl", "tensorboard", "last.pt",
            "previous.pt", "best.pt", ".lock",
        }  # fmt: skip
        config = tiny_config(shapes_root, whole_run, *STATEFUL)
        noted = parse_args(TrainConfig, ["--config", str(whole_run / "config.yaml")])
        assert (noted.optim, noted.schedule, noted.mixing) == (
            config.optim, config.schedule, config.mixing,
        )  # fmt: skip
        assert (noted.data, noted.run_dir) == (config.data, config.run_dir)
        versions = json.loads((whole_run / "versions.json").read_text())
        assert versions["torch"] == torch.__version__
        assert "detmix" in versions

    @pytest.mark.parametrize(
        ("override", "error"),
        [
            ("data.root=missing", FileNotFoundError),
            ("data.classes=[circle]", ValueError),
            ("data.batch_size=25", ValueError),
            ("backbone.trainable_layers=9", ValueError),
            ("precision=fp16", ValueError),  # needs a GPU
        ],
    )
    def test_wrong_settings_leave_nothing_behind(self, shapes_root, tmp_path, override, error):
        with pytest.raises(error):
            DetectorTrainer(tiny_config(shapes_root, tmp_path / "run", override))
        assert not (tmp_path / "run").exists()


def hold(folder, taken, done):
    with RunFolder(folder, {}):
        taken.set()
        done.wait(60)


def test_one_process_at_a_time(tmp_path):
    folder, context = tmp_path / "run", get_context("forkserver")
    taken, done = context.Event(), context.Event()
    other = as_process(hold, folder, taken, done)
    assert taken.wait(60)
    temporary = temporary_path(folder / "last.pt")
    temporary.write_text("the other's")
    with pytest.raises(FileExistsError, match="run: another process is training there"):
        RunFolder(folder, {}, resume=True)
    assert temporary.exists()
    other.kill()
    other.join()
    RunFolder(folder, {}, resume=True).close()
    assert not temporary.exists()


@pytest.mark.parametrize(
    ("device", "named"), [("/dev/full", "metrics.jsonl"), ("/dev/null", "tensorboard")]
)
def test_a_full_disk(tmp_path, monkeypatch, device, named):
    """TensorBoard's own thread meets it, which must neither be lost nor have the run hang."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    folder = RunFolder(tmp_path / "run", {})
    folder.metrics.symlink_to(device)  # /dev/full takes nothing, as a full disk

    def log():
        with folder:
            for step in range(1, 1000):
                folder.log("train", step, 0.1, {"loss": 1.0})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=named):
            log()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_mixing_on_the_device_is_that_of_batches(shapes_root, tmp_path):
    """And the last epochs are plain, in workers that go on running too."""
    steps, settings = {}, ("mixing.p=0.8", "mixing.fill=114", "mixing.off_epochs=1")
    for place, workers in (("batch", 1), ("device", 0)):
        trainer = DetectorTrainer(
            tiny_config(
                shapes_root, tmp_path / place, f"mixing.place={place}", f"data.workers={workers}",
                "data.train_limit=12", "eval_every=2", *settings,
            )
        )  # fmt: skip
        seen = steps[place] = []
        trainer.plain_model.register_forward_pre_hook(
            lambda model, inputs, seen=seen: seen.append(inputs) if model.training else None
        )
        trainer.fit()
    assert len(steps["batch"]) == 6
    for (images, targets), (others, theirs) in zip(steps["batch"], steps["device"], strict=True):
        torch.testing.assert_close(targets, theirs, rtol=0, atol=0)
        for image, other in zip(images, others, strict=True):
            assert image.dtype == other.dtype == torch.float32
            torch.testing.assert_close(image, other, rtol=0, atol=0.5 / 255 + 1e-6)
    weights = [torch.cat([t["box_weights"] for t in targets]) for _, targets in steps["batch"]]
    assert 0 < torch.cat(weights[:3]).min() < 0.5
    assert (torch.cat(weights[3:]) == 1).all()
