"""What a training loop is told beside its model: where and how it computes, when it ends."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from runs import Stopping, StoppingMixin, assert_same
from tiny import STATEFUL, read_metrics, tiny_config

from detmix.training import DetectorTrainer, Interrupted, TrainConfig, load_checkpoint, processes
from detmix.training.processes import make_accelerator
from detmix.training.progress import Evaluation

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# RetinaNet's loss is the mean over images of what each has by itself; group norm and mixing within
# the data set make an image the same in any batch. 14 images: a batch of 4 leaves two out.
ALONE = (
    "optim.name=sgd", "schedule.warmup_steps=3", "optim.lr=0.005", "optim.clip_norm=0.5",
    "mixing.place=dataset", "mixing.p=0.7", "backbone.norm=group", "data.train_limit=14",
    "detector.name=retinanet", "detector.roi_sampling_ratio=null", "detector.head_dim=null",
    "detector.options={score_thresh: 0.01, detections_per_img: 50}", "data.test_limit=4",
)  # fmt: skip


class TestAccumulation:
    @pytest.fixture
    def trainer_for(self, shapes_root, tmp_path):
        def trainer_for(name, batch_size, accumulate, *options):
            sizes = f"data.batch_size={batch_size}", f"optim.accumulate={accumulate}"
            return Stopping(tiny_config(shapes_root, tmp_path / name, *ALONE, *sizes, *options))

        return trainer_for

    def test_is_a_larger_batch(self, trainer_for, tmp_path):
        """Steps, rates, log and weights, also where it was stopped and is cut up otherwise then."""
        trainer_for("whole", 4, 1).fit()
        stopped = trainer_for("parts", 1, 4)
        stopped.in_step = 5
        with pytest.raises(Interrupted):
            stopped.fit()
        trainer_for("parts", 2, 2, "resume=auto").fit()
        states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts")]
        whole, parts = states
        for key in ("steps_per_epoch", "batch_size", "images"):
            assert whole[key] == parts[key]
        assert (whole["position"]["step"], whole["batch_size"]) == (6, 4)
        torch.testing.assert_close(parts["model"], whole["model"], rtol=1e-4, atol=1e-6)
        for line, other in zip(*map(read_metrics, sorted(tmp_path.iterdir())), strict=True):
            for key in line.keys() - {"event", "images_per_s", "seconds"}:
                assert line[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
        with pytest.raises(ValueError, match="batch_size = 4, this one has 2"):
            trainer_for("whole", 2, 1, "resume=auto")
        with pytest.raises(ValueError, match=r"optim\.accumulate=8.* 7 batches"):
            trainer_for("other", 2, 8)

    def test_a_loss_that_is_not_finite_undoes_the_whole_step(self, trainer_for, tmp_path):
        """Also the statistics of the batches before it, and what the log has of them."""
        trainers = [
            trainer_for(name, 2, 2, "log_every=5", "backbone.norm=batch") for name in ("nan", "end")
        ]
        trainers[0].nan_in, trainers[1].in_step = 6, 2  # the second batch of the third step
        for trainer, text in zip(trainers, ("step 2 .*classification nan", "step 2;"), strict=True):
            with pytest.raises(Exception, match=text):
                trainer.fit()
        states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("nan", "end")]
        for key in ("model", "meter", "position"):
            assert_same(*(state[key] for state in states))


class Given(DetectorTrainer):
    """Has scores that are given, one for each epoch."""

    scores = (0.3, 0.3, None, 0.4, 0.2)  # the second is no better one

    def evaluate(self):
        self.stop_if_asked()
        return Evaluation(None, self.scores[self.position.epoch - 1], {}, "")


class Scored(StoppingMixin, Given):
    pass


# How many evaluations it waits, where it is stopped before that, and after which epoch it ends.
ENDS = [(1, {}, 2), (2, {"in_step": 3}, 3), (2, {"in_evaluation": 3}, 3), (3, {}, 5)]


@pytest.mark.parametrize(("limit", "stop", "end"), ENDS)
def test_ends_after_evaluations_without_a_better_score(
    shapes_root, tmp_path, capsys, limit, stop, end
):
    def train(*options, **stop):
        options = (f"early_stopping={limit}", "data.train_limit=4", "epochs=5", *options)
        trainer = Scored(tiny_config(shapes_root, tmp_path / "run", *options))
        vars(trainer).update(stop)
        trainer.fit()
        lines = read_metrics(tmp_path / "run")
        return [line["epoch"] for line in lines if line["event"] == "eval"]

    if stop:
        with pytest.raises(Interrupted):
            train(**stop)
    assert train("resume=auto") == [*range(1, end + 1)]
    position, best = (
        load_checkpoint(tmp_path / "run" / name)["position"] for name in ("last.pt", "best.pt")
    )
    assert (position["epoch"], best["best"]) == (end, 0.4 if end > 3 else 0.3)
    told = re.findall(r"stopped early.* (\d) evaluations", capsys.readouterr().out)
    assert told == ([str(limit)] if end < 5 else [])
    if limit == 1:  # it is over, unless told to go on
        assert train("resume=auto") == [1, 2]
        assert train("resume=auto", "early_stopping=null") == [1, 2, 3, 4, 5]


FEW = ("data.train_limit=8", "data.test_limit=4")
WANDB = """
calls = []
class config:
    update = lambda values, **_: calls.append(("config", values))
class Run:
    log = lambda self, values, step: calls.append((step, values))
    finish = lambda self: calls.append(("finish",))
def init(project):
    calls.append(("init", project))
    return Run()
"""


class TestTracker:
    def test_is_given_what_is_logged(self, shapes_root, tmp_path, monkeypatch):
        (tmp_path / "wandb.py").write_text(WANDB)
        monkeypatch.syspath_prepend(tmp_path)
        config = tiny_config(shapes_root, tmp_path / "run", *STATEFUL, "tracker=wandb")
        DetectorTrainer(config).fit()
        import wandb

        (begin, (_, options), *logged, end) = wandb.calls
        assert (begin, end) == (("init", "run"), ("finish",))
        assert (options["tracker"], options["optim.lr"]) == ("wandb", 0.002)
        lines = read_metrics(tmp_path / "run")
        assert len(lines) == len(logged)
        for line, (step, values) in zip(lines, logged, strict=True):
            event, at, _ = (line.pop(key) for key in ("event", "step", "epoch"))
            assert (at, values) == (step, {f"{event}/{key}": value for key, value in line.items()})
        assert not (tmp_path / "run" / "tensorboard").exists()

    def test_none_or_one_that_is_not_installed(self, shapes_root, tmp_path):
        config = tiny_config(shapes_root, tmp_path / "run", "tracker=none", "epochs=1", *FEW)
        DetectorTrainer(config).fit()
        assert read_metrics(tmp_path / "run")
        assert not (tmp_path / "run" / "tensorboard").exists()
        with pytest.raises(ImportError, match=r"tracker=comet_ml .*pip install comet_ml"):
            DetectorTrainer(tiny_config(shapes_root, tmp_path / "new", "tracker=comet_ml"))
        assert not (tmp_path / "new").exists()


class TestPrecision:
    def test_of_a_cpu_is_the_faster_one_and_stays(self, shapes_root, tmp_path, monkeypatch, caplog):
        def trainer(name, full, half):
            monkeypatch.setattr(processes, "time_precisions", lambda: (full, half))
            options = ("precision=auto", "epochs=1", "data.train_limit=4", "resume=auto")
            return DetectorTrainer(tiny_config(shapes_root, tmp_path / name, *options))

        caplog.set_level("INFO", "detmix")
        for name, full, half, expected in [("no", 1, 0.9, "no"), ("run", 0.23, 0.115, "bf16")]:
            AcceleratorState._reset_state(True)
            begun = trainer(name, full, half)
            noted = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
            assert begun.accelerator.mixed_precision == noted["precision"] == expected
        assert "precision bf16: a convolution takes 115.0 ms in bfloat16, 230.0" in caplog.text
        begun.fit()
        del begun
        again = trainer("run", 0.1, 10)
        saved = load_checkpoint(tmp_path / "run" / "last.pt")["config"]
        assert again.config.precision == again.accelerator.mixed_precision == "bf16"
        assert saved["precision"] == "bf16"

    def test_a_trial_is_short_and_draws_nothing(self):
        before = torch.get_rng_state()
        seconds = processes.time_precisions()
        assert torch.equal(torch.get_rng_state(), before)
        assert all(0 < each < 1 for each in seconds)
        assert processes.time_precisions() == seconds  # so that two trainings agree

    @needs_gpu
    def test_of_a_gpu_is_bf16_where_it_has_it(self, tmp_path):
        config = TrainConfig(run_dir=tmp_path)
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        assert make_accelerator(config).mixed_precision == ("bf16" if has_it else "no")


class TestDevice:
    @pytest.mark.parametrize("device", ["cuda:99", "cuda"])
    def test_that_is_not_there_is_named(self, shapes_root, tmp_path, monkeypatch, device):
        if device == "cuda" and torch.cuda.is_available():
            pytest.skip("there is one")
        with pytest.raises(ValueError, match=f"device={device} "):
            DetectorTrainer(tiny_config(shapes_root, tmp_path / "run", f"device={device}"))

    @needs_gpu
    def test_is_the_last_one(self, shapes_root, tmp_path):
        number = torch.cuda.device_count() - 1
        options = (f"device=cuda:{number}", "epochs=1", "data.train_limit=8", "precision=auto")
        trainer = DetectorTrainer(tiny_config(shapes_root, tmp_path / "run", *options))
        trainer.fit()
        assert {p.device.index for p in trainer.plain_model.parameters()} == {number}
