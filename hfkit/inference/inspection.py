"""`inspect`: how likely each token of a text is, what would come next, and what each sampling control leaves of it."""

import base64
import contextlib
import math
import re
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hfkit.console import counted
from hfkit.corpus.encoding import encode, first_tokens
from hfkit.declaration import set_fields
from hfkit.errors import HfkitError
from hfkit.inference.likelihood import score
from hfkit.inference.text import token_writer
from hfkit.models.architecture import check_causal
from hfkit.models.loading import LanguageModel, Model, loaded, share_weights, split_options
from hfkit.options import InspectOptions
from hfkit.reporting.templates import render

_WARPERS: dict[str, Any] = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
_EXAMPLE: dict[str, Any] = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05}  # where no control is given
_MOST_WEIGHTS = 30_000_000  # bytes of attention on a page, before base64
_PART = re.compile("⟨(?:[0-9a-f]{2} ?)+⟩")  # as `readable` writes what is not a whole character
_SIGNS = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Token:
    """One token of the text, and how likely the model found it."""

    text: str  # readable: a space as ·, a newline as ↵, a part of a character as its bytes
    id: int
    bits: float | None  # of surprise; None where nothing comes before
    rank: int | None  # 0: it was the likeliest

    @property
    def figures(self) -> str:
        """What a page shows while somebody points at the token."""
        return f"token {self.id}" + ("" if self.bits is None else f": {self.bits:.2f} bits, rank {self.rank}")


class Characters(NamedTuple):
    """A token, or the tokens whose bytes make up a character only together."""

    text: str
    tokens: list[Token]

    @property
    def bits(self) -> float:
        return sum(token.bits or 0.0 for token in self.tokens)


@dataclass(frozen=True)
class Inspection:
    """A text as a model sees it. `print` shows it as a table, a notebook in colours."""

    model: str
    tokens: list[Token]
    following: list[dict[str, Any]]  # likeliest next tokens: text, id, probability, and one under each control
    left: dict[str, int]  # tokens that each control leaves
    words: list[str] = field(repr=False)  # of the tokens, with the one that begins a text
    # (layers, heads, words, words); a row's word looks at each column's
    attention: torch.Tensor | None = field(default=None, repr=False)

    @property
    def bits(self) -> float:
        """Surprise of the whole text."""
        return sum(token.bits or 0.0 for token in self.tokens)

    @property
    def characters(self) -> list[Characters]:
        """The tokens, those joined that are parts of one character."""
        joined: list[Characters] = []
        for token in self.tokens:
            joined.append(Characters(token.text, [token]))
            for size in range(2, 9):  # a token may end one character and begin the next
                parts = joined[-size:]
                if len(parts) < size or not all(_PART.fullmatch(part.text) for part in parts):
                    break
                with contextlib.suppress(UnicodeDecodeError):
                    text = bytes.fromhex("".join(part.text[1:-1] for part in parts)).decode()
                    joined[-size:] = [Characters(text, [each for part in parts for each in part.tokens])]
                    break
        return joined

    @property
    def title(self) -> str:
        """The beginning of the text, on one line."""
        text = "".join(part.text for part in self.characters).replace("·", " ").replace("↵", " ").strip()
        return text if len(text) <= 60 else f"{text[:60]}…"

    @property
    def sentence(self) -> str:
        return f"{self.bits:.1f} bits in {counted(len(self.tokens), 'token')}"

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        tokens = [vars(token) for token in self.tokens]
        return {"model": self.model, "bits": self.bits, "tokens": tokens, "next": self.following, "left": self.left}

    def lines(self) -> list[str]:
        """A head, and a line for each token; the last part of a character shows it whole."""
        lines = [f"{'bits':>7} {'rank':>6}  token"]
        for text, tokens in self.characters:
            for token in tokens:
                bits, rank = ("-", "-") if token.bits is None else (f"{token.bits:.2f}", str(token.rank))
                whole = f"  {text}" if len(tokens) > 1 and token is tokens[-1] else ""
                lines.append(f"{bits:>7} {rank:>6}  {token.text}{whole}")
        return lines

    def __str__(self) -> str:
        lines = [*self.lines(), f"{self.sentence} under {self.model}", "next:"]
        return "\n".join([*lines, *(f"{percent(row['probability']):>7} {row['text']:>9}" for row in self.following)])

    def _repr_html_(self) -> str:
        return render("inspection.html.jinja", inspection=self, is_page=False, attention=None)


def percent(value: str | float) -> str:
    """A text, or a share in percent; empty for a share of 0."""
    return value if isinstance(value, str) else f"{value:.2%}" if value else ""


def inspect(text: str, *, model: Model = None, options: InspectOptions | None = None, **overrides: Any) -> Inspection:
    """Look at a text through a model.

    Args:
        text: what the model reads. Its first token is read after the token that begins a text, if there is one.
        model: what `load` returned or takes.
        options: every field of `InspectOptions` and `ModelOptions` is a keyword, too.

    Raises:
        HfkitError: the text is empty or does not fit the model, or the model cannot be loaded.
    """
    model, options = split_options(model, overrides, (InspectOptions, options))
    if not isinstance(text, str):
        raise HfkitError(f"a text is a str, not {type(text).__name__} ({text!r:.60}): convert it")
    lm = loaded(model)
    check_causal(lm.name, lm.model.config, "inspect a causal model")
    if not text:
        raise HfkitError("there is nothing to inspect: give a text")
    text_ids = encode(text, lm.tokenizer, lm.name)
    begin = first_tokens(lm.tokenizer)
    ids = text_ids if text_ids[: len(begin)] == begin else begin + text_ids
    if len(ids) > (lm.context or len(ids)):
        raise HfkitError(f"the text has {len(ids)} tokens, {lm.name} takes {lm.context}: shorten it")
    output = _run(lm, ids, options.attention)
    targets = torch.tensor([[*ids[1:], ids[-1]]], device=output.logits.device)
    nll, rank = (values[0].tolist() for values in score(output.logits, targets))
    surprises = [(None, None), *((nats / math.log(2), place) for nats, place in zip(nll, rank, strict=True))]
    tokens = [Token(readable(lm.tokenizer, token), token, *surprises[place]) for place, token in enumerate(ids)]
    following, left = _next(lm, output.logits[:, -1].float(), options)
    attention = None
    if options.attention:
        if not (layers := getattr(output, "attentions", None)) or any(layer is None for layer in layers):
            raise HfkitError(f"{lm.name} does not give its attention: leave it out")
        attention = torch.cat(layers).float().cpu()
    skipped = len(ids) - len(text_ids)
    return Inspection(lm.name, tokens[skipped:], following, left, [token.text for token in tokens], attention)


def _run(lm: LanguageModel, ids: list[int], attention: bool) -> Any:
    """One forward pass; for attention weights through a copy, because only eager attention gives them."""
    model: Any = lm.model
    if attention:
        model = share_weights(model)
        model.set_attn_implementation("eager")
    with torch.inference_mode():
        inputs = torch.tensor([ids], device=model.device)
        return model(input_ids=inputs, use_cache=False, output_attentions=attention)


def _next(
    lm: LanguageModel, logits: torch.Tensor, options: InspectOptions
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The likeliest next tokens, alone and under each control and all of them together; logits: (1, vocabulary)."""
    chosen = {name: value for name, value in set_fields(options).items() if name in _WARPERS}
    warpers = {f"{name} {value:g}": [_WARPERS[name](value)] for name, value in (chosen or _EXAMPLE).items()}
    if len(chosen) > 1:
        warpers["together"] = list(chain.from_iterable(warpers.values()))
    warped = {name: LogitsProcessorList(each)(cast(Any, None), logits.clone()) for name, each in warpers.items()}
    shares = {name: scores.softmax(-1)[0] for name, scores in {"probability": logits, **warped}.items()}
    likeliest = shares["probability"].topk(min(options.top, logits.shape[1])).indices.tolist()
    rows = [
        {"text": readable(lm.tokenizer, token), "id": token}
        | {name: row[token].item() for name, row in shares.items()}
        for token in likeliest
    ]
    return rows, {name: int(scores.isfinite().sum()) for name, scores in warped.items()}


def readable(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token for a reader: spaces and newlines as signs, a part of a character as its bytes."""
    word = cast(str | None, tokenizer.convert_ids_to_tokens(token))
    if word is None:  # some models have more outputs than their tokenizer has tokens
        return f"⟨token {token}⟩"
    if token in tokenizer.all_special_ids:
        return word
    raw = token_writer(tokenizer)(word)
    try:
        return raw.decode().translate(_SIGNS)
    except UnicodeDecodeError:
        return "⟨" + raw.hex(" ") + "⟩"


def to_page(inspection: Inspection, layer: int | None = None) -> str:
    """A self-contained page. If there is attention, it can be explored there: that of one layer, or of all.

    Raises:
        HfkitError: the weights are more than a page can hold.
    """
    attention = None
    if inspection.attention is not None:
        layers = range(len(inspection.attention)) if layer is None else [layer]
        rows, columns = torch.tril_indices(len(inspection.words), len(inspection.words))
        weights = inspection.attention[list(layers)][..., rows, columns]
        if weights.numel() > _MOST_WEIGHTS:
            raise HfkitError(
                f"{len(inspection.words)} tokens have {weights.numel():,} attention weights, too many for a page: "
                "choose one --layer, or a shorter text"
            )
        attention = {
            "words": inspection.words,
            "layers": " ".join(map(str, layers)),
            "heads": weights.shape[1],
            "weights": base64.b64encode((255 * weights.sqrt()).round().to(torch.uint8).numpy().tobytes()).decode(),
        }
    return render("inspection.html.jinja", inspection=inspection, is_page=True, attention=attention)
