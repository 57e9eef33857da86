"""What is left of the language model."""

from typing import Any

from t2i.report.figures import COLOURS, LABELS, draw_floors, finish, panels, styles
from t2i.study.results import Curve


def pretraining(one: Curve, *, floors: dict[str, float]) -> Any:
    """Draw held-out text loss against tokens, beside what counting costs."""
    figure, (axis,) = panels(1)
    axis.plot(one.tokens, one.values[0], color=COLOURS[0], marker="o", markersize=3)
    draw_floors(axis, floors)
    axis.set(xlabel="tokens trained on", ylabel="held-out text loss, nats a token")
    finish(axis)
    return figure


def forgetting(
    values: dict[str, dict[str, Curve]],
    paths: dict[str, tuple[Curve, Curve]],
    *,
    floors: dict[str, float],
) -> Any:
    """Draw the cost of held-out text and the leak along training, and what was kept against what was learned.

    Args:
        values: value -> arm -> curve, with the range of seeds.
        paths: arm -> held-out image loss and text loss at the same steps.
        floors: of held-out text, nats a token.
    """
    figure, axes = panels(len(values) + 1)
    for axis, (value, arms) in zip(axes[:-1], values.items(), strict=True):
        for (arm, one), (colour, dash) in zip(arms.items(), styles(), strict=False):
            style = {"color": colour, "linestyle": dash, "marker": "o", "markersize": 3}
            name = arm if axis is axes[0] else None  # one legend for all: many arms leave no room for three
            axis.plot(one.tokens, one.values.mean(0), label=name, **style)
            axis.fill_between(one.tokens, one.values.min(0), one.values.max(0), color=colour, alpha=0.15)
        if value == "text_loss_text_rows":
            draw_floors(axis, floors)
        axis.set(xlabel="tokens trained on", ylabel=LABELS[value])
        finish(axis)
    for (image, text), (colour, dash) in zip(paths.values(), styles(), strict=False):
        style = {"color": colour, "linestyle": dash, "marker": "o", "markersize": 3}
        axes[-1].plot(image.values.mean(0), text.values.mean(0), **style)
    axes[-1].set(
        xlabel="held-out image loss, nats a code (learning: to the right)",
        ylabel=LABELS["text_loss_text_rows"],
    )
    axes[-1].invert_xaxis()
    finish(axes[-1])
    return figure
