"""The same language model trained by torch.nn and by the kernels: what `fastseq demo` runs.

Both start from one seed and see the same windows. They take turns, a few steps each, so that whatever else the machine
does hits both alike.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fastseq
from fastseq import backends
from fastseq.ops import RecurrentFunction
from fastseq.tools.char_lm import CharLM, Text, TextError, Training, read_text, sample, standard_library_text
from fastseq.tools.info import cpu_name

SEED = 0
BATCH, WINDOW = 16, 64
TURN = 10  # steps
COMPARED_STEPS = 50
LARGEST_DIFFERENCE = 1e-4


@dataclass
class Run:
    """One of the two trainings and its record."""

    name: str
    training: Training
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def advance(self, steps: int) -> None:
        """Train for so many steps."""
        for _ in range(steps):
            start = time.perf_counter()
            loss = self.training.step()
            self.seconds.append(time.perf_counter() - start)
            self.losses.append(loss)

    @property
    def step_seconds(self) -> float:
        """The median step."""
        return statistics.median(self.seconds)

    @property
    def characters_per_second(self) -> float:
        """Characters trained on per second, at the median step."""
        return BATCH * WINDOW / self.step_seconds


def loss_difference(ours: list[float], torchs: list[float]) -> float:
    """The largest relative difference over the first steps; NaN if a loss is NaN."""
    ours, torchs = (torch.tensor(losses[:COMPARED_STEPS], dtype=torch.float64) for losses in (ours, torchs))
    return ((ours - torchs).abs() / torchs.abs()).max().item()


def runs_kernels(model: CharLM) -> bool:
    """Whether a call of the model with gradients records the kernels' autograd Function."""
    _, state = model(torch.zeros(1, 1, dtype=torch.long))
    h = state[0] if isinstance(state, tuple) else state
    nodes = [h.grad_fn]
    while nodes:
        node = nodes.pop()
        if getattr(node, "_forward_cls", None) is RecurrentFunction:
            return True
        nodes += [before for before, _ in node.next_functions if before is not None]
    return False


def train(text: Text, cell: str, steps: int, console: Console) -> tuple[Run, Run]:
    """Both trainings, in turns: torch.nn's and the fused one's."""

    def training(fused: bool) -> Training:
        torch.manual_seed(SEED)
        model = CharLM(len(text.characters), cell)
        return Training(fastseq.fuse(model) if fused else model, text.ids, BATCH, WINDOW, rate=4e-3)

    runs = Run("torch.nn", training(fused=False)), Run("fastseq", training(fused=True))
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(run.name, total=steps, state="") for run in runs]
        for start in range(0, steps, TURN):
            turn = min(TURN, steps - start)
            for run, task in zip(runs, tasks, strict=True):
                run.advance(turn)
                state = f"loss {run.losses[-1]:.3f}  {run.characters_per_second:,.0f} characters/s"
                progress.update(task, advance=turn, state=state)
    return runs


def draw(path: Path, runs: tuple[Run, Run], title: str) -> None:
    """One picture: the loss curves and the speeds."""
    colors = "#8a8f98", "#d1495b"
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    # The curves coincide: a broad one below, a thin one above, so that both can be seen.
    for run, color, width in zip(runs, colors, (5, 1.5), strict=True):
        curves.plot(range(1, len(run.losses) + 1), run.losses, color=color, linewidth=width, label=run.name)
    curves.set(xlabel="step", ylabel="loss (nats per character)")
    curves.legend(frameon=False)
    drawn = bars.bar([run.name for run in runs], [run.characters_per_second for run in runs], color=colors)
    bars.bar_label(drawn, [f"{run.characters_per_second:,.0f}\n{1e3 * run.step_seconds:.1f} ms/step" for run in runs])
    bars.set(ylabel="characters per second")
    bars.margins(y=0.2)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def run(source: Path | None, cell: str, steps: int, output: Path) -> int:
    """Train, compare, sample, draw.

    Returns 0, or 1 if the losses differ by more than rounding explains, or if the fused model runs none of the kernels.

    Raises TextError for a text that cannot be used.
    """
    console = Console(highlight=False)
    text = Text(standard_library_text() if source is None else read_text(source))
    if len(text.characters) < 2:
        raise TextError(f"the text has {len(text.characters)} different characters, at least 2 are needed")
    name = "the standard library of this Python" if source is None else source.name
    kernels = backends.select("recurrent")
    path = f"{kernels.active_isa()} kernels" if kernels else "no kernels: torch's own path, see `fastseq info`"
    model = f"2-layer {cell.upper()}, hidden 256, batch {BATCH}, windows of {WINDOW}, float32"
    machine = f"{cpu_name()}, threads: {torch.get_num_threads()}, {path}"
    console.print(f"{len(text.ids):,} characters of {name}, {len(text.characters)} different", markup=False)
    console.print(f"{model}\n{machine}\n", markup=False, soft_wrap=True)

    torchs, ours = runs = train(text, cell, steps, console)
    console.print(fastseq.fuse_report(ours.training.model), markup=False, soft_wrap=True)

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "characters/s", "ms/step (median)", f"loss at step {steps}"):
        table.add_column(heading, justify="right" if heading else "left")
    for each in runs:
        table.add_row(
            each.name, f"{each.characters_per_second:,.0f}", f"{1e3 * each.step_seconds:.1f}", f"{each.losses[-1]:.4f}"
        )
    console.print("", table, "", sep="\n")
    speedup = torchs.step_seconds / ours.step_seconds
    difference = loss_difference(ours.losses, torchs.losses)
    same = difference <= LARGEST_DIFFERENCE
    fused = kernels is None or runs_kernels(ours.training.model)
    console.print(f"training speed: {speedup:.2f} times torch.nn's")
    console.print(
        f"largest relative difference of the losses, first {min(steps, COMPARED_STEPS)} steps: {difference:.1e} "
        + (f"(at most {LARGEST_DIFFERENCE:g})" if same else f"[red]FAILED: above {LARGEST_DIFFERENCE:g}[/]"),
        soft_wrap=True,
    )
    if not fused:
        console.print("[red]FAILED: the fused model ran no kernels[/]")

    prompt = "\ndef " if set("\ndef ") <= text.number.keys() else text.decode(text.ids[:8].tolist())
    console.print(f"\nafter {steps} steps the model writes:", style="bold")
    console.print(prompt.lstrip("\n") + sample(ours.training.model, text, prompt, 400), markup=False, soft_wrap=True)

    draw(output, runs, f"{model}\n{machine}\nspeed {speedup:.2f}x, losses equal to {difference:.1e}")
    console.print(f"\nwrote {output}", markup=False, soft_wrap=True)
    return 0 if same and fused else 1
