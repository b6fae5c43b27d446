"""`effkern demo`: everything at once on a small scale."""

from pathlib import Path


def demo(out: Path = Path("runs/demo"), seed: int = 0, finetune: bool = False) -> int:
    """Train a small teacher and two students on real text, and write a report: minutes on two CPU cores.

    Args:
        out: folder of the demo; an interrupted demo in it goes on.
        seed: of weights and data order.
        finetune: adapt the student of a finished demo (trained first if there is none) to docstrings by LoRA.
    """
    from effkern.train.demo import DemoInterrupted, run_demo

    try:
        if finetune:
            from effkern.train.finetune_demo import run_finetune_demo

            print(run_finetune_demo(out, seed=seed))
            return 0
        run_demo(out, seed=seed)
    except DemoInterrupted as stop:
        print(stop)
        return 128 + stop.signum
    print((out / "report.md").read_text().split("![curves]")[0])
    print(f"report: {out / 'report.md'}, {out / 'report.json'}, {out / 'curves.png'}")
    return 0
