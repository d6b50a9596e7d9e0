"""Pretrain a classifier with CutMix, for a detector to start from.

detmix pretrain --config pretrain/tiny_imagenet_resnet18 --mix cutmix
"""

from __future__ import annotations

from collections.abc import Sequence

from detmix.training import ClassifierTrainer, PretrainConfig, parse_args


def main(args: Sequence[str]) -> None:
    """Train as the configuration says and print the last validation."""
    config = parse_args(PretrainConfig, args, "Pretrain a classifier.", "pretrain/quickstart")
    trainer = ClassifierTrainer(config)
    result = trainer.fit()
    if trainer.accelerator.is_main_process:
        print(result if result is not None else "nothing left to do")
        print(f"run folder: {config.run_dir}")
        settings = {"name": config.model.name, "weights": config.run_dir / "best.pt"}
        settings |= {"stem": config.model.stem} if config.model.stem != "standard" else {}
        settings |= {"norm": "group"} if config.model.norm == "group" else {}
        options = " ".join(f"--backbone.{name} {value}" for name, value in settings.items())
        print(f"a detector starts from it with {options}")
