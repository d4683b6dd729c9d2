"""What every setting would cost every head of a model, on text: made once, kept in a file, spent by any budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield.far import Pyramid
from farfield.interop.transformers import cores
from farfield.interop.transformers.calibrate import centres_of, fisher, sampled, window_errors
from farfield.interop.transformers.layers import group_of, pyramid_of
from farfield.interop.transformers.menu import BLOCK, SINKS
from farfield.interop.transformers.texts import repeating

__all__ = ["BIASES", "RECALL", "Calibration", "Progress", "calibrate"]

PIECE = 1024
"""Tokens of a piece on which gradients are taken."""

RECALL = 2
"""Windows that come again with an end that repeats."""

BIASES: tuple[float | None, ...] = (None, *(i / 2 for i in range(-6, 5)))
"""Biases of an expansion that are tried for every head; None: no expansion."""

Progress = Callable[[str, int, int], None]
"""Called with the stage in words, the steps done and all of them."""

_KIND = "farfield.calibration"


@dataclass(frozen=True)
class Calibration:
    """Estimated errors, and what they are of.

    Attributes:
        errors: [kinds, settings, biases, layers, heads] float32, nats per token; of the kinds of text the first is
            plain, the second, where ``recall`` is above 0, ends that repeat.
        centres: [layers, heads, C, D] float32, of expansions; C is 0 without.
        menu: the settings; None is the near field and the sinks alone.
        biases: of an expansion; None for none.
        length, block, sinks: tokens of a window, of a leaf block, and those that are always seen.
        windows, recall, queries, pieces, seed: how much text, see :func:`calibrate`.
    """

    errors: Tensor
    centres: Tensor
    menu: tuple[Pyramid | None, ...]
    biases: tuple[float | None, ...]
    length: int
    block: int
    sinks: int
    windows: int
    recall: int
    queries: int
    pieces: int
    seed: int

    @property
    def effort(self) -> dict[str, int]:
        """What the estimate rests on."""
        told = {name: getattr(self, name) for name in ("windows", "recall", "queries", "pieces", "seed")}
        return {**told, "centres": self.centres.shape[2]}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        about = {name: x for name, x in asdict(self).items() if name not in ("errors", "centres", "menu")}
        about["menu"] = [None if p is None else group_of([], p) for p in self.menu]
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        save_file(
            {"errors": self.errors.contiguous(), "centres": self.centres.contiguous()},
            part,
            metadata={_KIND: json.dumps(about)},
        )
        part.replace(target)

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: for another kind of file.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no calibration {path}")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[_KIND])
                if "centres" not in file.keys():  # noqa: SIM118 (it is no dict)
                    raise ValueError("made by an earlier version; convert again from text")
                errors, centres = file.get_tensor("errors"), file.get_tensor("centres")
            menu = tuple(None if entry is None else pyramid_of(entry, about["sinks"])[1] for entry in about.pop("menu"))
            made = Calibration(errors=errors, centres=centres, menu=menu, **{**about, "biases": tuple(about["biases"])})
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no calibration: {error}") from error
        kinds = 2 if made.recall else 1
        fits = errors.dim() == 5 and errors.shape[:3] == (kinds, len(made.menu), len(made.biases))
        if not fits or centres.dim() != 4 or centres.shape[:2] != errors.shape[3:]:
            raise ValueError(
                f"{path} is no calibration: errors {list(errors.shape)} and centres {list(centres.shape)} of {kinds} "
                f"kinds of text, {len(made.menu)} settings and {len(made.biases)} biases"
            )
        return made

    def weighed(self, recall: float) -> Tensor:
        """[settings, biases, layers, heads] errors, those of ends that repeat with weight ``recall``, of 1 in all."""
        if len(self.errors) == 1:
            return self.errors[0]
        return torch.lerp(self.errors[0], self.errors[1], recall)


def calibrate(
    model: Any,
    windows: Sequence[Tensor],
    *,
    menu: Sequence[Pyramid | None],
    biases: Sequence[float | None] = BIASES,
    block: int = BLOCK,
    sinks: int = SINKS,
    centres: int = 0,
    recall: int = RECALL,
    queries: int = 64,
    pieces: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Estimates the error of every setting in every head of a model.

    Plain text hardly asks a model to find again what it read long ago, and an estimate from it alone takes the far
    field from the heads that do. So some windows come again with an end that repeats what stood far before, and
    queries are sampled in that end.

    Args:
        model: a Transformers causal language model whose layers see their whole causal context.
        windows: token ids [N] each, of one length, of text like that which the model will read.
        menu: settings with ``sinks``; None is the near field and the sinks alone.
        biases: of an expansion; None for none.
        block, sinks: of the near field.
        centres: of a head, found among its queries in these windows; 0 for no expansions.
        recall: how many of the windows come again so, at most all.
        queries: sampled in each window.
        pieces: of :data:`PIECE` tokens, for the gradients.
        seed: of the sampled queries and labels; equal seeds give equal errors on one machine.
        progress: told of every step.

    Raises:
        ValueError: when windows differ in length or are too short, the model cannot be converted, or its queries are
            beyond the range of float16.
    """
    length = _common_length(windows, block)
    if None not in biases:
        raise ValueError(f"biases={tuple(biases)}: None, for no expansion, has to be among them")
    biases = tuple(biases) if centres else (None,)
    layers = len(cores.attention_layers(model))
    device = next(model.parameters()).device
    done = {"gradients": 0, "centres": 0, "settings": 0}
    recall = min(recall, len(windows))
    steps = {"gradients": pieces, "centres": len(windows), "settings": layers * (len(windows) + recall)}

    def step(stage: str) -> None:
        done[stage] += 1
        if progress is not None:
            progress(stage, done[stage], steps[stage])

    generator = torch.Generator().manual_seed(seed)
    # Equally far apart, so that text from every window and every place is among them.
    size = min(PIECE, length)
    chosen = [windows[i % len(windows)] for i in range(pieces)]
    starts = [round(i / max(1, pieces - 1) * (length - size)) for i in range(pieces)]
    short = [ids[start : start + size].to(device) for ids, start in zip(chosen, starts, strict=True)]
    weight = fisher(model, short, generator, lambda: step("gradients"))
    places = weight.new_zeros(*weight.shape[:2], 0, weight.shape[-1])
    if centres:
        given = [ids.to(device) for ids in windows]
        # In the precision that a config keeps them in.
        apart = torch.Generator().manual_seed(seed)  # what else is drawn does not hang on whether there are centres
        places = centres_of(model, given, centres, apart, lambda: step("centres")).half().float()
        if not places.isfinite().all():
            raise ValueError("queries beyond the range of float16 have no centres; centres=0 would be accepted")
    # From the last on: of several texts each has its share where there are several windows of each.
    again = [repeating(windows[-1 - i * len(windows) // recall], generator) for i in range(recall)]
    parts = []
    for some in ([(ids, 0) for ids in windows], again):
        total = torch.zeros(())
        for ids, start in some:
            positions = sampled(length, queries, generator, start).to(device)
            part = window_errors(
                model, ids.to(device), menu, weight, positions=positions, block=block, sinks=sinks, biases=biases,
                centres=places if centres else None, progress=lambda: step("settings"),
            )  # fmt: skip
            total = total + part.cpu()
        parts += [total / len(some)] if some else []
    return Calibration(
        errors=torch.stack(parts), centres=places.cpu(), menu=tuple(menu), biases=biases, length=length, block=block,
        sinks=sinks, windows=len(windows), recall=recall, queries=queries, pieces=pieces, seed=seed,
    )  # fmt: skip


def _common_length(windows: Sequence[Tensor], block: int) -> int:
    lengths = {len(ids) for ids in windows}
    if len(lengths) != 1:
        raise ValueError(f"calibration needs windows of one length, got lengths {sorted(lengths)}")
    (length,) = lengths
    if length <= 3 * block:
        raise ValueError(
            f"calibration windows of {length} tokens have no far field beside blocks of {block}: "
            f"more than {3 * block} tokens are needed"
        )
    return length
