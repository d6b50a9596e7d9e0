"""What options of a training do, and what a loss that is not finite does to it."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import read_metrics, tiny_config

from detmix.mixing import DetectionMixUp
from detmix.training import (
    DetectorTrainer,
    NonFiniteLossError,
    load_checkpoint,
    load_detector,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class TestOptions:
    def fit(self, shapes_root, run_dir, *overrides):
        trainer = DetectorTrainer(tiny_config(shapes_root, run_dir, *overrides))
        return trainer, trainer.fit()

    def test_plain_losses_ignore_the_weights(self, shapes_root, tmp_path, monkeypatch):
        """Without `loss` a run is the one that torchvision's own losses give."""
        short = ("epochs=1", "data.train_limit=8", "mixing.p=1", "log_every=1")
        plain, _ = self.fit(shapes_root, tmp_path / "plain", "loss=null", *short)
        assert type(plain.plain_model.roi_heads).__module__.startswith("torchvision")
        self.fit(shapes_root, tmp_path / "weighted", *short)
        mix = DetectionMixUp.transform

        def mix_with_ones(self, samples, params):
            mixed = mix(self, samples, params)
            return [(i, {**t, "box_weights": torch.ones_like(t["box_weights"])}) for i, t in mixed]

        monkeypatch.setattr(DetectionMixUp, "transform", mix_with_ones)
        self.fit(shapes_root, tmp_path / "ones", *short)
        losses = {
            name: [m["loss"] for m in read_metrics(tmp_path / name) if m["event"] == "train"]
            for name in ("plain", "weighted", "ones")
        }
        assert losses["plain"] == losses["ones"]
        assert losses["plain"] != losses["weighted"]

    def test_ema_is_evaluated_and_saved(self, shapes_root, tmp_path):
        decay = 0.75
        averages = []

        def follow(*_):
            now = {k: v.double() for k, v in trainer.plain_model.state_dict().items()}
            last = averages[-1] if averages else now  # the first step is taken over
            averages.append({k: decay * last[k] + (1 - decay) * now[k] for k in now})

        config = tiny_config(
            shapes_root, tmp_path / "run", f"optim.ema_decay={decay}", "optim.lr=0.01"
        )
        trainer = DetectorTrainer(config)
        trainer.optimizer.optimizer.register_step_post_hook(follow)
        trainer.fit()
        for name in ("last.pt", "best.pt"):
            state = load_checkpoint(tmp_path / "run" / name)
            average = state["ema" if name == "last.pt" else "model"]
            model, _ = load_detector(tmp_path / "run" / name)
            assert all(torch.equal(average[k], v) for k, v in model.state_dict().items())
        last = load_checkpoint(tmp_path / "run" / "last.pt")
        assert last["ema_updates"] == 12
        for key, value in last["ema"].items():
            if value.is_floating_point():
                torch.testing.assert_close(value.double(), averages[-1][key], rtol=1e-4, atol=1e-5)
        assert not torch.equal(last["ema"]["rpn.head.conv.0.0.weight"],
                               last["model"]["rpn.head.conv.0.0.weight"])  # fmt: skip
        assert trainer.eval_model is trainer.ema.module

    def test_bf16(self, shapes_root, tmp_path):
        trainer, result = self.fit(
            shapes_root, tmp_path / "run", "precision=bf16", "channels_last=true"
        )
        assert result.num_images == 8
        assert {v.dtype for v in trainer.plain_model.parameters()} == {torch.float32}
        state = load_checkpoint(tmp_path / "run" / "last.pt")
        assert all(torch.isfinite(v).all() for v in state["model"].values())
        conv = trainer.plain_model.backbone.body.conv1.weight
        assert conv.is_contiguous(memory_format=torch.channels_last)

    def test_gradient_is_clipped(self, shapes_root, tmp_path):
        norms = []

        def watch(optimizer, *_):
            grads = [p.grad.norm() for p in optimizer.param_groups[0]["params"]]
            norms.append(float(torch.stack(grads).norm()))

        for clip in ("null", "0.125"):
            name = f"run{clip}"
            override = f"optim.clip_norm={clip}"
            trainer = DetectorTrainer(
                tiny_config(shapes_root, tmp_path / name, "epochs=1", override)
            )
            trainer.optimizer.optimizer.register_step_pre_hook(watch)
            trainer.fit()
        assert min(norms[:6]) > 0.2
        assert norms[6:] == pytest.approx([0.125] * 6, rel=1e-3)


class TestNonFiniteLoss:
    @pytest.mark.parametrize(("place", "bad"), [("batch", math.nan), ("dataset", math.inf)])
    def test_stops_with_what_was_before(self, shapes_root, tmp_path, bad, place):
        class Breaking(DetectorTrainer):
            """The fourth step has a loss that is not finite."""

            def compute_losses(self, batch):
                if self.position.step == 3:
                    self.names = self.describe(batch)
                    self.seen = [t["image_id"] for t in batch[1]]
                    before = self.plain_model.state_dict()
                    self.before = {k: v.clone() for k, v in before.items()}
                losses = super().compute_losses(batch)
                if self.position.step == 3:
                    losses["loss_objectness"] = losses["loss_objectness"] * bad
                    self.after = self.plain_model.state_dict()
                    self.after = {k: v.clone() for k, v in self.after.items()}
                return losses

        config = tiny_config(
            shapes_root, tmp_path / "run", f"mixing.place={place}", "mixing.p=1",
            "optim.ema_decay=0.5",
        )  # fmt: skip
        trainer = Breaking(config)
        with pytest.raises(NonFiniteLossError) as error:
            trainer.fit()
        message = str(error.value)
        assert "at step 3 (epoch 0)" in message
        assert f"loss_objectness {bad:g}" in message
        assert "loss_classifier " in message
        assert str(config.run_dir / "last.pt") in message
        for index in trainer.seen:
            assert f"VOC2007/{index + 1:06d}" in message
        assert (" mixed with " in message) == (place == "dataset")

        state = load_checkpoint(config.run_dir / "last.pt")
        changed = [
            k for k in trainer.before if not torch.equal(trainer.before[k], trainer.after[k])
        ]
        assert any("running_mean" in key for key in changed), "the step did change statistics"
        for key, value in trainer.before.items():
            assert torch.equal(state["model"][key], value), key
        assert state["position"]["step"] == state["position"]["batch"] == 3
        assert state["ema_updates"] == 3

    def test_weights_that_are_lost_do_not_replace_a_checkpoint(self, shapes_root, tmp_path):
        class Overflowing(DetectorTrainer):
            """The gradient of the eighth step is not finite, its loss is."""

            def compute_losses(self, batch):
                losses = super().compute_losses(batch)
                if self.position.step == 7:
                    weight = self.plain_model.roi_heads.box_predictor.cls_score.weight
                    root = (weight.flatten()[:1] * 0).sqrt()  # 0, with an infinite slope
                    losses["loss_classifier"] = losses["loss_classifier"] + root[0]
                return losses

        config = tiny_config(shapes_root, tmp_path / "run", "schedule.warmup_steps=0")
        with pytest.raises(NonFiniteLossError, match=r"at step 8 .*checkpoint before is left"):
            Overflowing(config).fit()
        state = load_checkpoint(config.run_dir / "last.pt")
        assert state["position"]["step"] == 6
        assert all(torch.isfinite(value).all() for value in state["model"].values())
