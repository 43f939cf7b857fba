"""The run of ``hook_loop.py`` with ``RMUTrainer``: one model instead of two, and no layer above the hooked one.

The four settings marked below repeat what that loop does; leave them out for the defaults.

python examples/rmu_trainer.py
"""

from __future__ import annotations

import argparse
import tempfile

from tiny import FORGET, RETAIN, tiny_model, tiny_tokenizer

from rmu import RMUConfig, RMUTrainer


def unlearn(steps: int) -> list[float]:
    """The loss of each step."""
    tokenizer = tiny_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        args = RMUConfig(
            output_dir=folder,
            method="rmu",
            layer=2,
            coefficient=[6.5],
            alpha=[10.0],
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            max_steps=steps,
            shuffle=False,  # texts in their own order
            padding_side="left",
            exclude_padding=False,  # pad rows count
            exclude_sink=False,  # so does the first token
            seed=42,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = RMUTrainer(
            tiny_model(len(tokenizer)), args, forget=FORGET, retain=[RETAIN], processing_class=tokenizer
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    for step, loss in enumerate(unlearn(parser.parse_args().steps), 1):
        print(f"step {step}: loss {loss:.6f}")


if __name__ == "__main__":
    main()
