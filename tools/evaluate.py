#!/usr/bin/env python
"""Print the VOC mAP of a checkpoint.

python tools/evaluate.py runs/voc2007_cpu/best.pt --data.root data/VOCdevkit
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from detmix.data.loaders import eval_loader
from detmix.evaluation import VOCEvaluator
from detmix.training import evaluate, load_detector
from detmix.training.build import build_test_set, open_voc
from detmix.training.console import run_tool
from detmix.training.loop import make_accelerator


def main(args: Sequence[str]) -> None:
    """Evaluate on the test split of the checkpoint's configuration, which arguments change."""
    parser = argparse.ArgumentParser(
        description="Print the VOC mAP of a checkpoint of tools/train.py.",
        epilog="Any option of tools/train.py changes what the checkpoint's configuration says.",
    )
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run folder; goes first")
    parsed, overrides = parser.parse_known_args(args)
    model, config = load_detector(parsed.checkpoint, overrides)
    accelerator = make_accelerator(config)
    loader = eval_loader(
        build_test_set(config, open_voc(config, train=False)),
        config.data.eval_batch_size,
        workers=config.data.workers,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    evaluator = VOCEvaluator(config.data.classes)
    evaluate(model.to(accelerator.device), loader, evaluator, accelerator)
    if accelerator.is_main_process:
        result = evaluator.compute()
        eleven = evaluator.compute(interpolation="11point")
        print(result)
        print(f"\n{result.num_images} images; IoU > {result.iou_threshold}")
        print(f"mAP, all-point (VOC 2010 and later): {result.mean_ap:.4f}")
        print(f"mAP, 11-point (VOC 2007):            {eleven.mean_ap:.4f}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
