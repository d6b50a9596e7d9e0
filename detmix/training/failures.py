"""What stops a training, as a person is told it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from detmix.training.progress import Position

__all__ = [
    "NonFiniteLossError",
    "OtherProcessError",
    "describe_losses",
    "non_finite_loss",
    "non_finite_weights",
    "one_line",
    "stopped_elsewhere",
]

_ADVICE = "A lower optim.lr, a longer warm-up or optim.clip_norm often helps"


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; the message names the images of the step."""


class OtherProcessError(RuntimeError):
    """This process is well, but another one has stopped; the message tells why."""


def describe_losses(losses: Mapping[str, Tensor], images: str) -> str:
    """Return the losses of a step, scalars by name, and its images."""
    values = ", ".join(f"{name} {float(loss.detach()):g}" for name, loss in losses.items())
    return f"{values}; images of the step: {images}"


def non_finite_loss(causes: Sequence[str], position: Position, saved: str) -> NonFiniteLossError:
    """Return the error of a loss that is not finite.

    Args:
        causes: Of each process that met one, what `describe_losses` says.
        position: Where that was.
        saved: What became of the weights, as a sentence without a full stop.
    """
    return NonFiniteLossError(
        f"a loss is not finite at step {position.step} (epoch {position.epoch}): "
        f"{'; in another process: '.join(causes)}. {saved}. {_ADVICE}"
    )


def non_finite_weights(position: Position) -> NonFiniteLossError:
    """Return the error of weights that are not finite."""
    return NonFiniteLossError(
        f"the weights are not finite at step {position.step}: the checkpoint before is left as it "
        f"is. {_ADVICE}"
    )


def one_line(error: BaseException) -> str:
    """Return an error's message as one line; of one out of a loader's worker only its last.

    A worker's error arrives as its whole traceback within a message.
    """
    text = str(error).strip() or type(error).__name__
    if "DataLoader worker process" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text
    return " ".join(text.split())


def stopped_elsewhere(causes: Sequence[str]) -> OtherProcessError:
    """Return the error of a process that is well, given why others stop."""
    return OtherProcessError(f"another process stops: {'; '.join(causes)}")
