"""``python -m detmix train`` and so on, which is what ``torchrun -m`` starts."""

from detmix.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
