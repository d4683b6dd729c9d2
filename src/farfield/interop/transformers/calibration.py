"""What every setting would cost every head of a model, on text: made once, kept in a file, spent by any budget."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield.interop.transformers import cores
from farfield.interop.transformers.calibrate import centres_of, fisher, sampled, window_errors
from farfield.interop.transformers.layers import group_of, pyramid_of
from farfield.interop.transformers.menu import BLOCK, SINKS, Keeps, Setting
from farfield.interop.transformers.texts import repeating

__all__ = ["BIASES", "RECALL", "Calibration", "Progress", "calibrate", "common_length", "entry_of", "fingerprint"]

PIECE = 1024
"""Tokens of a piece on which gradients are taken."""

RECALL = 2
"""Windows that come again with an end that repeats."""

BIASES: tuple[float | None, ...] = (None, *(i / 2 for i in range(-6, 5)))
"""Biases of an expansion that are tried for every head; None: no expansion."""

Progress = Callable[[str, int, int], None]
"""Called with the stage in words, the steps done and all of them."""

_KIND = "farfield.calibration"

_SAYS_NOTHING = {
    "dtype", "torch_dtype", "transformers_version", "architectures", "use_cache", "id2label", "label2id",
    "bos_token_id", "eos_token_id", "pad_token_id", cores.NAME,
}  # fmt: skip
"""Entries of a config that change no answer."""


@dataclass(frozen=True)
class Calibration:
    """Estimated errors, and what they are of.

    Attributes:
        errors: [kinds, settings, biases, layers, heads] float32, nats per token; of the kinds of text the first is
            plain, the second, where ``recall`` is above 0, ends that repeat.
        centres: of expansions, [layers, heads, C, D] float32 for every number C of them; those beside pyramids have the
            fewest. Empty without expansions.
        menu: the settings; None is the near field and the sinks alone.
        biases: of an expansion; None for none.
        length, block, sinks: tokens of a window, of a leaf block, and those that are always seen.
        windows, recall, queries, pieces, seed: how much text, see :func:`calibrate`.
        model: :func:`fingerprint` of the model.
    """

    errors: Tensor
    centres: dict[int, Tensor]
    menu: tuple[Setting, ...]
    biases: tuple[float | None, ...]
    length: int
    block: int
    sinks: int
    windows: int
    recall: int
    queries: int
    pieces: int
    seed: int
    model: str

    @property
    def effort(self) -> dict[str, Any]:
        """What the estimate rests on."""
        told = {name: getattr(self, name) for name in ("windows", "recall", "queries", "pieces", "seed")}
        return {**told, "centres": sorted(self.centres)}

    @property
    def width(self) -> int:
        """D, of a head; 0 where there are no centres to know it from."""
        return next((x.shape[-1] for x in self.centres.values()), 0)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        about = {name: x for name, x in asdict(self).items() if name not in ("errors", "centres", "menu")}
        about["menu"] = [entry_of(p) for p in self.menu]
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        save_file(
            {"errors": self.errors.contiguous(), **{f"centres {n}": x.contiguous() for n, x in self.centres.items()}},
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
                names = [name for name in file.keys() if name.startswith("centres")]  # noqa: SIM118 (it is no dict)
                if "model" not in about or "centres" in names:
                    raise ValueError("made by an earlier version; convert again from text")
                errors = file.get_tensor("errors")
                centres = {int(name.split()[1]): file.get_tensor(name) for name in names}
            menu = tuple(_setting_of(entry, about["sinks"]) for entry in about.pop("menu"))
            made = Calibration(errors=errors, centres=centres, menu=menu, **{**about, "biases": tuple(about["biases"])})
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no calibration: {error}") from error
        kinds = 2 if made.recall else 1
        fits = errors.dim() == 5 and errors.shape[:3] == (kinds, len(made.menu), len(made.biases))
        of_heads = [x.dim() == 4 and x.shape[:3] == (*errors.shape[3:], n) for n, x in centres.items()]
        if not fits or not all(of_heads):
            given = ", ".join(f"{list(x.shape)} for {n}" for n, x in centres.items())
            raise ValueError(
                f"{path} is no calibration: errors {list(errors.shape)} and centres {given or 'none'}, of {kinds} "
                f"kinds of text, {len(made.menu)} settings and {len(made.biases)} biases"
            )
        return made

    def weighed(self, recall: float) -> Tensor:
        """[settings, biases, layers, heads] errors, those of ends that repeat with weight ``recall``, of 1 in all."""
        if len(self.errors) == 1:
            return self.errors[0]
        return torch.lerp(self.errors[0], self.errors[1], recall)


def fingerprint(model: Any) -> str:
    """A hash of some weights of every kind, in float32, and of the config."""
    config = model.config.to_dict()
    told = {name: x for name, x in config.items() if name not in _SAYS_NOTHING and not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.float32)
        digest.update(f"{name} {list(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:32]


def entry_of(setting: Setting) -> dict[str, Any] | None:
    """A setting as JSON can say it."""
    if setting is None:
        return None
    return asdict(setting) if isinstance(setting, Keeps) else group_of([], setting)


def _setting_of(entry: dict[str, Any] | None, sinks: int) -> Setting:
    if entry is None:
        return None
    return Keeps(**entry) if "number" in entry else pyramid_of(entry, sinks)[1]


def calibrate(
    model: Any,
    windows: Sequence[Tensor],
    *,
    menu: Sequence[Setting],
    biases: Sequence[float | None] = BIASES,
    block: int = BLOCK,
    sinks: int = SINKS,
    centres: Sequence[int] = (),
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
        centres: how many a head has, found among its queries in these windows: numbers for expansions that keep tokens
            (those of the menu have to be among them), the least of them also for expansions beside other settings.
            Empty for no expansions.
        recall: how many of the windows come again so, at most all.
        queries: sampled in each window.
        pieces: of :data:`PIECE` tokens, for the gradients.
        seed: of the sampled queries and labels; equal seeds give equal errors on one machine.
        progress: told of every step.

    Raises:
        ValueError: when windows differ in length or are too short, the model cannot be converted, or its queries are
            beyond the range of float16.
    """
    length = common_length(windows, block)
    if None not in biases:
        raise ValueError(f"biases={tuple(biases)}: None, for no expansion, has to be among them")
    numbers = sorted(set(centres))
    missing = sorted({p.number for p in menu if isinstance(p, Keeps)} - set(numbers))
    if missing or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError(f"centres={tuple(centres)}: numbers >= 1 would be accepted, those of the menu among them")
    biases = tuple(biases) if numbers else (None,)
    layers, of = len(cores.attention_layers(model)), fingerprint(model)
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
    places: dict[int, Tensor] = {}
    if numbers:
        given = [ids.to(device) for ids in windows]
        # In the precision that a config keeps them in.
        apart = torch.Generator().manual_seed(seed)  # what else is drawn does not hang on whether there are centres
        found = centres_of(model, given, numbers, apart, lambda: step("centres"))
        places = {number: x.half().float() for number, x in found.items()}
        if not all(x.isfinite().all() for x in places.values()):
            raise ValueError("queries beyond the range of float16 have no centres; centres=() would be accepted")
    # From the last on: of several texts each has its share where there are several windows of each.
    again = [repeating(windows[-1 - i * len(windows) // recall], generator) for i in range(recall)]
    parts = []
    for some in ([(ids, 0) for ids in windows], again):
        total = torch.zeros(())
        for ids, start in some:
            positions = sampled(length, queries, generator, start).to(device)
            part = window_errors(
                model, ids.to(device), menu, weight, positions=positions, block=block, sinks=sinks, biases=biases,
                centres=places, progress=lambda: step("settings"),
            )  # fmt: skip
            total = total + part.cpu()
        parts += [total / len(some)] if some else []
    return Calibration(
        errors=torch.stack(parts), centres={n: x.cpu() for n, x in places.items()}, menu=tuple(menu), biases=biases,
        length=length, block=block, sinks=sinks, windows=len(windows), recall=recall, queries=queries, pieces=pieces,
        seed=seed, model=of,
    )  # fmt: skip


def common_length(windows: Sequence[Tensor], block: int) -> int:
    """Tokens of every window; ValueError where they differ, or have nothing far."""
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
