"""Options that several of the trainer's commands have."""

from __future__ import annotations

import click

from dspark_edge.trainer.compute_types import COMPUTE_TYPES

__all__ = ["compute_type_option"]

compute_type_option = click.option(
    "--compute-type",
    type=click.Choice(COMPUTE_TYPES),
    default="auto",
    show_default=True,
    help="What torch multiplies in; auto: bf16 where that is faster.",
)
