"""What a person sees: a bar in a terminal, plain lines in a file, and no markup interpreted in file names."""

import io

from rich.console import Console

from gigatrain import load
from gigatrain.observe.display import Display
from gigatrain.planning.plan import plan

WINDOW = {"step": 5, "loss": 2.34567, "tokens_per_s": 12345.6, "bad_steps": 0}


def display(terminal=False):
    file = io.StringIO()
    return Display(Console(file=file, force_terminal=terminal, width=120, highlight=False)), file


def test_without_a_terminal_lines_are_plain(tiny):
    chosen = plan(load.recipe(tiny), load.site("laptop"))
    shown, file = display()
    with shown:
        shown.plan(chosen, "--site")
        shown.window(chosen, WINDOW | {"step": 12})
        shown.window(chosen, {"step": 12, "val_loss": 1.5, "val_bits_per_byte": 0.75})
        shown.line("resumed from runs/[bold]x[/bold]")
    text = file.getvalue()
    assert "25,760 parameters" in text
    assert "train 12/12  loss 2.346  12,346 tokens/s" in text
    assert "step 12: validation loss 1.5000, 0.750 bits per byte" in text
    assert "runs/[bold]x[/bold]" in text
    assert "\x1b" not in text


def test_in_a_terminal_there_is_a_bar_with_numbers(tiny):
    chosen = plan(load.recipe(tiny), load.site("laptop"))
    shown, file = display(terminal=True)
    with shown:
        shown.advance("train", 0, 12)
        shown.window(chosen, WINDOW)
    text = file.getvalue()
    assert "5/12" in text
    assert "loss 2.346" in text
    assert "ETA" in text


def test_refused_steps_and_a_missing_loss_are_said(tiny):
    chosen = plan(load.recipe(tiny), load.site("laptop"))
    shown, file = display()
    shown.window(chosen, WINDOW | {"step": 12, "loss": None, "bad_steps": 3})
    assert "loss not finite" in file.getvalue()
    assert "3 refused" in file.getvalue()
