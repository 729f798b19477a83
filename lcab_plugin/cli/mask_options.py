"""The options that describe one mask, shared by the commands that take one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcab_plugin.errors import LcabError

if TYPE_CHECKING:
    from lcab_plugin.masks import AttentionMask


# Options that are parameters of some families.
_OWN = "left", "right", "window", "prefix", "prefixes", "global_tokens", "block", "keep", "lengths"


@dataclass(frozen=True)
class Described:
    """A mask and how it was asked for. ``documents``: their number, None for a mask without."""

    name: str
    seqlen: int
    documents: int | None
    mask: AttentionMask

    @property
    def fraction(self) -> float:
        """Visible share of all query and key pairs."""
        return self.mask.area / (self.mask.q_len * self.mask.k_len) if self.mask.area else 0.0

    def __str__(self) -> str:
        documents = f" in {self.documents} documents" if self.documents else ""
        area = f"{self.mask.area} visible pairs, {self.fraction:.2%} of all"
        return f"{self.name}, {self.seqlen} tokens{documents}: {area}"


def describe(
    name: str,
    seqlen: Annotated[int, typer.Option(help="Tokens.")] = 4096,
    lengths: Annotated[str | None, typer.Option(help="Document lengths, comma separated.")] = None,
    documents: Annotated[
        str,
        typer.Option(help="Corpus to sample document lengths from, or a .json histogram, without --lengths."),
    ] = "pile",
    seed: Annotated[int, typer.Option(help="Seed of the sampled lengths and blocks.")] = 0,
    left: Annotated[int | None, typer.Option(help="Earlier keys in the window.")] = None,
    right: Annotated[int | None, typer.Option(help="Later keys in the window.")] = None,
    window: Annotated[int | None, typer.Option(help="Window to both sides.")] = None,
    prefix: Annotated[int | None, typer.Option(help="Tokens of the prefix.")] = None,
    prefixes: Annotated[str | None, typer.Option(help="Prefix of every document, or one for all.")] = None,
    global_tokens: Annotated[int | None, typer.Option(help="Tokens that see and are seen by all.")] = None,
    block: Annotated[int | None, typer.Option(help="Tokens of a block.")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the blocks that a query sees.")] = None,
) -> Described:
    """The mask of these options."""
    from lcab_plugin import masks

    params: dict[str, Any] = {
        "left": left,
        "right": right,
        "window": window,
        "prefix": prefix,
        "prefixes": _integers("--prefixes", prefixes),
        "global_tokens": global_tokens,
        "block": block,
        "keep": keep,
        "lengths": _integers("--lengths", lengths),
    }
    params = {key: value for key, value in params.items() if value is not None}
    if "lengths" not in params and masks.needs_lengths(name):
        params["lengths"] = masks.sample_lengths(seqlen, documents, seed)
    if "seed" in masks.parameters(name):
        params["seed"] = seed
    mask = masks.from_name(name, seqlen, **params)
    return Described(name, seqlen, len(params["lengths"]) if "lengths" in params else None, mask)


def takes_mask(name: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of ``describe`` in the place of its first parameter, the mask they describe.

    ``name``: the typer argument or option that the family's name comes by.
    """
    return _takes(Annotated[str, name], describe)


def takes_masks(names: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same of several masks; ``names``: their families' typer argument."""
    return _takes(Annotated[list[str], names], _describe_each)


def _describe_each(name: list[str], **options: Any) -> list[Described]:
    """Each mask by those of the options that it takes; one by itself is given all, and refuses the others.

    Raises:
        LcabError: an option is of no use to any of them.
    """
    from lcab_plugin import masks

    if len(name) == 1:
        return [describe(name[0], **options)]
    own = {family: masks.parameters(family) for family in name}
    for option in _OWN:
        if options[option] is not None and not any(option in taken for taken in own.values()):
            raise LcabError(
                f"none of {', '.join(name)} takes {option}; leave --{option.replace('_', '-')} out."
            )
    made = []
    for family, taken in own.items():
        theirs: dict[str, Any] = {o: x for o, x in options.items() if o not in _OWN or o in taken}
        made.append(describe(family, **theirs))
    return made


def _takes(names: Any, make: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        family, *options = inspect.signature(describe, eval_str=True).parameters.values()
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        taken = (family.replace(annotation=names), *options)

        @functools.wraps(command)
        def described(**words: Any) -> None:
            made = make(**{p.name: words.pop(p.name) for p in taken})
            command(made, **words)

        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*taken, *own)]
        described.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        described.__annotations__ = {p.name: p.annotation for p in parameters}
        return described

    return decorate


def _integers(option: str, text: str | None) -> list[int] | int | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} takes integers such as 1000,3096, not {text!r}") from None
    return numbers[0] if option == "--prefixes" and len(numbers) == 1 else numbers
